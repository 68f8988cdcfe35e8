"""RMS norms: statistics in float32, the dtype of the input, the gate."""

import mlx.core as mx
import numpy as np

from mlx_qwen35.layers.norm import GatedRMSNorm, RMSNorm


def test_scale_is_applied_as_it_is():
    norm = RMSNorm(8, 1e-6)
    norm.weight = mx.arange(8).astype(mx.float32)
    x = np.random.RandomState(0).standard_normal((3, 8)).astype(np.float32) * 50
    wanted = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * np.arange(8)
    np.testing.assert_allclose(np.array(norm(mx.array(x))), wanted, rtol=1e-5)


def test_a_float32_scale_does_not_promote():
    for norm in (RMSNorm(8, 1e-6), GatedRMSNorm(8, 1e-6)):
        x = mx.ones((2, 8), mx.bfloat16)
        assert norm.weight.dtype == mx.float32
        assert (norm(x, x) if isinstance(norm, GatedRMSNorm) else norm(x)).dtype == mx.bfloat16


def test_epsilon_keeps_zeros_at_zero():
    assert np.array(RMSNorm(4, 1e-6)(mx.zeros((1, 4)))).tolist() == [[0.0] * 4]


def test_gate_is_silu():
    norm = GatedRMSNorm(4, 1e-6)
    gate = np.array([[-2.0, -0.5, 0.0, 3.0]], np.float32)
    np.testing.assert_allclose(np.array(norm(mx.ones((1, 4)), mx.array(gate))), gate / (1 + np.exp(-gate)), rtol=1e-4)


def test_epsilon_counts_beside_small_values():
    """Of both norms, and of the norm behind a residual connection: values of the size of its root."""
    x = np.random.RandomState(0).standard_normal((2, 8)).astype(np.float32) * 0.1
    for eps in (1e-6, 0.25):
        wanted = x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)
        np.testing.assert_allclose(np.array(RMSNorm(8, eps)(mx.array(x))), wanted, rtol=1e-4)
        np.testing.assert_allclose(np.array(RMSNorm(8, eps).after(mx.array(x), mx.zeros((2, 8)))[1]), wanted, rtol=1e-4)
        gate = mx.ones((2, 8))
        half = 1 / (1 + np.exp(-1.0))
        np.testing.assert_allclose(np.array(GatedRMSNorm(8, eps)(mx.array(x), gate)), wanted * half, rtol=1e-4)
