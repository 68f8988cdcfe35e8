"""Rows of unequal length over pieces of arrays: against the reference, and what a row's bits depend on."""

import mlx.core as mx
import numpy as np
import pytest

import mlx_qwen35.kernels.ragged_attention as ragged_attention
from mlx_qwen35.kernels.ragged_attention import Piece, planned, readable, reference
from tests.metal_emulator import check, compile_for_cuda, poisoned_outputs

F32, F16, BF16 = mx.float32, mx.float16, mx.bfloat16

# Of each row its pieces: arrays, row of the arrays, first position, count.
ROWS = (
    (Piece(0, 0, 0, 37), Piece(2, 0, 3, 5)),
    (Piece(1, 0, 0, 1), Piece(2, 1, 5, 3)),
    (Piece(0, 0, 0, 20), Piece(3, 0, 0, 41), Piece(2, 2, 0, 8)),
)
SHAPES = ((1, 40), (1, 9), (3, 8), (1, 64))  # of those arrays: rows, capacity


def inputs(heads, kv_heads, dim, dtype=F32, *, shapes=SHAPES, rows=3, seed=0, spread=1.0):
    """Queries [B, Hq, D], then keys and values of each pair."""
    rng = np.random.RandomState(seed)

    def normal(*shape):
        return mx.array(rng.standard_normal(shape).astype(np.float32)).astype(dtype)

    made = [normal(rows, heads, dim) * spread]
    for count, capacity in shapes:
        made += [normal(count, kv_heads, capacity, dim), normal(count, kv_heads, capacity, dim)]
    return made


def pairs(arrays):
    return list(zip(arrays[::2], arrays[1::2], strict=True))


def plan_of(pieces, shapes, kv_heads, span, most=13):
    return planned(pieces, tuple(capacity for _, capacity in shapes), kv_heads, span, most)


def case(heads, kv_heads, dim, dtype=F32, *, span=512, most=13, pieces=ROWS, shapes=SHAPES, simds=8, **how):
    plan = plan_of(pieces, shapes, kv_heads, span, most)
    return {
        "kernels": lambda q, *a: ragged_attention.ragged_attention(q, pairs(a), pieces, plan, most_simds=simds),
        "reference": lambda q, *a: reference.ragged_attention(q, pairs(a), pieces),
        "arrays": inputs(heads, kv_heads, dim, dtype, shapes=shapes, rows=len(pieces), **how),
    }


@pytest.mark.parametrize(
    "heads, kv_heads, dim, dtype, span",
    [(4, 2, 32, F32, 512), (6, 2, 20, F32, 16), (5, 1, 33, F32, 16), (16, 1, 64, F32, 32), (3, 3, 128, BF16, 16),
     (8, 1, 256, BF16, 512), (12, 2, 256, F32, 32), (2, 1, 256, F16, 8), (40, 1, 8, F32, 512)],
)  # fmt: skip
def test_equals_the_reference(heads, kv_heads, dim, dtype, span):
    check(**case(heads, kv_heads, dim, dtype, span=span), launches=1 if span == 512 else 2)


@pytest.mark.parametrize("span", [512, 16])
def test_under_the_sanitizers(span):
    check(**case(6, 2, 36, span=span, simds=4), launches=1 if span == 512 else 2, sanitize=True)


def test_wide_rows_under_the_sanitizers():
    check(**case(2, 1, 256, BF16, span=16, simds=2), launches=2, sanitize=True)


def test_scores_far_apart_stay_finite():
    check(**case(4, 2, 32, span=16, spread=300.0), launches=2)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_row_has_the_same_bits_wherever_it_lies_and_whoever_is_beside_it(dtype):
    """In one piece or several, in one launch or several, beside longer rows and alone."""
    queries, *arrays = inputs(4, 2, 32, dtype)
    with poisoned_outputs():
        made = {}
        for span in (16, 128):  # 128: a row of 69 is one span; beside one of 200 it is put together from one
            plan = plan_of(ROWS, SHAPES, 2, span)
            together = ragged_attention.ragged_attention(queries, pairs(arrays), ROWS, plan)
            for number, pieces in enumerate(ROWS):
                own = [[a[p.row, :, p.first : p.first + p.count] for a in pairs(arrays)[p.arrays]] for p in pieces]
                whole = tuple(mx.contiguous(mx.concatenate(of, axis=1)[None]) for of in zip(*own, strict=True))
                asking = queries[number : number + 1]
                alone = ((Piece(0, 0, 0, whole[0].shape[2]),),)
                single = plan_of(alone, [(1, whole[0].shape[2])], 2, span)
                assert mx.array_equal(
                    ragged_attention.ragged_attention(asking, [whole], alone, single)[0], together[number]
                )
            longer = (*ROWS, (Piece(3, 0, 0, 64), Piece(0, 0, 0, 40), Piece(3, 0, 0, 64), Piece(0, 0, 0, 40)))
            beside = ragged_attention.ragged_attention(
                mx.concatenate([queries, queries[:1]]), pairs(arrays), longer, plan_of(longer, SHAPES, 2, span)
            )
            assert mx.array_equal(beside[:3], together)
            made[span] = together
        if dtype == F32:  # other sums, which bfloat16 need not show
            assert not mx.array_equal(made[16], made[128])


def test_more_arrays_than_a_launch_can_have():
    """Rows, and spans of one row, in several launches."""
    shapes = [(1, 16)] * 9
    pieces = ((Piece(0, 0, 0, 9), Piece(1, 0, 2, 8)), tuple(Piece(n, 0, n, 7) for n in range(2, 9)))
    for most, launches in ((13, 1), (5, 2), (3, 4)):
        plan = plan_of(pieces, shapes, 1, 16, most)
        assert len(plan.launches) == launches and all(len(launch.arrays) <= most for launch in plan.launches)
        made = case(3, 1, 16, span=16, most=most, pieces=pieces, shapes=shapes)
        check(**made, launches=launches + 1)
    assert plan_of(pieces, shapes, 1, 16, 2) is None
    whole = plan_of(ROWS, SHAPES, 2, 512, 3)
    assert whole.whole and len(whole.launches) == 2
    check(**case(4, 2, 32, most=3), launches=2)


def test_one_kernel_for_any_rows():
    """Rows, lengths and places are no constants: nothing is compiled anew as rows grow, join and leave."""
    with poisoned_outputs() as emulator:
        for pieces in (ROWS, ROWS[1:], ROWS[:1] + ROWS):
            made = case(4, 2, 32, span=16, pieces=pieces)
            mx.eval(made["kernels"](*made["arrays"]))
    if emulator is not None:
        assert len({id(launch.program) for launch in emulator.launches}) == 2


def test_what_the_kernels_take():
    assert readable(16, 2, 256) and readable(32, 2, 256) and readable(8, 8, 8)
    assert not readable(16, 2, 288) and not readable(6, 4, 64) and not readable(130, 2, 64)


@pytest.mark.parametrize("dtype, span", [(F32, 512), (BF16, 16)])
def test_compiles_for_cuda(dtype, span):
    made = case(8, 2, 256, dtype, span=span)
    names = {"ragged_attention"} if span == 512 else {"ragged_attention", "ragged_sum"}
    assert compile_for_cuda(made["kernels"], made["arrays"]) == names
