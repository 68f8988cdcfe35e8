"""The gated delta net layer: against NumPy, its window, its decay, its padding."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_qwen35.cache import DeltaState
from mlx_qwen35.kernels import lanes
from mlx_qwen35.layers import delta_net, linear
from mlx_qwen35.layers.delta_net import ShortConv, decay

from ..tiny_model import tiny_model

SHAPES = [
    {},
    {"linear_num_key_heads": 3, "linear_num_value_heads": 3, "linear_key_head_dim": 20, "linear_value_head_dim": 7},
    {"linear_conv_kernel_dim": 1},
    {"linear_conv_kernel_dim": 2},
    {"linear_conv_kernel_dim": 6},
]


def layer(**overrides):
    model, reference = tiny_model("dense", layer_types=["linear_attention"], **overrides)
    return model.layers[0].linear_attn, reference


def inputs(length, seed=0):
    return np.random.RandomState(seed).standard_normal((length, 64)).astype(np.float32)


@pytest.mark.parametrize("overrides", SHAPES)
@pytest.mark.parametrize("length", [1, 2, 63, 257])
def test_equals_the_reference(overrides, length):
    net, reference = layer(**overrides)
    x = inputs(length)
    wanted = reference.delta_net(x, 0)
    np.testing.assert_allclose(np.array(net(mx.array(x)[None]))[0], wanted, atol=1e-4)
    state = DeltaState()
    cuts = [0, 1, min(3, length), length]
    parts = [net(mx.array(x[a:b])[None], state) for a, b in zip(cuts, cuts[1:], strict=False) if b > a]
    np.testing.assert_allclose(np.array(mx.concatenate(parts, axis=1))[0], wanted, atol=1e-4)


@pytest.mark.parametrize("cut", [1, 3, 9])
def test_padding_leaves_no_trace(cut):
    net, reference = layer()
    x = inputs(9)
    state, present = DeltaState(), mx.arange(9)[None] >= 4
    parts = [net(mx.array(x[i : i + cut])[None], state, present[:, i : i + cut]) for i in range(0, 9, cut)]
    out = np.array(mx.concatenate(parts, axis=1))[0]
    np.testing.assert_array_equal(out[:4], 0)
    np.testing.assert_allclose(out[4:], reference.delta_net(x[4:], 0), atol=1e-4)


@pytest.mark.parametrize("length", [1, 2, 63, 257])
@pytest.mark.parametrize("kernel", [1, 2, 4, 6])
def test_convolution_is_that_of_mlx(kernel, length):
    """In float32 but for the order of the sum, which a BLAS chooses for mx.conv1d; in bfloat16 each tap is rounded."""
    rng = np.random.RandomState(length)
    for dtype, exact in ((mx.float32, True), (mx.bfloat16, False)):
        conv = ShortConv(9, kernel)
        conv.weight = mx.array(rng.standard_normal((9, kernel, 1))).astype(dtype)
        x = mx.array(rng.standard_normal((2, length, 9))).astype(dtype)
        window = mx.array(rng.standard_normal((2, kernel - 1, 9))).astype(dtype)
        y, _ = conv(x, window)
        expected = mx.conv1d(mx.concatenate([window, x], axis=1), conv.weight, groups=9)
        assert y.dtype == dtype and y.shape == x.shape
        tolerance = 2e-6 if exact else 0.1
        np.testing.assert_allclose(*(np.array(a.astype(mx.float32)) for a in (y, expected)), rtol=0, atol=tolerance)


@pytest.mark.parametrize("kernel", [1, 2, 4])
def test_window_is_the_last_inputs_and_no_more(kernel):
    conv = ShortConv(5, kernel)
    mx.eval(conv.parameters())
    before = mx.get_active_memory()
    x = mx.array(np.random.RandomState(0).standard_normal((2, 1000, 5)).astype(np.float32))
    y, window = conv(x, None)
    assert y.shape == x.shape
    np.testing.assert_array_equal(np.array(window), np.array(x)[:, 1001 - kernel :])
    del x, y
    assert mx.get_active_memory() - before < 1000  # the chunk is gone although its window lives


def test_decay_is_float32_whatever_the_weights():
    """A decay of 0.9995 is 1 in bfloat16: it must not have passed through that."""
    a, a_log, bias = (mx.array([x], mx.bfloat16) for x in (-4.0, -3.0, -0.7))
    wanted = np.exp(-np.exp(-3.0) * np.log1p(np.exp(-4.0 + float(bias.astype(mx.float32).item()))))
    got = decay(a, a_log, bias)
    assert got.dtype == mx.float32
    assert got.item() == pytest.approx(wanted, abs=1e-7) and 0.999 < got.item() < 0.9999


def test_state_is_float32_and_in_the_documented_shapes():
    net, _ = layer()
    state = DeltaState()
    net(mx.array(inputs(5))[None], state)
    assert state.conv.shape == (1, 3, 2 * 2 * 8 + 6 * 12)
    assert state.matrix.shape == (1, 6, 12, 8) and state.matrix.dtype == mx.float32


@pytest.mark.skipif(lanes.lane_count() < 2, reason="one core")
@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("key_heads, value_heads", [(2, 4), (3, 3)])
def test_heads_in_lanes_give_the_same_bits(monkeypatch, key_heads, value_heads, each):
    """Tokens one by one and several at a time, from nothing and from a state; outputs, windows and matrices."""
    sizes = {"linear_key_head_dim": 32, "linear_value_head_dim": 32}
    net, _ = layer(linear_num_key_heads=key_heads, linear_num_value_heads=value_heads, **sizes)
    nn.quantize(net, 32, 4, class_predicate=lambda _, module: hasattr(module, "to_quantized"))
    monkeypatch.setattr(delta_net, "LEAST_SHARED", 1)
    streams = []

    def noted(compute, count, **options):
        made = lanes.in_lanes(compute, count, **options)
        streams.append(len(made))
        return made

    def run():
        state, seen = DeltaState(), []
        for length in (3, 1, 1, 7):
            if each:
                state.steps = []
            out = net(mx.array(inputs(length, seed=length))[None], state)
            seen += [out, *(a for pair in state.steps or () for a in pair)]
        return [np.array(a) for a in seen + [state.conv, state.matrix]]

    monkeypatch.setattr(delta_net, "in_lanes", noted)
    shared = run()
    assert streams and min(streams) > 1
    monkeypatch.setattr(linear, "lane_count", lambda: 1)
    count = len(streams)
    alone = run()
    assert len(streams) == count
    for one, other in zip(shared, alone, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_row_that_is_all_padding_keeps_its_window_and_state():
    """Beside rows that go on: mlx-lm's batches have them where one prompt has ended and another has not."""
    net, _ = layer()
    x = mx.array(np.stack([inputs(5, seed=1), inputs(5, seed=2)]))
    state, alone = DeltaState(), DeltaState()
    net(x, state), net(x[1:], alone)
    kept = [np.array(a)[0] for a in state.arrays()]
    present = mx.array([[False] * 5, [True] * 5])
    net(x, state, present), net(x[1:], alone)
    for before, after, other in zip(kept, state.arrays(), alone.arrays(), strict=True):
        np.testing.assert_array_equal(np.array(after)[0], before)
        np.testing.assert_allclose(np.array(after)[1], np.array(other)[0], atol=1e-5)
