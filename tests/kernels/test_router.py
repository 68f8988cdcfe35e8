"""The router's kernel against its reference: the same experts, the same weights; ties, NaN, and the shared expert."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35.kernels.router import reference, route
from tests.kernels.stacks import Matrix
from tests.metal_emulator import check, compile_for_cuda, poisoned_outputs


def by_id(result):
    """(ids, weights) in the order of ids; a column of weights behind them stays."""
    ids, weights = result
    order = mx.argsort(ids, axis=-1)
    chosen = mx.take_along_axis(weights[:, : ids.shape[1]], order, axis=-1)
    rest = weights[:, ids.shape[1] :]
    return mx.take_along_axis(ids, order, axis=-1).astype(mx.uint32), mx.concatenate([chosen, rest], axis=-1)


def distinct(rows, experts, dtype=mx.float32):
    """Logits without ties, in bfloat16 too."""
    rng = np.random.RandomState(rows * 1000 + experts)
    steps = np.stack([rng.permutation(experts) for _ in range(rows)])
    return mx.array((steps - experts / 2).astype(np.float32) / 32).astype(dtype)


@pytest.mark.parametrize(
    "rows, experts, k", [(1, 256, 8), (2, 512, 10), (63, 40, 3), (257, 19, 2), (2, 5, 5), (1, 1024, 32)]
)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_same_experts(rows, experts, k, dtype):
    logits = distinct(rows, experts, mx.float32 if experts > 512 else dtype)
    check(
        lambda a: by_id(route(a, k)),
        lambda a: by_id(reference.route(a, k)),
        [logits],
        sanitize=(rows, dtype) == (2, mx.float32),
    )


@pytest.mark.parametrize("form", [None, ("affine", 8, 64), ("affine", 4, 128), ("mxfp4", 4, 32)])
@pytest.mark.parametrize("rows, width, dtype", [(1, 768, mx.bfloat16), (63, 128, mx.float32)])
def test_with_the_shared_expert(form, rows, width, dtype):
    mx.random.seed(rows)
    x, gate = mx.random.normal((rows, width)).astype(dtype), Matrix.random(form, (1, width), dtype)
    check(
        lambda logits, x, *arrays: by_id(route(logits, 4, x, gate.of(arrays))),
        lambda logits, x, *arrays: by_id(reference.route_with_shared(logits, 4, x, gate.of(arrays).values())),
        [distinct(rows, 60, dtype), x, *gate.arrays],
        sanitize=rows == 1,
    )


def test_of_equal_logits_the_lower_id_is_taken_first():
    logits = np.zeros((3, 70), np.float32)
    logits[0, [69, 33, 1, 34]] = 2
    logits[1] = -np.inf
    logits[1, 40] = 0
    with poisoned_outputs():
        ids, weights = route(mx.array(logits), 5)
        ids, weights = np.array(ids), np.array(weights)
    np.testing.assert_array_equal(ids, [[1, 33, 34, 69, 0], [40, 0, 1, 2, 3], [0, 1, 2, 3, 4]])
    np.testing.assert_allclose(weights[1], [1, 0, 0, 0, 0])
    np.testing.assert_allclose(weights[2], 0.2, rtol=1e-6)
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-6)


def test_nan_is_passed_on_and_ids_stay_experts():
    logits = distinct(2, 40)
    logits[0, 7] = mx.nan
    with poisoned_outputs():
        ids, weights = route(logits, 3)
        ids, weights = np.array(ids), np.array(weights)
    assert (ids < 40).all() and all(len(set(row)) == 3 for row in ids.tolist())
    assert np.isnan(weights[0]).all() and np.isfinite(weights[1]).all()


def test_a_row_has_the_same_bits_alone():
    logits, gate = distinct(5, 64), Matrix.random(("affine", 8, 64), (1, 256))
    x = mx.random.normal((5, 256))
    with poisoned_outputs():
        together = route(logits, 4, x, gate.of(gate.arrays))
        alone = [route(logits[i : i + 1], 4, x[i : i + 1], gate.of(gate.arrays)) for i in range(5)]
        for all_rows, each in zip(together, zip(*alone, strict=True), strict=True):
            assert mx.array_equal(all_rows, mx.concatenate(each))


@pytest.mark.parametrize("form", [None, ("affine", 8, 64), ("mxfp4", 4, 32)])
def test_compiles_for_cuda(form):
    gate = Matrix.random(form, (1, 256), mx.bfloat16)
    arrays = [distinct(2, 40, mx.bfloat16), mx.ones((2, 256), mx.bfloat16), *gate.arrays]
    assert compile_for_cuda(lambda a, x, *g: route(a, 4, x, gate.of(g)), arrays) == {"router"}
