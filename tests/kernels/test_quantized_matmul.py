"""The product with unpacked weights against MLX's own, in every mode."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import mlx_qwen35.kernels.quantized_matmul as kernel
from mlx_qwen35.layers.linear import Linear, QuantizedLinear

MODES = [(m, b, g) for b, g in [(2, 32), (3, 64), (4, 64), (5, 128), (6, 32), (8, 128)] for m in ["affine"]]
MODES += [("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)]


@pytest.mark.parametrize("mode, bits, group_size", MODES)
@pytest.mark.parametrize("rows", [1, 2, 7, 8, 63, 257])
def test_both_forms_agree(mode, bits, group_size, rows, monkeypatch):
    monkeypatch.setattr(kernel, "_MOST_UNPACKED", 128 * 33)  # three blocks, the last smaller
    rng = np.random.RandomState(rows)
    packed = mx.quantize(mx.array(rng.standard_normal((96, 128)).astype(np.float32)), group_size, bits, mode)
    packed = (*packed, None)[:3]
    x = mx.array(rng.standard_normal((rows, 128)).astype(np.float32))
    how = {"group_size": group_size, "bits": bits, "mode": mode}
    expected = x @ mx.dequantize(*packed, group_size, bits, mode, dtype=mx.float32).T
    found = kernel.quantized_matmul(x, *packed, **how)
    assert found.shape == (rows, 96) and found.dtype == mx.float32
    np.testing.assert_allclose(np.array(found), np.array(expected), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_map_quantizes_to_one_of_ours(bias):
    linear = Linear(64, 40, bias=bias)
    model = nn.Sequential(linear)
    nn.quantize(model, 32, 8)
    quantized = model.layers[0]
    assert isinstance(quantized, QuantizedLinear) and isinstance(quantized, nn.QuantizedLinear)
    for shape in ((64,), (3, 64), (2, 3, 5, 64)):
        x = mx.random.normal(shape)
        own, theirs = quantized(x), nn.QuantizedLinear.__call__(quantized, x)
        assert own.shape == theirs.shape
        np.testing.assert_allclose(np.array(own), np.array(theirs), atol=1e-5)


def test_other_dtypes_take_the_kernel_of_mlx():
    packed = mx.quantize(mx.random.normal((32, 64)).astype(mx.bfloat16), 64, 8)
    x = mx.random.normal((9, 64)).astype(mx.bfloat16)
    found = kernel.quantized_matmul(x, *packed, group_size=64, bits=8, mode="affine")
    assert found.dtype == mx.bfloat16


@pytest.mark.parametrize("rows", [3, 40])
def test_gradients_are_those_of_plain_weights(rows):
    """Of x, through either form: adapters are trained beside quantized weights."""
    packed = mx.quantize(mx.random.normal((96, 128)), 64, 4)
    how = {"group_size": 64, "bits": 4, "mode": "affine"}
    x, plain = mx.random.normal((rows, 128)), mx.dequantize(*packed, 64, 4)
    found = mx.grad(lambda x: mx.square(kernel.quantized_matmul(x, *packed, **how)).sum())(x)
    expected = mx.grad(lambda x: mx.square(x @ plain.T).sum())(x)
    np.testing.assert_allclose(np.array(found), np.array(expected), rtol=1e-4, atol=1e-2)
