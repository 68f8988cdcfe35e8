"""Router and experts: against NumPy, sorted or not, quantized or not."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import mlx_qwen35.experts.resident as resident
from mlx_qwen35.experts.linear import QuantizedExpertLinear
from mlx_qwen35.experts.resident import ResidentExperts
from mlx_qwen35.kernels import lanes
from mlx_qwen35.kernels.router import route
from mlx_qwen35.layers import linear
from mlx_qwen35.layers.mlp import MLP

from ..tiny_model import tiny_model


@pytest.mark.parametrize("chosen", [1, 3, 8])
@pytest.mark.parametrize("length", [1, 2, 63, 257])
def test_layer_equals_the_reference(length, chosen):
    model, reference = tiny_model("moe", layer_types=["full_attention"], num_experts_per_tok=chosen)
    x = np.random.RandomState(0).standard_normal((length, 64)).astype(np.float32)
    out = model.layers[0].mlp(mx.array(x)[None])
    np.testing.assert_allclose(np.array(out)[0], reference.feed_forward(x, 0), atol=1e-4)


def test_dense_layer_equals_the_reference():
    model, reference = tiny_model("dense", layer_types=["full_attention"])
    x = np.random.RandomState(0).standard_normal((63, 64)).astype(np.float32)
    np.testing.assert_allclose(np.array(model.layers[0].mlp(mx.array(x))), reference.feed_forward(x, 0), atol=1e-4)


def test_weights_add_up_to_one_and_are_the_largest():
    logits = np.random.RandomState(0).standard_normal((50, 11)).astype(np.float32) * 3
    expert_ids, weights = route(mx.array(logits), 4)
    for row, ids, shares in zip(logits, np.array(expert_ids), np.array(weights), strict=True):
        assert set(ids) == set(np.argsort(row)[-4:])
        np.testing.assert_allclose(shares, np.exp(row[ids]) / np.exp(row[ids]).sum(), rtol=1e-5)


def test_routing_is_decided_in_float32():
    """Logits that differ in bfloat16 may have probabilities that do not: the better one is chosen all the same."""
    logits = mx.array([[0.25, 0.25, 0.251953125, 0.25]], mx.bfloat16)
    assert len(set(mx.softmax(logits.astype(mx.float32), axis=-1).astype(mx.bfloat16).tolist()[0])) == 1
    expert_ids, weights = route(logits, 1)
    assert expert_ids.item() == 2 and weights.dtype == mx.bfloat16


@pytest.mark.parametrize("trains", [False, True])  # which on the CPU decides how sorted rows are multiplied
@pytest.mark.parametrize("rows", [1, 2, 21, 22, 63])
def test_sorting_by_expert_changes_nothing(rows, trains, monkeypatch):
    experts = ResidentExperts(7, 24, 10).train(trains)
    rng = np.random.RandomState(rows)
    x = mx.array(rng.standard_normal((rows, 24)).astype(np.float32))
    ids = mx.array(np.stack([rng.permutation(7)[:3] for _ in range(rows)]))
    weights = mx.array(rng.uniform(size=(rows, 3)).astype(np.float32))
    results = []
    for limit in (1, 10**9):
        monkeypatch.setattr(resident, "SORT_FROM", limit)
        results.append(np.array(experts(x, ids, weights)))
    np.testing.assert_allclose(*results, atol=1e-6)


@pytest.mark.parametrize(
    "mode, bits, group_size",
    [("affine", 4, 32), ("affine", 8, 64), ("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)],
)
@pytest.mark.parametrize("rows, trains", [(2, False), (40, False), (40, True)])
def test_quantized_experts_compute_with_the_dequantized_weights(mode, bits, group_size, rows, trains):
    experts = ResidentExperts(5, 64, 128).train(trains)
    nn.quantize(experts, group_size, bits, mode=mode)
    plain = ResidentExperts(5, 64, 128)
    for name in ("gate_proj", "up_proj", "down_proj"):
        packed = experts[name]
        assert isinstance(packed, QuantizedExpertLinear) and packed.weight.dtype == mx.uint32
        assert ("biases" in packed) == (mode == "affine")
        plain[name].weight = mx.dequantize(
            packed.weight, packed.scales, packed.get("biases"), group_size, bits, mode, dtype=mx.float32
        )
    rng = np.random.RandomState(0)
    x = mx.array(rng.standard_normal((rows, 64)).astype(np.float32))
    ids = mx.array(rng.randint(0, 5, (rows, 2)))
    weights = mx.full((rows, 2), 0.5)
    np.testing.assert_allclose(np.array(experts(x, ids, weights)), np.array(plain(x, ids, weights)), atol=1e-4)


def test_one_predicate_reaches_every_module():
    sizes = {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
    model, _ = tiny_model("moe", layer_types=["full_attention"], **sizes)
    reached = set()

    def predicate(path, module):
        if hasattr(module, "to_quantized"):
            reached.add(path)
        return hasattr(module, "to_quantized")

    nn.quantize(model, 32, 8, class_predicate=predicate)
    assert {f"layers.0.mlp.experts.{p}_proj" for p in ("gate", "up", "down")} <= reached
    assert {"embed_tokens", "lm_head", "layers.0.mlp.gate", "layers.0.self_attn.q_proj"} <= reached
    assert np.isfinite(np.array(model(mx.array([[1, 2, 3]])))).all()


@pytest.mark.skipif(lanes.lane_count() < 2, reason="one core")
@pytest.mark.parametrize("shape", [(1, 1, 64), (1, 5, 64)])
def test_a_dense_layer_in_lanes_has_the_same_bits(shape, monkeypatch):
    layer = MLP(64, 96)
    nn.quantize(layer, 32, 4)
    mx.eval(layer.parameters())
    x = mx.random.normal(shape)
    monkeypatch.setattr(linear, "LEAST_SHARED", 1)
    shared = layer(x)
    monkeypatch.setattr(linear, "lane_count", lambda: 1)
    assert mx.array_equal(shared, layer(x))
