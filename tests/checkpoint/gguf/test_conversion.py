"""GGUF into MLX folders: what goes over as it is, what is packed anew, and what lies beside the weights."""

import json

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35.checkpoint.load import load_model
from mlx_qwen35.checkpoint.source import open_source
from mlx_qwen35.conversion.convert import convert
from mlx_qwen35.processor import Processor
from tests.checkpoint.gguf.building import config_of, matrices, tiny_tokenizer, write_gguf, write_projector
from tests.checkpoint.gguf.test_load import logits, plain_weights, same
from tests.checkpoints import random_tensors, tiny_config, write_checkpoint


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_unquantized_is_the_dequantized_model(tmp_path, kind):
    config = config_of(kind, mtp_num_hidden_layers=1)
    kinds = matrices("Q6_K")
    meant = write_gguf(tmp_path / "a.gguf", config, random_tensors(config), kinds, tokenizer=tiny_tokenizer())
    plain = write_checkpoint(tmp_path / "plain", config, meant)
    convert(tmp_path / "a.gguf", tmp_path / "mlx", bits=None, dtype="float32", verify=True)
    same(plain_weights(tmp_path / "mlx"), plain_weights(plain))
    np.testing.assert_allclose(logits(tmp_path / "mlx"), logits(plain), atol=2e-3, rtol=0)


@pytest.mark.parametrize("kind", ["Q4_K", "IQ4_XS", "MXFP4"])
def test_four_bits_of_a_model_of_experts(tmp_path, kind):
    """Q4_K goes over with its own groups and scales; what is no 4-bit grid of MLX's is packed from its exact values."""
    config = config_of("moe")
    tensors = random_tensors(config)
    meant = write_gguf(tmp_path / "a.gguf", config, tensors, matrices(kind), tokenizer=tiny_tokenizer())
    plain = write_checkpoint(tmp_path / "plain", config, meant)
    recipe = None if kind == "Q4_K" else "uniform"
    for place in ("a.gguf", "plain"):
        how = {"bits": 4, "group_size": 32, "recipe": recipe, "dtype": "float32"}
        convert(tmp_path / place, tmp_path / f"of-{place[0]}", **how)
    specs = open_source(tmp_path / "of-a").specs
    assert specs.keys() == open_source(tmp_path / "of-p").specs.keys()
    found = plain_weights(tmp_path / "of-a")
    if kind == "Q4_K":
        carried, wanted = (  # the routers were F32
            {name: value for name, value in weights.items() if not name.endswith("gate.weight")}
            for weights in (found, plain_weights(plain))
        )
        same(carried, wanted)
        return
    wanted = plain_weights(tmp_path / "of-p")
    small = [name for name in wanted if (spec := specs.get(name.removesuffix(".weight"))) and spec.bits == 4]
    assert len(small) > 10
    for name in small:
        np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)


def test_the_default_recipe_keeps_what_is_four_bits_already(tmp_path):
    config = config_of("dense", mtp_num_hidden_layers=1)
    write_gguf(tmp_path / "a.gguf", config, random_tensors(config), matrices("Q4_K"), tokenizer=tiny_tokenizer())
    convert(tmp_path / "a.gguf", tmp_path / "mlx", bits=4)
    written = json.loads((tmp_path / "mlx/config.json").read_text())
    source = open_source(tmp_path / "mlx")
    assert source.specs["layers.0.mlp.up_proj"].group_size == 32
    assert written["text_config"]["num_hidden_layers"] == 2 and written["model_type"] == "qwen3_5"
    before, after = (plain_weights(tmp_path / place) for place in ("a.gguf", "mlx"))
    name = "layers.0.mlp.up_proj.weight"
    np.testing.assert_allclose(after[name], before[name], rtol=0, atol=float(np.abs(before[name]).max()) * 2e-2)


def test_small_files_and_the_tower_go_along(tmp_path):
    config = config_of("dense", mtp_num_hidden_layers=1)
    config["vision_config"] = tiny_config("dense", vision=True, hidden_size=256)["vision_config"]
    tensors = random_tensors(config)
    write_gguf(tmp_path / "a.gguf", config, tensors, matrices("Q8_0"), tokenizer=tiny_tokenizer())
    write_projector(tmp_path / "mmproj.gguf", config, tensors)
    folder = convert(tmp_path / "a.gguf", tmp_path / "mlx", bits=8, group_size=32)
    names = {path.name for path in folder.iterdir()}
    assert names >= {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json",
                     "preprocessor_config.json", "video_preprocessor_config.json", "config.json"}  # fmt: skip
    model = load_model(folder)
    processor = Processor.from_folder(folder, open_source(folder).config)
    assert processor.media_limits is not None and model.config.vision is not None
    assert processor.decode(processor.encode("Hello, it's 12")) == "Hello, it's 12"
    assert mx.all(mx.isfinite(model(mx.array([processor.encode("hello")])))).item()
