"""Tiny MLX checkpoints as their publishers write them, and what their numbers mean.

Knows the rules of writers: names, where parts lie, what config.json says. Knows nothing of how this package reads them.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from tests.checkpoints import Tensors, random_tensors, relayout, tiny_config, write_checkpoint

# Every input width a multiple of 64; sizes that could be confused stay unequal.
SIZES: dict[str, Any] = {
    "hidden_size": 128, "head_dim": 32, "num_attention_heads": 6, "linear_num_value_heads": 4,
    "linear_value_head_dim": 48, "rope_parameters": {"mrope_section": [4, 2, 2]},
    "layer_types": ["linear_attention", "full_attention"], "full_attention_interval": 2, "mtp_num_hidden_layers": 1,
}  # fmt: skip
FFN = {"dense": {"intermediate_size": 320},
       "moe": {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 192, "num_experts": 4,
               "num_experts_per_tok": 2}}  # fmt: skip
Spec = dict[str, Any] | None  # None: left unquantized


@dataclass
class Form:
    """A checkpoint to be: arrays by published name, and config.json. plain: the HF tensors that these stand for."""

    config: dict[str, Any]
    arrays: dict[str, mx.array]
    plain: Tensors
    entries: dict[str, Any] = field(default_factory=dict)  # of "quantization", for single modules
    marker: str | None = "mlx"

    def write(self, folder: Path, files: Callable[[str], str] | None = None, *, index: bool = False) -> Path:
        """files: the file of a tensor; None: all are in model.safetensors. index: with one that names all of them."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config))
        where = {name: (files or (lambda name: "model.safetensors"))(name) for name in self.arrays}
        for file in sorted(set(where.values())):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            here = {name: array for name, array in self.arrays.items() if where[name] == file}
            mx.save_safetensors(str(folder / file), here, {"format": self.marker} if self.marker else {})
        if index:
            told = {"metadata": {"total_size": 1}, "weight_map": where}
            (folder / "model.safetensors.index.json").write_text(json.dumps(told))
        return folder

    def write_plain(self, folder: Path) -> Path:
        """The same model as Hugging Face would have it, unquantized."""
        config = {k: v for k, v in self.config.items() if not k.startswith(("quantization", "mtplx", "optiq", "mlx_"))}
        config["text_config"] = tiny_config(self.kind, **SIZES, **FFN[self.kind])["text_config"]
        return write_checkpoint(folder, config, self.plain)

    @property
    def kind(self) -> str:
        return "moe" if "moe" in self.config["model_type"] else "dense"

    def quantization(self, default: dict[str, Any], entries: Mapping[str, Any]) -> None:
        self.config["quantization"] = {**default, **entries}
        self.config["quantization_config"] = self.config["quantization"]


def config_of(kind: str, *, vision: bool = False) -> dict[str, Any]:
    return tiny_config(kind, vision=vision, **SIZES, **FFN[kind])


def mlx_tensors(tensors: Tensors, *, roof: str = "language_model.mtp.", raw_head: bool = False) -> Tensors:
    """relayout(.., "mlx") with the MTP layer under `roof`, its norms as trained (raw_head) or as scales."""
    main = {name: value for name, value in tensors.items() if not name.startswith("mtp.")}
    return relayout(main, "mlx") | mtp_tensors(tensors, roof, raw=raw_head)


def mtp_tensors(tensors: Tensors, prefix: str, *, raw: bool) -> Tensors:
    """The MTP layer alone, experts stacked as MLX has them."""
    head = {name.replace("mtp.", "model.", 1): value for name, value in tensors.items() if name.startswith("mtp.")}
    found = {}
    for name, value in relayout(head, "mlx").items():
        name = name.removeprefix("language_model.model.")
        found[prefix + name] = value - np.float32(1) if raw and "norm" in name else value
    return found


