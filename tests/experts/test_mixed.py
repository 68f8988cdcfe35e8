"""Layers of experts through their kernels: the model that the reference computes, and streamed the same bits."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35 import load, stream_generate
from mlx_qwen35.checkpoint.load import load_model
from mlx_qwen35.conversion.convert import convert
from mlx_qwen35.experts.budget import StreamPlan
from mlx_qwen35.layers.moe import MIX_UP_TO
from mlx_qwen35.sampling import Sampling

from ..checkpoints import random_tensors, tiny_config, write_checkpoint
from ..metal_emulator import poisoned_outputs
from ..tiny_model import tiny_model

LAYERS, CHOSEN = 4, 3
SIZES = {
    "num_experts": 12, "num_experts_per_tok": CHOSEN, "moe_intermediate_size": 32, "hidden_size": 64,
    "shared_expert_intermediate_size": 96, "num_hidden_layers": LAYERS,
}  # fmt: skip
FORMS = {"plain": None, "affine5": {"bits": 5, "group_size": 32}, "mxfp4": {"mode": "mxfp4"}}
PLAN = StreamPlan(slots=(5,) * LAYERS, group=2, chunk=64, tile=64, cache_limit=1 << 24, memory=1 << 30)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    config = tiny_config("moe", **SIZES)
    plain = tmp_path_factory.mktemp("plain")
    write_checkpoint(plain, config, random_tensors(config), layout="hf", dtype="float32")
    made = {"plain": plain}
    for name, options in FORMS.items():
        if options is not None:
            made[name] = tmp_path_factory.mktemp(name) / "converted"
            convert(plain, made[name], recipe="uniform", **options)
    return made


def steps(model, pieces):
    """Logits of a prompt in pieces of these lengths."""
    cache, tokens = model.make_cache(), iter(np.random.RandomState(1).randint(0, 80, sum(pieces)).tolist())
    return np.concatenate([np.array(model(mx.array([[next(tokens) for _ in range(n)]]), cache)[0]) for n in pieces])


def names(emulator):
    """The kernels of experts that were launched, by name."""
    found = [launch.name.removeprefix("custom_kernel_").split("__")[0] for launch in emulator.launches]
    return [name for name in found if name.startswith(("router", "expert"))]


@pytest.mark.parametrize("form", FORMS)
def test_the_model_is_the_same(folders, form):
    pieces = [1, 2, 1, MIX_UP_TO]
    model = load_model(folders[form])
    expected = steps(model, pieces)
    streamed = load_model(folders[form], stream=PLAN)
    with poisoned_outputs() as emulator:
        resident = steps(model, pieces)
        if emulator is not None:
            made = names(emulator)
            assert len(made) == 3 * LAYERS * len(pieces)
            assert made[:3] == ["router", "expert_gate_up", "expert_down"]
        np.testing.assert_array_equal(steps(streamed, pieces), resident)
    streamed.unload()
    np.testing.assert_allclose(resident, expected, atol=3e-4)


def test_many_rows_only_choose_by_kernel():
    model, _ = tiny_model("moe", layer_types=["full_attention"])
    layer, x = model.layers[0].mlp.eval(), mx.random.normal((1, MIX_UP_TO + 1, 64))
    expected = layer(x)
    with poisoned_outputs() as emulator:
        found = layer(x)
        assert emulator is None or names(emulator) == ["router"]
        np.testing.assert_allclose(np.array(found), np.array(expected), atol=1e-5)


def test_gradients_take_the_reference():
    model, _ = tiny_model("moe", layer_types=["full_attention"])
    layer, x = model.layers[0].mlp.train(), mx.random.normal((1, 2, 64))

    def loss(x):
        return layer(x).square().sum()

    expected = mx.grad(loss)(x)
    with poisoned_outputs() as emulator:
        found = mx.grad(loss)(x)
        assert emulator is None or not names(emulator)
        np.testing.assert_allclose(np.array(found), np.array(expected), rtol=1e-4, atol=1e-5)


def test_forms_that_kernels_do_not_read_take_the_reference(folders, tmp_path):
    convert(folders["plain"], tmp_path / "converted", recipe="uniform", mode="nvfp4")
    model = load_model(tmp_path / "converted")
    expected = steps(model, [1])
    with poisoned_outputs() as emulator:
        found = steps(model, [1])
        assert emulator is None or set(names(emulator)) == {"router"}
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_the_demo_answers_the_same():
    model, processor = load()

    def answer():
        how = {"max_tokens": 5, "sampling": Sampling(temperature=0), "lookup": False}  # which would take one step
        parts = stream_generate(model, processor, "What is 17 + 25?", **how)
        return [part.token for part in parts]

    expected = answer()
    with poisoned_outputs() as emulator:
        assert answer() == expected
        assert emulator is None or names(emulator).count("expert_down") >= 4 * len(model.layers)
