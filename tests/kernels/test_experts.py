"""The kernels of chosen experts against their references: every form, unequal sizes, and bits that do not move."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35.kernels import expert_down, expert_gate_up
from tests.kernels.stacks import FORMS, Matrix, all_of, flat
from tests.metal_emulator import check, compile_for_cuda, poisoned_outputs

EXPERTS, HIDDEN, SIZE, SHARED = 7, 384, 128, 256


def ids_of(rows, k, experts=EXPERTS):
    rng = np.random.RandomState(rows)
    return mx.array(np.stack([rng.permutation(experts)[:k] for _ in range(rows)]).astype(np.uint32))


def gate_up_case(form, shared_form, rows, k, dtype, *, hidden=HIDDEN, size=SIZE, shared=SHARED, up_form="same"):
    mx.random.seed(rows)
    up_form = form if up_form == "same" else up_form
    matrices = [Matrix.random(f, (EXPERTS, size, hidden), dtype) for f in (form, up_form)]
    matrices += [Matrix.random(shared_form, (shared, hidden), dtype) for _ in range(2)]
    x = mx.random.normal((rows, hidden)).astype(dtype)
    operation = {
        "kernels": lambda x, ids, *a: expert_gate_up.gate_up(x, ids, *all_of(matrices, a)),
        "reference": lambda x, ids, *a: expert_gate_up.reference.gate_up(x, ids, *all_of(matrices, a)),
    }
    return operation | {"arrays": [x, ids_of(rows, k), *flat(matrices)]}


def down_case(form, shared_form, rows, k, dtype, *, hidden=HIDDEN - 3, size=SIZE, shared=SHARED):
    mx.random.seed(rows)
    matrices = [
        Matrix.random(form, (EXPERTS, hidden, size), dtype),
        Matrix.random(shared_form, (hidden, shared), dtype),
    ]
    values = [mx.random.normal(s).astype(dtype) for s in ((rows, k, size), (rows, shared))]
    weights = mx.random.uniform(shape=(rows, k + 1))
    operation = {
        "kernels": lambda h, s, ids, w, *a: expert_down.down(h, s, ids, w, *all_of(matrices, a)),
        "reference": lambda h, s, ids, w, *a: expert_down.reference.down(h, s, ids, w, *all_of(matrices, a)),
    }
    return operation | {"arrays": [*values, ids_of(rows, k), weights, *flat(matrices)]}


CASES = pytest.mark.parametrize("case", [gate_up_case, down_case], ids=["gate_up", "down"])


@CASES
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_form(case, form):
    """bfloat16 as on a GPU, the shared expert in another form."""
    check(**case(form, ("affine", 8, 64) if form != ("affine", 8, 64) else None, 2, 3, mx.bfloat16))


@CASES
@pytest.mark.parametrize("form", [("affine", 5, 32), ("affine", 4, 64), ("mxfp4", 4, 32), None], ids=str)
def test_float32(case, form):
    """Under the sanitizers, for which each form is compiled twice more: what spans words, and what has no scales."""
    check(**case(form, form, 1, 2, mx.float32), sanitize=form in (("affine", 5, 32), None))


@CASES
@pytest.mark.parametrize("rows, k", [(1, 5), (2, 7), (63, 1), (257, 2)])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_any_number_of_rows(case, rows, k, dtype):
    check(**case(("affine", 4, 64), ("affine", 8, 64), rows, k, dtype, hidden=192, size=64, shared=128))


def test_gate_and_up_of_two_forms_and_a_smaller_shared_expert():
    check(**gate_up_case(("affine", 3, 64), None, 2, 2, mx.bfloat16, up_form=("affine", 6, 64), size=107, shared=30))


@CASES
def test_bits_stay_where_an_expert_moves_or_a_row_comes_alone(case):
    """As streaming has it: other slots, in a smaller stack; and fewer rows at a time."""
    made = case(("affine", 4, 32), ("affine", 8, 64), 3, 2, mx.bfloat16)
    operation, arrays = made["kernels"], made["arrays"]
    at = next(n for n, a in enumerate(arrays) if a.dtype == mx.uint32)
    ids = np.array(arrays[at])
    used = sorted({*ids.flatten().tolist()}, reverse=True)
    moved = [a[mx.array(used)] if a.ndim == 3 and a.shape[0] == EXPERTS else a for a in arrays]
    moved[at] = mx.array([[used.index(e) for e in row] for row in ids.tolist()], mx.uint32)
    one = [a[1:2] if a.shape[0] == 3 else a for a in arrays]
    with poisoned_outputs():
        whole, elsewhere, alone = (operation(*a) for a in (arrays, moved, one))
        if isinstance(whole, mx.array):
            whole, elsewhere, alone = [whole], [elsewhere], [alone]
        for a, b, c in zip(whole, elsewhere, alone, strict=True):
            assert mx.array_equal(a, b)
            assert mx.array_equal(a[1:2], c)


@CASES
@pytest.mark.parametrize("form", [("affine", 3, 32), ("affine", 4, 64), ("mxfp4", 4, 32), None], ids=str)
def test_compiles_for_cuda(case, form):
    made = case(form, ("affine", 8, 64), 2, 3, mx.bfloat16)
    assert compile_for_cuda(made["kernels"], made["arrays"]) == {f"expert_{'down' if case is down_case else 'gate_up'}"}
