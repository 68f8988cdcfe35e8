"""The norm of a few rows on a CPU: the bits of MLX's own, whatever the shape; and gradients."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35.kernels.rms_norm import rms_norm


@pytest.mark.parametrize(
    "shape", [(1, 1, 192), (8, 1, 192), (1, 1, 4, 64), (1, 5, 7, 33), (16, 1, 100), (1, 17, 8), (3, 5)]
)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("weighted", [True, False])
def test_has_the_bits_of_mlxs(shape, dtype, weighted):
    rng = np.random.RandomState(len(shape))
    for spread in (1e-3, 1.0, 300.0):
        x = mx.array((rng.standard_normal(shape) * spread).astype(np.float32)).astype(dtype)
        weight = mx.array(rng.uniform(0.3, 2, shape[-1]).astype(np.float32)) if weighted else None
        for _ in range(2):  # what is remembered is the same
            assert mx.array_equal(rms_norm(x, weight, 1e-6), mx.fast.rms_norm(x, weight, 1e-6))


def test_a_weight_that_is_another_is_noticed():
    x = mx.ones((1, 1, 4))
    for value in (1.0, 2.0):
        assert mx.allclose(rms_norm(x, mx.full((4,), value), 1e-6), mx.full((1, 1, 4), value))


def test_gradients():
    x, weight = mx.random.normal((2, 3, 8), key=mx.random.key(1)), mx.random.normal((8,), key=mx.random.key(2))
    found, expected = (
        mx.grad(lambda w, x, norm=norm: (norm(x, w, 1e-6) ** 2).sum(), argnums=(0, 1))(weight, x)
        for norm in (rms_norm, mx.fast.rms_norm)
    )
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.array(ours), np.array(theirs), rtol=1e-4, atol=1e-5)
    compiled = mx.compile(lambda x: rms_norm(x, weight, 1e-6))
    assert mx.allclose(compiled(x), rms_norm(x, weight, 1e-6), atol=1e-6)
