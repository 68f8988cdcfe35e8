"""Ternary-Bonsai: packed weights behind a rotation compute what the weights turned back do."""

import copy
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35.checkpoint.load import load_model
from mlx_qwen35.checkpoint.source import open_source
from mlx_qwen35.conversion.convert import convert
from mlx_qwen35.errors import CheckpointError
from tests.checkpoint.foreign import Written, write
from tests.checkpoints import Tensors, random_tensors, relayout, tiny_config, write_checkpoint

TOKENS = mx.array([[3, 8, 1, 60, 22, 7, 19]])
SIZES: dict[str, Any] = {
    "hidden_size": 512, "head_dim": 64, "num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 1024,
    "linear_num_value_heads": 4, "linear_value_head_dim": 128, "linear_key_head_dim": 32,
    "layer_types": ["linear_attention", "full_attention"], "full_attention_interval": 2, "mtp_num_hidden_layers": 0,
    "rope_parameters": {"mrope_section": [8, 4, 4]},
}  # fmt: skip
PACKED = ("_proj.weight", "in_proj_qkv.weight", "in_proj_z.weight", "embed_tokens.weight", "lm_head.weight")


def hadamard(size: int) -> np.ndarray:
    """Sylvester's, orthonormal."""
    found = np.ones((1, 1), np.float32)
    while len(found) < size:
        found = np.block([[found, found], [found, -found]])
    return found / np.float32(np.sqrt(size))


def publish(
    folder: Path, schema: int = 2, change: Callable[[Written, dict[str, Any]], Any] | None = None
) -> tuple[dict[str, Any], Tensors]:
    """A pack; returns the config and the values of the plain model that it stands for, under Hugging Face's names."""
    plain, tensors, *pack = made(schema)
    written, config = copy.deepcopy(pack)
    if change:
        change(written, config)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    write(folder / "model.safetensors", written, "mlx")
    return plain, tensors


@cache
def made(schema: int) -> tuple[dict[str, Any], Tensors, Written, dict[str, Any]]:
    """The plain model's config and values, the pack's tensors and config."""
    plain = tiny_config("dense", flat=schema == 1, **SIZES)
    tensors = random_tensors(plain, 4)
    rng, matrix = np.random.RandomState(5), hadamard(512)
    signs = {width: rng.choice([-1.0, 1.0], width).astype(np.float32) for width in (512, 1024)}
    written: Written = {}
    modules = []
    named = dict(zip(tensors, relayout(tensors, "mlx" if schema == 2 else "mlx-text"), strict=True))
    values = relayout(tensors, "mlx" if schema == 2 else "mlx-text")
    for name, published in named.items():
        value = tensors[name]
        if not name.endswith(PACKED):
            written[published] = "F32", values[published]
            continue
        block = 0 if name.endswith("k_proj.weight") else 512
        stem, (height, width) = published.removesuffix("weight"), value.shape
        scales = rng.uniform(0.5, 1.5, (height, width // 128)).astype(np.float16) / np.float16(np.sqrt(width))
        codes = rng.randint(0, 3, (height, width))
        turned = ((codes - 1) * scales.astype(np.float32).repeat(128, 1)).astype(np.float32)
        words = (codes.reshape(height, -1, 16).astype(np.uint64) << np.arange(0, 32, 2, dtype=np.uint64)).sum(-1)
        written |= {f"{stem}weight": ("U32", words.astype(np.uint32)), f"{stem}scales": ("F16", scales),
                    f"{stem}biases": ("F16", -scales)}  # fmt: skip
        tensors[name] = turned
        if block:
            written[f"{stem}signs"] = "F32", signs[width]
            tensors[name] = (turned.reshape(height, -1, block) @ matrix).reshape(value.shape) * signs[width]
        path = stem.removeprefix("language_model.").removesuffix(".")
        modules.append({"path": path, "block": block, "embedding": "embed" in name, "dtype": "float16"})
    namespace = {1: "mlx-lm-text", 2: "mlx-vlm-qwen3_5"}[schema]
    config = plain | {
        "model_type": "prism_hadamard_qwen35", "schema_version": schema, "tensor_namespace": namespace,
        "gdn_activation_layout": "grouped", "modules": modules,
        "quantization": {"bits": 2, "group_size": 128, "mode": "affine"},
    }  # fmt: skip
    return plain, tensors, written, config


@pytest.mark.parametrize("schema", [1, 2])
def test_logits(tmp_path: Path, schema: int) -> None:
    """For many rows and for one, which take other products."""
    plain, meant = publish(tmp_path / "a", schema)
    found, due = load_model(tmp_path / "a"), load_model(write_checkpoint(tmp_path / "b", plain, meant))
    for tokens in (TOKENS, TOKENS[:, :1]):
        assert mx.abs(found(tokens) - due(tokens)).max().item() <= 2e-3
        assert mx.abs(due(tokens)).max().item() > 0.1


def test_maps_that_share_an_input_are_joined(tmp_path: Path) -> None:
    """Their rotations are one."""
    publish(tmp_path / "a")
    layer = load_model(tmp_path / "a").layers[0]
    assert layer.mlp.gate_proj.signs is layer.mlp.up_proj.signs
    assert [len(run.widths) for run in layer.mlp._joined.runs] == [2]


@pytest.mark.parametrize("bits", [None, 4])
def test_convert(tmp_path: Path, bits: int | None) -> None:
    """Into the plain model, which every loader takes."""
    plain, meant = publish(tmp_path / "a")
    out = convert(tmp_path / "a", tmp_path / "b", bits=bits, group_size=128, recipe=bits and "uniform", dtype="float32")
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "qwen3_5" and not {"modules", "tensor_namespace"} & set(config)
    due = meant["model.language_model.layers.1.self_attn.o_proj.weight"]
    part = open_source(out).parts["layers.1.self_attn.o_proj.weight"]
    if bits is None:
        found = np.array(part.finish(part.fetch(), None))
        assert np.abs(found - due).max() <= 1e-6 * np.abs(due).max()
    difference = load_model(out)(TOKENS) - load_model(tmp_path / "a")(TOKENS)
    assert mx.abs(difference).max().item() <= (2e-3 if bits is None else 2)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w, c: c.update(schema_version=3), "schema_version 3 with tensor_namespace"),
        (lambda w, c: c.update(gdn_activation_layout="tiled"), "gdn_activation_layout 'tiled'"),
        (lambda w, c: c["quantization"].update(bits=4), "quantization .*'bits': 4"),
        (lambda w, c: c["modules"][0].update(block=256), "the module .*256"),
        (lambda w, c: c["modules"].append(c["modules"][0]), "the module"),
        (lambda w, c: c.pop("modules"), "no list of modules"),
        (lambda w, c: c["modules"].pop(), "left over"),
        (lambda w, c: w.pop("language_model.model.layers.0.mlp.up_proj.signs"), "up_proj.signs is in none of"),
        (lambda w, c: w["language_model.model.layers.0.mlp.up_proj.signs"][1].fill(0.5), "other values than -1 and 1"),
    ],
)
def test_refused(tmp_path: Path, change: Callable[[Written, dict[str, Any]], Any], message: str) -> None:
    publish(tmp_path / "a", change=change)
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path / "a")
