"""Models out of GGUF files, against the same models as Hugging Face has them: every type, every variant."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from gguf import GGUFWriter
from mlx.utils import tree_flatten

from mlx_qwen35.checkpoint.contents import read_config
from mlx_qwen35.checkpoint.gguf.container import read_gguf
from mlx_qwen35.checkpoint.gguf.opened import _kept
from mlx_qwen35.checkpoint.load import load_model
from mlx_qwen35.checkpoint.mtp import load_mtp
from mlx_qwen35.checkpoint.source import open_source
from mlx_qwen35.config import ModelConfig
from mlx_qwen35.errors import CheckpointError, Qwen35Warning
from mlx_qwen35.experts.budget import StreamPlan
from tests.checkpoint.gguf.building import config_of, finish, matrices, tiny_tokenizer, write_gguf, write_projector
from tests.checkpoints import random_tensors, tiny_config, write_checkpoint
from tests.tiny_model import some_tokens

EXACT = [
    "F32", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q3_K", "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0",
    "Q1_0", "MXFP4", "NVFP4",
]  # fmt: skip
DECODED = ["F16", "BF16", "Q6_K", "Q2_K", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"]
TOKENS = some_tokens(19, vocab=290)


def logits(path, **kwargs) -> np.ndarray:
    return np.array(load_model(path, dtype="float32", **kwargs)(mx.array([TOKENS]))[0])


def plain_weights(path) -> dict[str, np.ndarray]:
    """Every weight of a checkpoint as it counts, in float32, by our names."""
    from mlx_qwen35.checkpoint.quantize import unpack

    source, made = open_source(path), {}
    for name, part in source.parts.items():
        module, _, kind = name.rpartition(".")
        if kind in ("scales", "biases", "factors"):
            continue
        found = part.finish(part.fetch(), None)
        spec = source.specs.get(module)
        if spec:
            beside = (f"{module}.{k}" for k in ("scales", "biases", "factors"))
            parts = {n.rpartition(".")[2]: source.parts[n] for n in beside if n in source.parts}
            found = unpack({"weight": found} | {k: p.finish(p.fetch(), None) for k, p in parts.items()}, spec)
        made[name] = np.array(found.astype(mx.float32))
    return made


def same(found, wanted) -> None:
    assert found.keys() == wanted.keys()
    for name in wanted:
        if name.endswith("A_log"):
            np.testing.assert_allclose(found[name], wanted[name], rtol=1e-5, atol=1e-6)
        elif "norm" in name:
            np.testing.assert_array_max_ulp(found[name], wanted[name], 1)
        else:
            np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)


@pytest.mark.parametrize("kind", EXACT + DECODED)
def test_a_dense_model_of_every_type(tmp_path, kind):
    config = config_of("dense", mtp_num_hidden_layers=1)
    meant = write_gguf(tmp_path / "a.gguf", config, random_tensors(config), matrices(kind))
    plain = write_checkpoint(tmp_path / "plain", config, meant)
    same(plain_weights(tmp_path / "a.gguf"), plain_weights(plain))
    specs = open_source(tmp_path / "a.gguf").specs
    assert bool(specs) == (kind in EXACT[1:])
    if kind in ("Q8_0", "Q4_K", "NVFP4", "Q6_K", "IQ2_XS"):  # one of each way to compute; the weights are the same
        np.testing.assert_allclose(logits(tmp_path / "a.gguf"), logits(plain), atol=2e-3, rtol=0)


@pytest.mark.parametrize("kinds", ["Q8_0", "MXFP4", "mixed"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_model_of_experts(tmp_path, kinds, fused):
    config = config_of("moe", mtp_num_hidden_layers=1)
    kind_of = matrices(kinds)
    if kinds == "mixed":  # as Q4_K_M mixes them, and experts in what only llama.cpp computes with

        def kind_of(name):
            for word, kind in (("ffn_down_exps", "IQ3_S"), ("_exps", "Q4_K"), ("ffn_down", "Q6_K"), ("attn_v", "Q6_K")):
                if word in name:
                    return kind
            return matrices("Q4_K")(name)

    meant = write_gguf(tmp_path / "a.gguf", config, random_tensors(config), kind_of, fused=fused)
    plain = write_checkpoint(tmp_path / "plain", config, meant)
    same(plain_weights(tmp_path / "a.gguf"), plain_weights(plain))
    np.testing.assert_allclose(logits(tmp_path / "a.gguf"), logits(plain), atol=2e-3, rtol=0)


@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize("fused", [False, True])
def test_odd_sizes_and_as_many_key_heads(tmp_path, kind, fused):
    """No size of these is a multiple of 32, values of a head are wider than keys; and once no head is permuted."""
    for number, sizes in enumerate(({}, {"linear_num_value_heads": 2}, {"layer_types": ["full_attention"] * 2})):
        config = tiny_config(kind, mtp_num_hidden_layers=1, **sizes)
        path = tmp_path / f"{number}.gguf"
        meant = write_gguf(path, config, random_tensors(config), lambda name: "F32", fused=fused)
        plain = write_checkpoint(tmp_path / f"plain{number}", config, meant)
        same(plain_weights(path), plain_weights(plain))
        tokens = mx.array([some_tokens(17)])
        found, wanted = (np.array(load_model(place, dtype="float32")(tokens)) for place in (path, plain))
        np.testing.assert_allclose(found, wanted, atol=2e-4, rtol=0)


def test_columns_of_narrow_value_heads_are_not_packed(tmp_path):
    """Runs of 48 columns are no whole groups of 32: the one matrix is decoded, and all others are packed."""
    config = config_of("dense", linear_value_head_dim=48, linear_num_value_heads=16, linear_num_key_heads=4)
    meant = write_gguf(tmp_path / "a.gguf", config, random_tensors(config), matrices("Q8_0"))
    plain = write_checkpoint(tmp_path / "plain", config, meant)
    same(plain_weights(tmp_path / "a.gguf"), plain_weights(plain))
    specs = open_source(tmp_path / "a.gguf").specs
    assert "layers.0.linear_attn.out_proj" not in specs and "layers.0.linear_attn.in_proj_qkv" in specs


def test_an_nvfp4_file_with_factors(tmp_path):
    """NVFP4 out of ModelOpt: one factor a tensor, or one an expert, and what activations are scaled by."""
    config = config_of("moe")
    factors = {}

    def more(writer):
        for name, shape in (("blk.0.ffn_up_exps", 5), ("blk.1.attn_q", 1)):
            factors[name] = (0.5 + np.arange(shape)).astype(np.float32)
            writer.add_tensor(f"{name}.scale", factors[name])
            writer.add_tensor(f"{name}.input_scale", factors[name] * 3)

    meant = write_gguf(tmp_path / "a.gguf", config, random_tensors(config), matrices("NVFP4"), more=more)
    up = meant["model.language_model.layers.0.mlp.experts.gate_up_proj"]
    up[:, 512:] *= factors["blk.0.ffn_up_exps"][:, None, None]
    meant["model.language_model.layers.1.self_attn.q_proj.weight"] *= factors["blk.1.attn_q"]
    plain = write_checkpoint(tmp_path / "plain", config, meant)
    same(plain_weights(tmp_path / "a.gguf"), plain_weights(plain))
    specs = open_source(tmp_path / "a.gguf").specs
    assert specs["layers.0.mlp.experts.up_proj"].mode == specs["layers.1.self_attn.q_proj"].mode == "nvfp4"
    np.testing.assert_allclose(logits(tmp_path / "a.gguf"), logits(plain), atol=2e-3, rtol=0)
    stream = StreamPlan(slots=(3, 3), group=2, chunk=64, tile=64, cache_limit=1 << 24, memory=1 << 30)
    np.testing.assert_array_equal(logits(tmp_path / "a.gguf", stream=stream), logits(tmp_path / "a.gguf"))


def test_files_of_a_split_model(tmp_path):
    config = config_of("moe")
    meant = write_gguf(tmp_path / "a.gguf", config, random_tensors(config), matrices("Q4_0"), split=7)
    first = tmp_path / "a-00001-of-00006.gguf"
    assert first.exists() and not (tmp_path / "a.gguf").exists()
    plain = plain_weights(write_checkpoint(tmp_path / "plain", config, meant))
    for path in (first, tmp_path / "a-00003-of-00006.gguf", tmp_path):
        same(plain_weights(path), plain)


def test_yarn_and_what_config_json_says(tmp_path):
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024, "mrope_section": [8, 4, 4]}
    config = config_of("moe", rope_parameters=yarn, rms_norm_eps=1e-5, mtp_num_hidden_layers=1)
    write_gguf(tmp_path / "a.gguf", config, random_tensors(config), tokenizer=tiny_tokenizer())
    found = read_config(tmp_path / "a.gguf")
    wanted = ModelConfig.from_dict(config)
    assert replace(found.text) == wanted.text
    assert found.raw["text_config"]["rms_norm_eps"] == 1e-5
    ids = {name: found.raw[name] for name in ("image_token_id", "vision_start_token_id", "vision_end_token_id")}
    tokens = tiny_tokenizer()["added_tokens"]
    assert ids["image_token_id"] == next(t["id"] for t in tokens if t["content"] == "<|image_pad|>")


@pytest.mark.parametrize("apart", [False, True])
def test_the_mtp_head(tmp_path, apart):
    """Inside the file, or in one of its own beside it."""
    config = config_of("dense", mtp_num_hidden_layers=1)
    tensors = random_tensors(config)
    path = tmp_path / "a.gguf"
    meant = write_gguf(path, config, tensors, matrices("Q8_0"), head=not apart)
    if apart:
        assert read_config(path).text.mtp_num_hidden_layers == 0
        whole = write_gguf(tmp_path / "whole.gguf", config, tensors, matrices("Q8_0"))
        meant |= {name: value for name, value in whole.items() if name.startswith("mtp.")}
        (tmp_path / "whole.gguf").rename(tmp_path / "mtp-a.gguf")
    plain = write_checkpoint(tmp_path / "plain", config, meant)
    config = read_config(path)
    assert config.text.mtp_num_hidden_layers == 1
    found, wanted = (load_mtp(place, read_config(place), dtype="float32") for place in (path, plain))
    hidden = mx.random.normal((1, 5, 256), key=mx.random.key(0))
    embedded = mx.random.normal((1, 5, 256), key=mx.random.key(1))
    results = [head.fc(mx.concatenate([hidden, embedded], axis=-1)) for head in (found, wanted)]
    np.testing.assert_allclose(np.array(results[0]), np.array(results[1]), atol=1e-4)
    names = dict(tree_flatten(wanted.parameters()))
    assert {name for name, _ in tree_flatten(found.parameters())} >= set(names)


def test_a_head_that_is_announced_and_not_there(tmp_path):
    config = config_of("dense", mtp_num_hidden_layers=1)

    def more(writer):
        writer.kv_data[0]["qwen35.block_count"].value = 3
        writer.add_uint32("qwen35.nextn_predict_layers", 1)

    write_gguf(tmp_path / "a.gguf", config, random_tensors(config), head=False, more=more)
    found = read_config(tmp_path / "a.gguf")
    assert (found.text.num_hidden_layers, found.text.mtp_num_hidden_layers) == (2, 0)
    load_model(tmp_path / "a.gguf")


@pytest.mark.parametrize("kind", ["F32", "F16"])
def test_the_vision_tower_beside(tmp_path, kind):
    config = config_of("dense")
    config["vision_config"] = tiny_config("dense", vision=True, hidden_size=256)["vision_config"]
    tensors = random_tensors(config)
    meant = write_gguf(tmp_path / "a.gguf", config, tensors, tokenizer=tiny_tokenizer())
    meant |= write_projector(tmp_path / "mmproj-F16.gguf", config, tensors, kind)
    plain = write_checkpoint(tmp_path / "plain", config, meant)
    same(plain_weights(tmp_path / "a.gguf"), plain_weights(plain))
    assert read_config(tmp_path / "a.gguf").vision == ModelConfig.from_dict(config).vision
    write_projector(tmp_path / "mmproj-BF16.gguf", config, tensors, "BF16")
    entries = open_source(tmp_path / "a.gguf").files.entries
    assert entries["vision_tower.merger.linear_fc1.weight"].file.name == "mmproj-BF16.gguf"
    with pytest.raises(CheckpointError, match="vision tower by itself"):
        open_source(tmp_path / "mmproj-BF16.gguf")


def test_the_vision_tower_of_another_model_is_left_alone(tmp_path):
    config = config_of("dense")
    other = tiny_config("dense", vision=True, hidden_size=128)
    write_gguf(tmp_path / "a.gguf", config, random_tensors(config))
    write_projector(tmp_path / "mmproj.gguf", other, random_tensors(other))
    with pytest.warns(Qwen35Warning, match="vision tower of another model"):
        assert load_model(tmp_path / "a.gguf").config.vision is None


def test_what_is_refused(tmp_path):
    config = config_of("dense")
    tensors = random_tensors(config)
    for said, more in (
        ("activations are rotated", lambda writer: writer.add_bool("prism.hadamard.enabled", True)),
        ("importance matrix", lambda writer: writer.add_string("general.type", "imatrix")),
        ("Ollama", lambda writer: writer.add_tensor("v.patch_embed.weight", np.zeros((2, 2), np.float32))),
        ("Qwen3-Next", lambda writer: writer.add_tensor("blk.0.ssm_in.weight", np.zeros((2, 2), np.float32))),
        ("left over", lambda writer: writer.add_tensor("blk.0.attn_sinks.weight", np.zeros(2, np.float32))),
    ):
        write_gguf(tmp_path / "a.gguf", config, tensors, more=more)
        with pytest.raises(CheckpointError, match=said) as error:
            open_source(tmp_path / "a.gguf")
        assert "a.gguf" in str(error.value)
        _kept.cache_clear()
    for arch, said in (("qwen3next", "Qwen3-Next"), ("llama", "of another family")):
        writer = GGUFWriter(tmp_path / "a.gguf", arch)
        finish(writer)
        _kept.cache_clear()
        with pytest.raises(CheckpointError, match=said):
            read_config(tmp_path / "a.gguf")


def test_a_scale_that_is_no_number_is_named(tmp_path):
    config = config_of("dense")
    for kind, at in (("Q4_K", 0), ("Q8_0", 0), ("Q6_K", 208), ("IQ3_S", 0)):
        path = tmp_path / f"{kind}.gguf"
        write_gguf(path, config, random_tensors(config), matrices(kind))
        tensor = read_gguf(path).tensors["blk.0.ffn_up.weight"]
        data = bytearray(path.read_bytes())
        data[tensor.offset + at : tensor.offset + at + 2] = b"\x00\x7c"
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match="blk.0.ffn_up.weight.*NaN or infinite"):
            load_model(path)
