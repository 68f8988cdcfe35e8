"""Adapters of PEFT and mlx-vlm: put on a model or merged by a conversion, they compute what PEFT's formulas say."""

import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35.checkpoint.adapters import fuse, load_adapter
from mlx_qwen35.checkpoint.load import load_model
from mlx_qwen35.conversion.convert import convert
from mlx_qwen35.errors import CheckpointError
from tests.checkpoint.published import FORMS, write
from tests.checkpoints import Tensors, random_tensors, tiny_config, write_checkpoint

TOKENS = mx.array([[3, 8, 1, 60, 22, 7, 19]])
ROOT, LAYER = "base_model.model.", "model.language_model.layers.1."
SIZES: dict[str, Any] = {
    "hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32,
    "rope_parameters": {"mrope_section": [4, 2, 2]},
    "layer_types": ["linear_attention", "full_attention"], "full_attention_interval": 2, "mtp_num_hidden_layers": 0,
    "tie_word_embeddings": False,
}  # fmt: skip
FFN = {"dense": {"intermediate_size": 96},
       "moe": {"moe_intermediate_size": 48, "shared_expert_intermediate_size": 32, "num_experts": 4}}  # fmt: skip


def model(folder: Path, kind: str) -> tuple[dict[str, Any], Tensors]:
    config = tiny_config(kind, **SIZES | FFN[kind])
    tensors = random_tensors(config, 6)
    write_checkpoint(folder, config, tensors)
    return config, tensors


def matrix(rng: np.random.RandomState, *shape: int) -> np.ndarray:
    return (rng.standard_normal(shape) * 0.3).astype(np.float32)


def save(folder: Path, config: dict[str, Any], tensors: Tensors) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 6} | config))
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), {name: mx.array(v) for name, v in tensors.items()})
    return folder


def check(tmp_path: Path, config: dict[str, Any], merged: Tensors, adapter: Path) -> None:
    """Logits with the adapter on the model, and of a conversion with it, are those of the merged weights."""
    due = load_model(write_checkpoint(tmp_path / "merged", config, merged))(TOKENS)
    plain = load_model(tmp_path / "model")
    before = plain(TOKENS)
    found = load_adapter(plain, adapter)(TOKENS)
    converted = load_model(convert(tmp_path / "model", tmp_path / "out", bits=None, adapter_path=adapter))(TOKENS)
    assert mx.abs(found - due).max().item() <= 2e-3 and mx.abs(converted - due).max().item() <= 2e-3
    assert mx.abs(due - before).max().item() > 0.05


@pytest.mark.parametrize("rslora", [False, True])
def test_ranks_and_scales_of_single_modules(tmp_path: Path, rslora: bool) -> None:
    config, tensors = model(tmp_path / "model", "dense")
    rng, merged, files = np.random.RandomState(1), dict(tensors), {}
    for path, rank, alpha in (("self_attn.q_proj", 4, 6), ("mlp.down_proj", 2, 6), ("mlp.up_proj", 4, 3)):
        out, inner = tensors[f"{LAYER}{path}.weight"].shape
        a, b = matrix(rng, rank, inner), matrix(rng, out, rank)
        files |= {f"{ROOT}{LAYER}{path}.lora_A.weight": a, f"{ROOT}{LAYER}{path}.lora_B.weight": b}
        scale = alpha / (math.sqrt(rank) if rslora else rank)
        merged[f"{LAYER}{path}.weight"] = tensors[f"{LAYER}{path}.weight"] + scale * b @ a
    told = {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {r".*\.up_proj": 3}, "use_rslora": rslora}
    check(tmp_path, config, merged, save(tmp_path / "adapter", told, files))


