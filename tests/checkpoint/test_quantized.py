"""MLX checkpoints in every quantization, written here by hand as mlx-lm and mlx-vlm lay them out."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_qwen35.checkpoint.load import load_model
from mlx_qwen35.errors import CheckpointError
from mlx_qwen35.vision.tower import VisionTower
from tests.checkpoints import loaded, random_tensors, relayout, tiny_config

# Every input width a multiple of 64; sizes that could be confused stay unequal.
SIZES: dict[str, Any] = {
    "hidden_size": 128, "head_dim": 32, "num_attention_heads": 6, "linear_num_value_heads": 4,
    "linear_value_head_dim": 48, "rope_parameters": {"mrope_section": [4, 2, 2]},
}  # fmt: skip
FFN = {
    "dense": {"intermediate_size": 320},
    "moe": {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 192},
}
MODES = [("affine", b, g) for b in (2, 3, 4, 5, 6, 8) for g in (32, 64)] + [
    ("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16),
]  # fmt: skip
STEERING = {"group_size": 64, "bits": 8}  # without a mode, as mlx-lm writes it: affine

modes = pytest.mark.parametrize("mode, bits, group_size", MODES, ids=str)


def quantized_config(kind: str, spec: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    config = tiny_config(kind, vision=True, **SIZES, **FFN[kind])
    config["quantization"] = {**spec, **overrides}
    config["quantization_config"] = config["quantization"]
    return config


def write_quantized(
    folder: Path,
    kind: str,
    spec: dict[str, Any],
    overrides: dict[str, Any] | None = None,
    roof: str = "mlx",
    vision: dict[str, int] | None = None,
) -> dict[str, mx.array]:
    """An MLX checkpoint whose linear maps are quantized, those of the vision tower only if `vision` gives it sizes
    for it; returns our names with the values that should be computed."""
    overrides = overrides or {}
    config = quantized_config(kind, spec, overrides)
    config["vision_config"] |= vision or {}
    published = relayout(random_tensors(config, 4), roof)
    written, meant = {}, {}
    for name, value in published.items():
        array = mx.array(value)
        path = name.removesuffix(".weight")
        how = overrides.get(path, spec)
        linear = path != name and array.ndim in (2, 3) and "conv1d" not in name
        linear = linear and (vision is not None or not name.startswith("vision"))
        if how and linear:
            how = {"mode": "affine", **how}
            parts = mx.quantize(array, how["group_size"], how["bits"], mode=how["mode"])
            written |= dict(zip((f"{path}.weight", f"{path}.scales", f"{path}.biases"), parts, strict=False))
            array = mx.dequantize(*parts, group_size=how["group_size"], bits=how["bits"], mode=how["mode"])
        else:
            written[name] = array
        ours, array = loaded(name, array)
        meant[ours] = array
    folder.mkdir()
    mx.save_safetensors(str(folder / "model.safetensors"), written, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))
    return meant


def dequantized(model: nn.Module) -> dict[str, mx.array]:
    """Every weight of a model as it counts."""
    found = {}
    for path, module in model.named_modules():
        for name, value in module.items():
            if not isinstance(value, mx.array) or name in ("scales", "biases"):
                continue
            if "scales" in module and name == "weight":
                value = mx.dequantize(
                    value, module["scales"], module.get("biases"), module.group_size, module.bits, mode=module.mode
                )
            found[f"{path}.{name}".removeprefix(".")] = value
    return {name: value for name, value in found.items() if not name.split(".")[-1].startswith("_")}


def same(model: nn.Module, meant: dict[str, mx.array]) -> None:
    found = dequantized(model)
    assert found.keys() == meant.keys()
    for name, value in meant.items():
        assert mx.array_equal(found[name].astype(mx.float32), value.astype(mx.float32)), name


def overrides_of(kind: str) -> dict[str, Any]:
    stem = "language_model.model.layers"
    if kind == "dense":
        return {f"{stem}.1.mlp.down_proj": {"group_size": 32, "bits": 6, "mode": "affine"},
                f"{stem}.3.self_attn.o_proj": False}  # fmt: skip
    paths = [f"{stem}.{n}.mlp.{name}" for n in range(4) for name in ("gate", "shared_expert_gate")]
    return {**dict.fromkeys(paths, STEERING), f"{stem}.2.mlp.switch_mlp.up_proj": {"group_size": 64, "bits": 5}}


@modes
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_every_quantization(tmp_path: Path, kind: str, mode: str, bits: int, group_size: int) -> None:
    spec = {"group_size": group_size, "bits": bits, "mode": mode}
    meant = write_quantized(tmp_path / "a", kind, spec, overrides_of(kind))
    model = load_model(tmp_path / "a")
    same(model, meant)
    embedding = model.embed_tokens
    assert (embedding.bits, embedding.group_size, embedding.mode) == (bits, group_size, mode)
    assert embedding.weight.dtype == mx.uint32


def test_quantized_model_computes(tmp_path: Path) -> None:
    """Logits are those of the same values unquantized."""
    spec = {"group_size": 32, "bits": 4, "mode": "affine"}
    meant = write_quantized(tmp_path / "a", "moe", spec, overrides_of("moe"))
    model = load_model(tmp_path / "a")
    plain = tiny_config("moe", **SIZES, **FFN["moe"])
    (tmp_path / "b").mkdir()
    (tmp_path / "b/config.json").write_text(json.dumps(plain))
    names = {n: n if n.startswith("lm_head") else f"model.{n.replace('mlp.experts', 'mlp.switch_mlp')}" for n in meant}
    weights = {names[name]: value for name, value in meant.items() if not name.startswith("vision.")}
    mx.save_safetensors(str(tmp_path / "b/model.safetensors"), weights, metadata={"format": "mlx"})
    tokens = mx.array([[3, 1, 4, 1, 5, 9, 2, 6]])
    other = load_model(tmp_path / "b")(tokens)
    assert mx.abs(model(tokens) - other).max().item() < 2e-3
    assert mx.abs(other).max().item() > 0.1


def test_text_only_names(tmp_path: Path) -> None:
    """Without the roof, overrides may still be written under it."""
    overrides = {"language_model.model.layers.1.mlp.down_proj": {"group_size": 32, "bits": 8, "mode": "affine"},
                 "model.layers.2.mlp.up_proj": {"group_size": 64, "bits": 3, "mode": "affine"}}  # fmt: skip
    written = {path.removeprefix("language_model."): how for path, how in overrides.items()}
    spec = {"group_size": 64, "bits": 4, "mode": "affine"}
    meant = write_quantized(tmp_path / "a", "dense", spec, written, roof="mlx-text")
    config = json.loads((tmp_path / "a/config.json").read_text())
    config["quantization"] = spec | overrides
    (tmp_path / "a/config.json").write_text(json.dumps(config))
    same(load_model(tmp_path / "a"), meant)


def test_scales_follow_the_compute_dtype(tmp_path: Path) -> None:
    write_quantized(tmp_path / "a", "dense", {"group_size": 64, "bits": 4, "mode": "affine"})
    write_quantized(tmp_path / "b", "dense", {"group_size": 32, "bits": 4, "mode": "mxfp4"})
    affine = load_model(tmp_path / "a", dtype="bfloat16").layers[0].mlp.up_proj
    assert (affine.scales.dtype, affine.biases.dtype, affine.weight.dtype) == (mx.bfloat16, mx.bfloat16, mx.uint32)
    mxfp4 = load_model(tmp_path / "b", dtype="bfloat16").layers[0].mlp.up_proj
    assert mxfp4.scales.dtype == mx.uint8 and "biases" not in mxfp4


UP = "language_model.model.layers.0.mlp.up_proj"
BROKEN: dict[str, tuple[dict[str, Any], Any, str]] = {
    # config overrides that are added afterwards, what is done to the tensors, the message
    "bits that the tensors do not have": (
        {UP: {"group_size": 64, "bits": 8, "mode": "affine"}}, None, r"up_proj.weight .*320, 16\], expected \[320, 32\]"
    ),
    "groups that the tensors do not have": (
        {UP: {"group_size": 32, "bits": 4, "mode": "affine"}}, None, r"up_proj.scales .*\[320, 2\], expected \[320, 4\]"
    ),
    "a mode that the tensors do not have": (
        {UP: {"group_size": 32, "bits": 4, "mode": "mxfp4"}}, None, "up_proj.scales .*dtype F32, expected U8"
    ),
    "unquantized by config": ({UP: False}, None, "up_proj.scales .* is there, but .*up_proj is not quantized"),
    "scales without biases": ({}, lambda t: t.pop(f"{UP}.biases"), "up_proj.biases is in none of the files"),
    "weight without scales": ({}, lambda t: t.pop(f"{UP}.scales"), "up_proj.weight .*dtype U32, expected F32/F16/BF16"),
    "tensor scales": (
        {}, lambda t: t.update({f"{UP}.global_scale": mx.ones(1)}), r"a quantization \(nvfp4 with tensor scales\)"
    ),
    "scales of nothing": (
        {}, lambda t: t.update({"language_model.model.norm.scales": mx.ones(1)}), "norm.scales .*left over"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_config_and_tensors_must_agree(tmp_path: Path, case: str) -> None:
    overrides, change, message = BROKEN[case]
    write_quantized(tmp_path / "a", "dense", {"group_size": 64, "bits": 4, "mode": "affine"})
    path = tmp_path / "a/model.safetensors"
    if change:
        tensors = dict(mx.load(str(path)))
        mx.eval(tensors)
        change(tensors)
        mx.save_safetensors(str(path), tensors, metadata={"format": "mlx"})
    config = json.loads((tmp_path / "a/config.json").read_text())
    config["quantization"] |= overrides
    (tmp_path / "a/config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path / "a")


def test_scales_without_quantization_in_config(tmp_path: Path) -> None:
    write_quantized(tmp_path / "a", "dense", {"group_size": 64, "bits": 4, "mode": "affine"})
    config = json.loads((tmp_path / "a/config.json").read_text())
    del config["quantization"], config["quantization_config"]
    (tmp_path / "a/config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="does not say how language_model.model.embed_tokens is quantized"):
        load_model(tmp_path / "a")


def test_groups_that_do_not_divide_the_rows(tmp_path: Path) -> None:
    write_quantized(tmp_path / "a", "dense", {"group_size": 64, "bits": 4, "mode": "affine"})
    config = json.loads((tmp_path / "a/config.json").read_text())
    config["quantization"][UP.replace("up_proj", "down_proj")] = {"group_size": 128, "bits": 4, "mode": "affine"}
    (tmp_path / "a/config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="down_proj has rows of 320, which groups of 128 .* do not divide"):
        load_model(tmp_path / "a")


@pytest.mark.parametrize("mode, bits, group_size", [("affine", 4, 64), ("mxfp8", 8, 32)])
def test_quantized_tower(tmp_path: Path, mode: str, bits: int, group_size: int) -> None:
    """mlx-vlm may quantize the vision tower too, its position table included."""
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    spec = {"group_size": group_size, "bits": bits, "mode": mode}
    meant = write_quantized(tmp_path / "a", "dense", spec, vision=sizes)
    model = load_model(tmp_path / "a")
    same(model, meant)
    assert "scales" in model.vision.blocks[0].attn.qkv and "scales" in model.vision.pos_embed
    plain = VisionTower(model.config.vision)
    plain.load_weights([(n.removeprefix("vision."), v) for n, v in meant.items() if n.startswith("vision.")])
    pixels = [np.random.RandomState(0).standard_normal((16, 96)).astype(np.float32)]
    found, expected = (np.array(tower.encode(pixels, [(1, 4, 4)])[0]) for tower in (model.vision, plain))
    np.testing.assert_allclose(found, expected, atol=1e-3)
