"""What a folder in MLX's layout holds, read without this package, and what must be true of one that convert() wrote.

Knows the layout that mlx-lm, mlx-vlm and LM Studio agree on. Knows nothing of how a folder came about.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

INDEX = "model.safetensors.index.json"
MTP = "mtp/weights.safetensors"
ROOFS = ("language_model.model.", "language_model.lm_head.", "vision_tower.")
CHOOSING = ("mlp.gate", "mlp.shared_expert_gate")
STEERING = (*CHOOSING, "linear_attn.in_proj_a", "linear_attn.in_proj_b")
SHIFTED = ("input_layernorm.weight", "post_attention_layernorm.weight", "q_norm.weight", "k_norm.weight",
           "model.norm.weight")  # fmt: skip

Spec = tuple[int, int, str]  # bits, group size, mode


@dataclass
class Written:
    """tensors: as they lie in the files; specs: of each quantized module, as its tensors' shapes say; plain: the names
    of modules that could be quantized and are not."""

    config: dict[str, Any]
    tensors: dict[str, mx.array]
    files: dict[str, dict[str, mx.array]]
    formats: dict[str, str | None]
    specs: dict[str, Spec]
    plain: set[str]

    def value(self, name: str) -> mx.array:
        """A tensor as it counts, float32, scales widened first."""
        path = name.removesuffix(".weight")
        if path not in self.specs:
            return self.tensors[name].astype(mx.float32)
        bits, group, mode = self.specs[path]
        scales, biases = self.tensors[f"{path}.scales"], self.tensors.get(f"{path}.biases")
        if biases is not None:
            scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
        return mx.dequantize(self.tensors[name], scales, biases, group, bits, mode=mode, dtype=mx.float32)

    def values(self) -> dict[str, np.ndarray]:
        """All of them."""
        names = [name for name in self.tensors if not name.endswith((".scales", ".biases"))]
        return {name: np.array(self.value(name)) for name in names}


def read(folder: Path) -> Written:
    """Of the main files; those of MTP lie apart."""
    files, formats = {}, {}
    for path in sorted(folder.glob("model*.safetensors")):
        files[path.name], metadata = mx.load(str(path), return_metadata=True)
        formats[path.name] = metadata.get("format")
    tensors = {name: value for held in files.values() for name, value in held.items()}
    assert len(tensors) == sum(map(len, files.values())), "a tensor lies in two files"
    config = json.loads((folder / "config.json").read_text())
    specs, plain = {}, set()
    for name in tensors:
        path, _, last = name.rpartition(".")
        if last != "weight" or not is_linear(name, tensors[name].ndim):
            continue
        if f"{path}.scales" in tensors:
            specs[path] = spec_of(tensors, path, width_of(path, config))
        else:
            plain.add(path)
    return Written(config, tensors, files, formats, specs, plain)


def is_linear(name: str, dimensions: int) -> bool:
    return name.startswith("language_model.") and dimensions in (2, 3) and "conv1d" not in name


def width_of(path: str, config: Mapping[str, Any]) -> int:
    """The length of a row of a linear map."""
    text = config.get("text_config", config)
    last = path.split(".")[-1]
    if last == "o_proj":
        return text["num_attention_heads"] * text["head_dim"]
    if last == "out_proj":
        return text["linear_num_value_heads"] * text["linear_value_head_dim"]
    if last == "down_proj":
        if "switch_mlp" in path:
            return text["moe_intermediate_size"]
        return text["shared_expert_intermediate_size" if "shared_expert" in path else "intermediate_size"]
    return text["hidden_size"]


def spec_of(tensors: Mapping[str, mx.array], path: str, width: int) -> Spec:
    weight, scales = tensors[f"{path}.weight"], tensors[f"{path}.scales"]
    bits, group = weight.shape[-1] * 32 // width, width // scales.shape[-1]
    if f"{path}.biases" in tensors:
        return bits, group, "affine"
    return bits, group, {(4, 16): "nvfp4", (4, 32): "mxfp4", (8, 32): "mxfp8"}[bits, group]


def as_published(values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """MLX names and values -> those of Hugging Face with fused experts, float64, for a reference to start from."""
    found: dict[str, np.ndarray] = {}
    for name, value in values.items():
        value = np.float64(value)
        if name.startswith("vision_tower."):
            name = name.replace("vision_tower.", "model.visual.")
            if name.endswith("patch_embed.proj.weight"):
                value = value.transpose(0, 4, 1, 2, 3)  # [V, T, P, P, C] -> [V, C, T, P, P]
            found[name] = value
            continue
        name = name.replace("language_model.model.", "model.language_model.").replace("language_model.lm_", "lm_")
        if name.endswith("conv1d.weight"):
            value = value.transpose(0, 2, 1)  # [C, K, 1] -> [C, 1, K]
        elif name.endswith((*SHIFTED, "language_model.norm.weight")):
            value = value - 1
        found[name] = value
    for name in [name for name in found if ".switch_mlp.up_proj" in name]:
        stem = name.removesuffix("switch_mlp.up_proj.weight")
        gate, up, down = (found.pop(f"{stem}switch_mlp.{part}_proj.weight") for part in ("gate", "up", "down"))
        found[f"{stem}experts.gate_up_proj"] = np.concatenate([gate, up], axis=1)
        found[f"{stem}experts.down_proj"] = down
    return found


def check_layout(folder: Path, source: Path, *, mtp: bool, vision: bool, asked: Spec | None) -> Written:
    """Every fact about a written folder that holds whatever was asked for; returns what is in it."""
    found = read(folder)
    assert set(found.formats.values()) == {"mlx"}
    assert all(name.startswith(ROOFS) for name in found.tensors), sorted(found.tensors)
    assert any(name.startswith("vision_tower.") for name in found.tensors) == vision
    _check_index(folder, found)
    _check_files(folder, source, found, mtp)
    _check_config(found, json.loads((source / "config.json").read_text()), vision, asked)
    return found


def _check_index(folder: Path, found: Written) -> None:
    index = json.loads((folder / INDEX).read_text())
    assert index["weight_map"] == {name: file for file, held in found.files.items() for name in held}
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in found.tensors.values())
    names, count = sorted(found.files), len(found.files)
    numbered = [f"model-{n + 1:05d}-of-{count:05d}.safetensors" for n in range(count)]
    assert names == (["model.safetensors"] if count == 1 else numbered)


def _check_files(folder: Path, source: Path, found: Written, mtp: bool) -> None:
    own = {"config.json", INDEX, *found.files} | ({MTP} if mtp else set())
    copied = {path.name for path in source.iterdir() if path.suffix in (".json", ".jinja", ".txt")}
    copied = copied - {"config.json", INDEX} | ({"LICENSE"} if (source / "LICENSE").exists() else set())
    assert copied and all((folder / name).read_bytes() == (source / name).read_bytes() for name in copied)
    there = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert there == own | copied
    assert not [name for name in found.tensors if "mtp" in name]


def _check_config(found: Written, before: dict[str, Any], vision: bool, asked: Spec | None) -> None:
    config = json.loads(json.dumps(found.config))
    quantization, again = config.pop("quantization", None), config.pop("quantization_config", None)
    assert quantization == again
    assert ("vision_config" in config) == vision
    for key in ("quantization", "quantization_config", "vision_config"):
        before.pop(key, None)
    config.pop("vision_config", None)
    for either in (config, before):
        for part in (either, either.get("text_config", {})):
            for key in ("dtype", "torch_dtype", "tie_word_embeddings"):
                part.pop(key, None)
    assert config == before, "config.json is the source's but for what had to change"
    assert "quant_method" not in json.dumps(found.config)
    if quantization is None:
        assert not found.specs
        return
    default: Spec = (quantization.pop("bits"), quantization.pop("group_size"), quantization.pop("mode", "affine"))
    assert asked in (None, default) or asked not in found.specs.values()
    assert default in found.specs.values() or not found.specs
    assert found.specs.keys() | found.plain >= quantization.keys(), "an override of nothing"
    for path, said in quantization.items():
        how = (said["bits"], said["group_size"], said["mode"]) if said else None  # all three, or false
        assert how == found.specs.get(path), path
        assert how != default, f"{path} deviates from nothing"
    assert all(spec == default for path, spec in found.specs.items() if path not in quantization)
    assert all(path in quantization for path in found.plain)