@pytest.mark.parametrize("below", [False, True], ids=["", "with the embeddings below"])
def test_dora_embedding_and_whole_modules(tmp_path: Path, below: bool) -> None:
    """below: PEFT saves the embeddings that an adapter is on, which were those of the model, or others."""
    config, tensors = model(tmp_path / "model", "dense")
    rng, merged, files = np.random.RandomState(2), dict(tensors), {}
    name = f"{LAYER}self_attn.v_proj"
    a, b = matrix(rng, 4, 64), matrix(rng, len(tensors[f"{name}.weight"]), 4)
    whole = tensors[f"{name}.weight"] + 1.5 * b @ a
    lengths = np.linalg.norm(whole, axis=1) * rng.uniform(0.5, 1.5, len(whole)).astype(np.float32)
    merged[f"{name}.weight"] = lengths[:, None] / np.linalg.norm(whole, axis=1, keepdims=True) * whole
    files = {f"{ROOT}{name}.lora_A.weight": a, f"{ROOT}{name}.lora_B.weight": b,
             f"{ROOT}{name}.lora_magnitude_vector": lengths}  # fmt: skip
    embedding = "model.language_model.embed_tokens"
    a, b = matrix(rng, 4, len(tensors[f"{embedding}.weight"])), matrix(rng, 64, 4)
    files |= {f"{ROOT}{embedding}.lora_embedding_A": a, f"{ROOT}{embedding}.lora_embedding_B": b}
    base = tensors[f"{embedding}.weight"]
    if below:
        base = files[f"{ROOT}{embedding}.base_layer.weight"] = base + matrix(rng, *base.shape)
    merged[f"{embedding}.weight"] = base + 1.5 * (b @ a).T
    for saved in ("lm_head", "model.language_model.norm"):
        merged[f"{saved}.weight"] = matrix(rng, *tensors[f"{saved}.weight"].shape)
        files[f"{ROOT}{saved}.weight"] = merged[f"{saved}.weight"]
    told = {"use_dora": True, "modules_to_save": ["lm_head", "norm"]}
    check(tmp_path, config, merged, save(tmp_path / "adapter", told, files))


@pytest.mark.parametrize("turned", [False, True], ids=["in is in", "in is out"])
def test_tensors_of_all_experts(tmp_path: Path, turned: bool) -> None:
    """target_parameters, in both orders that PEFT has had; one adapter lies inside the other."""
    config, tensors = model(tmp_path / "model", "moe")
    rng, merged, files = np.random.RandomState(3), dict(tensors), {}
    for nested, kind in (("", "gate_up_proj"), (".base_layer", "down_proj")):
        name = f"{LAYER}mlp.experts.{kind}"
        count, out, inner = tensors[name].shape
        sizes = (inner, out) if turned else (out, inner)
        a, b = matrix(rng, count * 4, sizes[1]), matrix(rng, sizes[0], 4 * count)
        each = np.einsum("ore,eri->eoi", b.reshape(sizes[0], 4, count), a.reshape(count, 4, sizes[1]))
        merged[name] = tensors[name] + 1.5 * (each.swapaxes(1, 2) if turned else each)
        stem = f"{ROOT}{LAYER}mlp.experts{nested}"
        files |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
    check(tmp_path, config, merged, save(tmp_path / "adapter", {}, files))


def test_single_experts(tmp_path: Path) -> None:
    """Where each expert is a module of its own."""
    config, tensors = model(tmp_path / "model", "moe")
    rng, merged, files = np.random.RandomState(4), dict(tensors), {}
    name = f"{LAYER}mlp.experts.down_proj"
    merged[name] = tensors[name].copy()
    for expert in range(4):
        a, b = matrix(rng, 4, 48), matrix(rng, 64, 4)
        stem = f"{ROOT}{LAYER}mlp.experts.{expert}.down_proj"
        files |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
        merged[name][expert] += 1.5 * b @ a
    check(tmp_path, config, merged, save(tmp_path / "adapter", {}, files))


@pytest.mark.parametrize("older", [False, True])
def test_mlx_vlm(tmp_path: Path, older: bool) -> None:
    """Its older files have A, B and alpha; its newer ones are as mlx-lm's, in weights.safetensors too."""
    config, tensors = model(tmp_path / "model", "dense")
    rng, merged = np.random.RandomState(5), dict(tensors)
    a, b = matrix(rng, 64, 3), matrix(rng, 3, len(tensors[f"{LAYER}self_attn.q_proj.weight"]))
    merged[f"{LAYER}self_attn.q_proj.weight"] = tensors[f"{LAYER}self_attn.q_proj.weight"] + 2 * (a @ b).T
    (tmp_path / "adapter").mkdir()
    told = {"rank": 3, "alpha": 6, "dropout": 0.0} if older else {"fine_tune_type": "lora", "num_layers": -1,
            "lora_parameters": {"rank": 3, "scale": 2.0, "dropout": 0.0, "keys": []}}  # fmt: skip
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(told))
    stem = "language_model.model.layers.1.self_attn.q_proj."
    named = dict(zip(("A", "B") if older else ("lora_a", "lora_b"), (a, b), strict=True))
    file = "adapters.safetensors" if older else "weights.safetensors"
    mx.save_safetensors(str(tmp_path / "adapter" / file), {stem + leaf: mx.array(v) for leaf, v in named.items()})
    check(tmp_path, config, merged, tmp_path / "adapter")


