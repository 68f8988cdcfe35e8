"""Residual and norm in one: against the reference, in every dtype that weights have."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35.kernels.add_norm import add_norm
from mlx_qwen35.kernels.add_norm.reference import add_norm as reference
from tests.metal_emulator import check, compile_for_cuda, poisoned_outputs


def inputs(shape, dtype, weight_dtype=mx.float32, seed=0):
    rng = np.random.RandomState(seed)
    x, added = (mx.array(rng.standard_normal(shape).astype(np.float32)).astype(dtype) for _ in range(2))
    return [x, added, mx.array(rng.uniform(0.3, 2, shape[-1:]).astype(np.float32)).astype(weight_dtype)]


F32, BF16 = mx.float32, mx.bfloat16


@pytest.mark.parametrize(
    "shape, dtype, weight",
    [((1, 1, 1024), BF16, BF16), ((1, 2, 250), F32, F32), ((3, 21, 64), F32, F32), ((257, 7), BF16, F32),
     ((2, 63, 7), F32, F32), ((2, 5120), BF16, BF16)],
)  # fmt: skip
def test_equals_the_reference(shape, dtype, weight):
    check(
        lambda *a: add_norm(*a, eps=1e-3),
        lambda *a: reference(*a, eps=1e-3),
        inputs(shape, dtype, weight),
        sanitize=shape == (1, 2, 250),
    )


def test_what_goes_on_is_the_rounded_sum():
    """Bit for bit x + added in bfloat16."""
    x, added, weight = inputs((4, 300), BF16)
    with poisoned_outputs():
        assert mx.array_equal(add_norm(x, added, weight, eps=1e-6)[0], x + added)


def test_a_row_has_the_same_bits_alone():
    x, added, weight = inputs((4, 300), BF16)
    with poisoned_outputs():
        together = add_norm(x, added, weight, eps=1e-6)
        for row in range(4):
            alone = add_norm(x[row : row + 1], added[row : row + 1], weight, eps=1e-6)
            assert all(mx.array_equal(a[row : row + 1], b) for a, b in zip(together, alone, strict=True))


def test_zeros_stay_zero():
    arrays = [*[mx.zeros((2, 250))] * 2, mx.ones(250)]
    check(lambda *a: add_norm(*a, eps=1e-6), lambda *a: reference(*a, eps=1e-6), arrays)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_compiles_for_cuda(dtype):
    assert compile_for_cuda(lambda *a: add_norm(*a, eps=1e-6), inputs((2, 250), dtype)) == {"add_norm"}