def pack(tensors: Tensors, spec_of: Callable[[str], Spec]) -> tuple[dict[str, mx.array], dict[str, Spec], Tensors]:
    """-> (arrays to write, the quantization of each linear module by path, the values that all of it stands for)."""
    arrays: dict[str, mx.array] = {}
    specs: dict[str, Spec] = {}
    values: Tensors = {}
    for name, value in tensors.items():
        array, path = mx.array(value), name.removesuffix(".weight")
        linear = path != name and array.ndim in (2, 3) and "conv1d" not in name and "patch_embed" not in name
        spec = spec_of(path) if linear else None
        if linear:
            specs[path] = spec
        if not spec:
            arrays[name], values[name] = array, value
            continue
        how = {"mode": "affine"} | spec
        parts = mx.quantize(array, **how)
        arrays |= dict(zip((name, f"{path}.scales", f"{path}.biases"), parts, strict=False))
        values[name] = np.array(mx.dequantize(*parts, **how).astype(mx.float32))
    return arrays, specs, values


def meant(values: Tensors, tensors: Tensors) -> Tensors:
    """Values under MLX's names, as HF tensors in the shapes and under the names of `tensors`."""
    found = {}
    for name, value in tensors.items():
        if ".experts." in name:
            stem, _, last = name.rpartition(".experts.")
            parts = ("gate_proj", "up_proj") if last == "gate_up_proj" else ("down_proj",)
            found[name] = np.concatenate([values[_mlx(f"{stem}.switch_mlp.{part}.weight")] for part in parts], axis=1)
            continue
        new = values[_mlx(name)]
        if new.shape != value.shape:
            new = new.transpose(0, 2, 1) if new.ndim == 3 else new.transpose(0, 4, 1, 2, 3)
        shift = "norm" in name and "linear_attn" not in name and "visual" not in name
        found[name] = new - np.float32(1) if shift else new
    return found


def _mlx(name: str) -> str:
    name = name.replace("model.language_model.", "language_model.model.").replace("model.visual.", "vision_tower.")
    return f"language_model.{name}" if name.startswith(("mtp.", "lm_head.")) else name


def oq(kind: str, *, vision: bool = False, seed: int = 5, bits: Callable[[str], Spec] | None = None) -> Form:
    """oMLX's: everything quantized by module, the MTP head too, which lies in the main shards under their roof."""
    config = config_of(kind, vision=vision)
    tensors = random_tensors(config, seed)
    default = {"group_size": 64, "bits": 4}

    def spec_of(path: str) -> Spec:
        if path.startswith("vision_tower.") or path.endswith((".in_proj_a", ".in_proj_b")):
            return None
        return {"group_size": 64, "bits": 6} if path.endswith(("v_proj", "down_proj", ".fc")) else default

    arrays, specs, values = pack(mlx_tensors(tensors), bits or spec_of)
    form = Form(config, arrays, meant(values, tensors))
    form.entries = {path: spec or False for path, spec in specs.items() if spec != default}
    form.quantization(default, form.entries)
    return form


def autoround_mlx(kind: str, *, vision: bool = False, seed: int = 6) -> Form:
    """Intel's MLX export: names and values of Hugging Face, experts one by one, flat rope keys, `false` by module."""
    config = config_of(kind, vision=vision)
    tensors = random_tensors(config, seed)
    default = {"group_size": 64, "bits": 4}

    def spec_of(path: str) -> Spec:
        if not path.startswith("model.language_model.layers.") or path.endswith((".gate", "shared_expert_gate")):
            return None
        return {"group_size": 32, "bits": 8} if path.endswith("q_proj") else default

    arrays, specs, values = pack(relayout(tensors, "hf-per-expert"), spec_of)
    plain = {}
    for name, value in tensors.items():
        stem, _, last = name.rpartition(".experts.")
        kinds = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.get(last) if stem else None
        if kinds:
            one = lambda e, stem=stem, kinds=kinds: np.concatenate(  # noqa: E731
                [values[f"{stem}.experts.{e}.{kind}.weight"] for kind in kinds]
            )
            plain[name] = np.stack([one(e) for e in range(len(value))])
        else:
            plain[name] = values[name]
    text = config["text_config"]
    text |= text.pop("rope_parameters")
    text["model_type"] = config["model_type"]
    form = Form(config, arrays, plain, marker="pt")
    form.entries = {path: spec or False for path, spec in specs.items() if spec != default}
    form.quantization(default, form.entries)
    return form