@pytest.mark.parametrize("form", ["modelopt nvfp4", "compressed fp8, a scale a row"])
def test_on_weights_with_factors(tmp_path: Path, form: str) -> None:
    """LoRA goes beside them; what would have to look into them, DoRA and fuse(), is refused."""
    published = write(tmp_path / "model", FORMS[form], "dense")
    name = f"{LAYER}mlp.down_proj"
    out, inner = published[f"{name}.weight"].shape
    rng = np.random.RandomState(6)
    leaves = {"lora_A.weight": matrix(rng, 4, inner), "lora_B.weight": matrix(rng, out, 4)}
    adapter = save(tmp_path / "lora", {}, {f"{ROOT}{name}.{leaf}": value for leaf, value in leaves.items()})
    config = json.loads((tmp_path / "model/config.json").read_text())
    del config["quantization_config"]
    merged = dict(published)
    merged[f"{name}.weight"] = merged[f"{name}.weight"] + 1.5 * leaves["lora_B.weight"] @ leaves["lora_A.weight"]
    due = load_model(write_checkpoint(tmp_path / "merged", config, merged))(TOKENS)
    adapted = load_adapter(load_model(tmp_path / "model"), adapter)
    assert mx.abs(adapted(TOKENS) - due).max().item() <= 2e-3
    with pytest.raises(CheckpointError, match="cannot pack a merged weight"):
        fuse(adapted)
    leaves["lora_magnitude_vector"] = np.ones(out, np.float32)
    adapter = save(tmp_path / "dora", {}, {f"{ROOT}{name}.{leaf}": value for leaf, value in leaves.items()})
    with pytest.raises(CheckpointError, match="DoRA is not computed with"):
        load_adapter(load_model(tmp_path / "model"), adapter)


@pytest.mark.parametrize(
    "told, change, message",
    [
        ({"peft_type": "IA3"}, {}, "peft_type is 'IA3', and only LORA"),
        ({"use_qalora": True}, {}, "use_qalora is set"),
        ({"bias": "all"}, {}, "bias is 'all'"),
        ({"init_lora_weights": "pissa_niter_4"}, {}, "init_lora_weights is 'pissa_niter_4'"),
        ({"r": 8}, {}, "has rank 4, adapter_config.json says 8"),
        ({"rank_pattern": {"(a+)+": 2}}, {}, "pattern of a kind that is not read"),
        ({}, {"lora_A": np.ones((4, 65), np.float32)}, r"q_proj.lora_a is \[65, 4\], the model needs \[64, 4\]"),
        ({}, {"lora_B": None}, "has lora_A, which do not fit together"),
    ],
    ids=["kind", "another variant", "biases", "another base", "rank", "pattern", "shape", "half of it"],
)
def test_refused(tmp_path: Path, told: dict[str, Any], change: dict[str, Any], message: str) -> None:
    _, tensors = model(tmp_path / "model", "dense")
    rng, name = np.random.RandomState(1), f"{LAYER}self_attn.q_proj"
    out, inner = tensors[f"{name}.weight"].shape
    leaves = {"lora_A": matrix(rng, 4, inner), "lora_B": matrix(rng, out, 4)} | change
    files = {f"{ROOT}{name}.{leaf}.weight": value for leaf, value in leaves.items() if value is not None}
    adapter = save(tmp_path / "adapter", told, files)
    with pytest.raises(CheckpointError, match=message):
        load_adapter(load_model(tmp_path / "model"), adapter)
