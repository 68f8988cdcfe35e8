"""Projections as one product: equal results, one memory, names as ever, and apart again once a map has changed."""

from contextlib import nullcontext

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_qwen35.kernels.backend import on_gpu
from mlx_qwen35.layers.joined import Joined, columns, neighbours
from mlx_qwen35.layers.linear import Linear
from tests.metal_emulator import poisoned_outputs

from ..tiny_model import tiny_model

WIDTHS = [40, 8, 24, 24]


def maps(bits=(4, 4, 8, 8), mode="affine"):
    mx.random.seed(3)
    made = [Linear(64, width, bias=False) for width in WIDTHS]
    made = [linear.to_quantized(32, b, mode) if b else linear for linear, b in zip(made, bits, strict=True)]
    mx.eval([linear.parameters() for linear in made])
    return made


@pytest.mark.parametrize(
    "bits, runs",
    [((4, 4, 4, 4), [4]), ((4, 4, 8, 8), [2, 2]), ((8, 4, 4, 4), [3]), ((4, 8, 4, 8), []), ((0, 0, 0, 0), []),
     ((0, 4, 4, 0), [2])],
)  # fmt: skip
@pytest.mark.parametrize("shape", [(64,), (1, 1, 64), (2, 3, 64), (2, 5, 64)])
def test_results_have_the_bits_of_each_alone(bits, runs, shape):
    alone = maps(bits)
    x = mx.random.normal(shape)
    expected = [linear(x) for linear in alone]
    joined = Joined(alone)
    assert [len(run.widths) for run in joined.runs] == runs
    found = columns(joined(x, alone), WIDTHS)
    for ours, theirs, apart in zip(found, expected, (linear(x) for linear in alone), strict=True):
        assert mx.array_equal(ours, theirs) and mx.array_equal(apart, theirs)


@pytest.mark.parametrize("leaf, change", [("scales", mx.float16), ("biases", mx.float16), ("biases", None)])
def test_maps_in_other_dtypes_are_not_joined(leaf, change):
    """As one array they would be in the wider one."""
    alone = maps((4, 4, 4, 4))
    alone[1][leaf] = None if change is None else alone[1][leaf].astype(change)
    joined = Joined(alone)
    assert [(run.first, len(run.widths)) for run in joined.runs] == [(2, 2)]
    assert change is None or alone[1][leaf].dtype == change


def test_two_results_side_by_side():
    for bits in ((4, 4, 8, 8), (4, 8, 4, 8), (4, 4, 4, 8), (4, 8, 8, 4), (4, 8, 8, 8)):
        alone = maps(bits)
        x = mx.random.normal((1, 2, 64))
        results = Joined(alone)(x, alone)
        for first in (0, 2):
            array, column = neighbours(results[first : first + 2])
            together = mx.concatenate([alone[first](x), alone[first + 1](x)], axis=-1)
            assert mx.array_equal(array[..., column : column + together.shape[-1]], together)


def test_nothing_is_in_memory_twice():
    before = mx.get_active_memory()
    alone = maps((4, 4, 4, 4))
    apart = mx.get_active_memory() - before
    joined = Joined(alone)
    mx.eval([linear.parameters() for linear in alone])
    assert mx.get_active_memory() - before <= apart + 4096
    assert joined.runs


@pytest.mark.parametrize("leaf", ["weight", "scales", "biases"])
def test_a_changed_map_is_heeded_and_the_joined_arrays_are_let_go(leaf):
    alone = maps()
    joined = Joined(alone)
    alone[3][leaf] = alone[3][leaf] * 2
    x = mx.random.normal((1, 1, 64))
    assert mx.array_equal(columns(joined(x, alone), WIDTHS)[3], alone[3](x))
    assert [run.first for run in joined.runs] == [0]


def test_an_adapter_is_heeded():
    from mlx_lm.tuner.lora import LoRALinear

    alone = maps((4, 4, 4, 4))
    joined, x = Joined(alone), mx.random.normal((1, 1, 64))
    alone[1] = LoRALinear.from_base(alone[1])
    alone[1].lora_b = mx.random.normal(alone[1].lora_b.shape)
    assert mx.array_equal(columns(joined(x, alone), WIDTHS)[1], alone[1](x))


def quantized(kind):
    sizes = {"hidden_size": 64, "head_dim": 32, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
             "rope_parameters": {"mrope_section": [4, 2, 2]}}  # fmt: skip
    layers = ["linear_attention", "full_attention"]
    model, _ = tiny_model(kind, layer_types=layers, intermediate_size=96, moe_intermediate_size=64,
                          shared_expert_intermediate_size=64, **sizes)  # fmt: skip
    nn.quantize(model, 32, 8)
    model.eval()
    return model


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_a_joined_model_has_the_same_names_values_and_logits(kind):
    model = quantized(kind)
    tokens = mx.array([[3, 1, 4, 1, 5]])
    before, wanted = tree_flatten(model.parameters()), model(tokens)
    model.join()
    assert model.layers[0].linear_attn._joined.runs and model.layers[1].self_attn._joined.runs
    for (name, value), (old_name, old) in zip(tree_flatten(model.parameters()), before, strict=True):
        assert name == old_name and mx.array_equal(value, old)
    assert mx.array_equal(model(tokens), wanted)


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_training_reaches_every_weight(kind):
    """Gradients are those of a model that was never joined, and the next forward pass uses the updated weights."""
    model, other = tiny_model(kind)[0], tiny_model(kind)[0]
    model.join()
    tokens = mx.array([[3, 1, 4, 1, 5]])
    grads = []
    for each in (model, other):
        each.train()
        grads.append(nn.value_and_grad(each, lambda m: m(tokens).square().sum())(each)[1])  # noqa: B023
    for (name, ours), (_, theirs) in zip(*(tree_flatten(g) for g in grads), strict=True):
        np.testing.assert_allclose(np.array(ours), np.array(theirs), rtol=1e-5, atol=1e-5, err_msg=name)


def few_steps(model, tokens):
    """Logits of each token, in calls of 1, 3, 1 and 8 tokens, and all states, those on the way of the last call too."""
    cache, found, start = model.make_cache(), [], 0
    for count in (1, 3, 1, 8):
        with cache.each_step([7, 9]) if count == 8 else nullcontext() as kept:
            found.append(model(tokens[:, start : start + count], cache))
        start += count
    return mx.concatenate(found, axis=1), cache.arrays() + [array for one in kept for array in one.arrays()]


@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize("joined", [False, True])
def test_a_model_with_its_kernels_equals_the_one_without(kind, joined):
    """Everything at once, in the emulator: decode with fused delta nets, attention inputs, norms."""
    model = quantized(kind)
    tokens = mx.array([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9]])
    wanted, states = few_steps(model, tokens)
    if joined:
        model.join()
    with poisoned_outputs() as emulator:
        assert on_gpu()
        found, others = few_steps(model, tokens)
        mx.eval(found, others)
    if emulator is not None:
        names = " ".join(launch.name for launch in emulator.launches)
        assert all(kernel in names for kernel in ("delta_decode", "attention_inputs", "add_norm")), names
    np.testing.assert_allclose(np.array(found), np.array(wanted), atol=2e-3)
    for ours, theirs in zip(others, states, strict=True):
        np.testing.assert_allclose(np.array(ours), np.array(theirs), atol=2e-3)
