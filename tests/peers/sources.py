"""Tiny checkpoints in every form in which a Qwen3.5 is published, and what their numbers mean.

Knows who writes what; the MLX forms are written by mlx-lm and mlx-vlm themselves. Knows nothing of convert() but for
the one source that is a conversion already.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35 import convert
from tests.checkpoint.foreign import bfloat16, widened, write_fp8, write_gptq
from tests.checkpoint.test_fp8 import fused
from tests.checkpoints import KEPT_FLOAT32, Tensors, random_tensors, relayout, tiny_config, write_checkpoint
from tests.peers import written

# EVEN: groups of 128 divide every row. ODD: those of 64 some, of 32 all; blocks of 128 none. Of tiny_config's own sizes
# nothing divides some. Sizes that could be confused stay unequal. mlx-vlm expects a multiple of 64 values in each map
# that is quantized, the shared expert's gate included, so hidden_size is one.
EVEN: dict[str, Any] = {
    "hidden_size": 128, "vocab_size": 104, "head_dim": 64, "num_attention_heads": 6, "linear_num_value_heads": 4,
    "linear_value_head_dim": 64, "linear_key_head_dim": 24, "rope_parameters": {"mrope_section": [6, 5, 5]},
    "layer_types": ["linear_attention", "full_attention"], "full_attention_interval": 2,
}  # fmt: skip
EVEN_FFN = {
    "dense": {"intermediate_size": 640},
    "moe": {"moe_intermediate_size": 256, "shared_expert_intermediate_size": 512, "num_experts": 4},
}
ODD: dict[str, Any] = EVEN | {
    "hidden_size": 192, "vocab_size": 112, "head_dim": 32, "num_attention_heads": 9, "linear_value_head_dim": 40,
    "rope_parameters": {"mrope_section": [4, 2, 2]},
}  # fmt: skip
ODD_FFN = {
    "dense": {"intermediate_size": 352},
    "moe": {"moe_intermediate_size": 96, "shared_expert_intermediate_size": 224, "num_experts": 4},
}
COMPANIONS = {
    "tokenizer.json": "{}", "tokenizer_config.json": '{"a": 1}', "chat_template.jinja": "{{ messages }}",
    "generation_config.json": '{"top_k": 20}', "preprocessor_config.json": '{"patch_size": 4}',
    "video_preprocessor_config.json": '{"fps": 2}', "vocab.json": "{}", "merges.txt": "a b", "LICENSE": "Apache",
}  # fmt: skip
KINDS = {"float32": np.float32, "float16": np.float16}


@dataclass
class Source:
    """meant: MLX's names and layout -> float32 values, before any cast; kept: the dtypes of what is not quantized;
    packed: of each module that is quantized by MLX or, in MLX's terms, by GPTQ, how; raw: what lies in MLX's files."""

    folder: Path
    meant: Tensors
    mtp: Tensors
    kept: tuple[str, ...]
    packed: dict[str, written.Spec]
    raw: Mapping[str, mx.array] | None = None

    @property
    def vision(self) -> bool:
        return any(name.startswith("vision_tower.") for name in self.meant)


def even(kind: str, *, vision: bool = True, mtp: int = 1, **sizes: Any) -> dict[str, Any]:
    return tiny_config(kind, vision=vision, mtp_num_hidden_layers=mtp, **EVEN | EVEN_FFN[kind] | sizes)


def odd(kind: str, *, vision: bool = True, mtp: int = 1, **sizes: Any) -> dict[str, Any]:
    return tiny_config(kind, vision=vision, mtp_num_hidden_layers=mtp, **ODD | ODD_FFN[kind] | sizes)


def as_stored(name: str, value: np.ndarray, dtype: str) -> np.ndarray:
    """What is left of a float32 value in a file."""
    if name.endswith(KEPT_FLOAT32) or dtype == "float32":
        return value
    return widened(bfloat16(value)) if dtype == "bfloat16" else value.astype(KINDS[dtype]).astype(np.float32)


def _split_mtp(tensors: Mapping[str, np.ndarray]) -> tuple[Tensors, Tensors]:
    """Published names, experts fused -> MLX's for the model, MLX's for its MTP layer."""
    main = {name: value for name, value in tensors.items() if not name.startswith("mtp.")}
    beside = {name.replace("mtp.", "model.", 1): value for name, value in tensors.items() if name.startswith("mtp.")}
    moved = relayout(beside, "mlx-text")
    return relayout(main, "mlx"), {name.replace("model.", "mtp.", 1): value for name, value in moved.items()}


def hf(config: dict[str, Any], dtype: str, **how: Any) -> Callable[[Path], Source]:
    def build(folder: Path) -> Source:
        tensors = random_tensors(config, 3)
        write_checkpoint(folder, config, tensors, dtype=dtype, **how)
        return Source(folder, *_split_mtp({n: as_stored(n, v, dtype) for n, v in tensors.items()}), (dtype,), {})

    return build


def fp8(kind: str, layout: str, **sizes: Any) -> Callable[[Path], Source]:
    def build(folder: Path) -> Source:
        meant = write_fp8(folder, kind, layout, **sizes)
        return Source(folder, *_split_mtp(meant if layout == "hf" else fused(meant)), ("bfloat16", "float32"), {})

    return build


def gptq(kind: str, sizes: Mapping[str, Any] | None = None, **section: Any) -> Callable[[Path], Source]:
    def build(folder: Path) -> Source:
        meant = fused(write_gptq(folder, kind, sizes=sizes, **section))
        spec = (section.get("bits", 4), section.get("group_size", 32), "affine")
        tensors, mtp = _split_mtp(meant)
        held = ".switch_mlp." if kind == "moe" else ".mlp."
        packed = {name.removesuffix(".weight"): spec for name in tensors if held in name}
        return Source(folder, tensors, mtp, ("bfloat16", "float16"), packed)

    return build


def mlx_lm(
    config: dict[str, Any], bits: int | None, group: int = 64, mode: str = "affine", dtype: str = "bfloat16"
) -> Callable[[Path], Source]:
    """As mlx_lm.convert writes: neither vision nor MTP, config.json without vision_config."""

    def build(folder: Path) -> Source:
        peer = pytest.importorskip("mlx_lm.utils", reason="mlx-lm is not installed")
        model, read = peer.load_model(_origin(folder, config, dtype))
        if bits is not None:
            model, read = peer.quantize_model(model, read, group, bits, mode)
        peer.save_model(folder, model)
        peer.save_config(read, folder / "config.json")
        return _as_read(folder, {}, dtype)

    return build


def mlx_vlm(
    config: dict[str, Any], bits: int | None, group: int = 64, mode: str = "affine", recipe: str | None = None
) -> Callable[[Path], Source]:
    """As mlx_vlm.convert writes: with the vision tower, unquantized; recipes put the router at few bits too."""

    def build(folder: Path) -> Source:
        utils = pytest.importorskip("mlx_vlm.utils", reason="mlx-vlm is not installed", exc_type=ImportError)
        from mlx_vlm import quant_utils
        from mlx_vlm.convert import mixed_quant_predicate_builder

        origin = _origin(folder, config, "bfloat16")
        model, read = utils.load_model(origin), utils.load_config(origin)
        if bits is not None:

            def chosen(path: str, module: Any) -> bool | dict[str, Any]:
                own = mixed_quant_predicate_builder(recipe, model) if recipe else model.quant_predicate
                return not utils.skip_multimodal_module(path) and (own(path, module) if own else True)

            model, read = quant_utils.quantize_model(model, read, group, bits, mode=mode, quant_predicate=chosen)
        utils.save_weights(folder, model)
        utils.save_config(read, folder / "config.json")
        return _as_read(folder, {}, "bfloat16")

    return build


def ours(config: dict[str, Any]) -> Callable[[Path], Source]:
    def build(folder: Path) -> Source:
        origin = hf(config, "bfloat16")(folder.with_name(f"{folder.name}-origin"))
        convert(origin.folder, folder, bits=4, group_size=64)
        mtp = {name: np.array(value.astype(mx.float32)) for name, value in mx.load(str(folder / written.MTP)).items()}
        return _as_read(folder, mtp, "bfloat16")

    return build


def _origin(folder: Path, config: dict[str, Any], dtype: str) -> Path:
    tensors = {name: value for name, value in random_tensors(config, 3).items() if not name.startswith("mtp.")}
    return write_checkpoint(folder.with_name(f"{folder.name}-origin"), config, tensors, dtype=dtype)


def _as_read(folder: Path, mtp: Tensors, dtype: str) -> Source:
    found = written.read(folder)
    return Source(folder, found.values(), mtp, (dtype,), found.specs, found.tensors)


SOURCES: dict[str, Callable[[Path], Source]] = {
    "bf16 experts": hf(even("moe"), "bfloat16", shards=3),
    "bf16 experts of odd sizes": hf(odd("moe", mtp=0), "bfloat16"),
    "bf16 dense tied": hf(even("dense"), "bfloat16", shards=2),
    "bf16 dense untied, text": hf(even("dense", vision=False, mtp=0, tie_word_embeddings=False), "bfloat16"),
    "fp16 experts one by one, text": hf(odd("moe", vision=False), "float16", layout="hf-per-expert", shards=2),
    "fp32 experts tied": hf(even("moe", mtp=0, tie_word_embeddings=True), "float32"),
    "fp32 experts one by one": hf(even("moe"), "float32", layout="hf-per-expert"),
    "fp32 dense of odd sizes": hf(odd("dense", tie_word_embeddings=False), "float32"),
    "fp32 no group divides": hf(tiny_config("moe", vision=True), "float32"),
    "fp8 experts": fp8("moe", "hf-per-expert", **EVEN | EVEN_FFN["moe"]),
    "fp8 experts of odd sizes": fp8("moe", "hf-per-expert", **ODD | ODD_FFN["moe"]),
    "fp8 experts fused": fp8("moe", "hf", **ODD | ODD_FFN["moe"]),
    "fp8 dense tied": fp8("dense", "hf", **EVEN | EVEN_FFN["dense"]),
    "gptq experts": gptq("moe", EVEN | EVEN_FFN["moe"], group_size=128),
    "gptq experts of odd sizes": gptq("moe", ODD | ODD_FFN["moe"]),
    "gptq dense, 8 bits": gptq("dense", EVEN | EVEN_FFN["dense"], bits=8, group_size=64),
    "mlx-lm plain": mlx_lm(even("moe"), None),
    "mlx-lm affine": mlx_lm(even("moe"), 4, 64),
    "mlx-lm affine, float32": mlx_lm(even("dense"), 3, 32, dtype="float32"),
    "mlx-lm mxfp4": mlx_lm(even("moe"), 4, 32, "mxfp4"),
    "mlx-vlm plain": mlx_vlm(even("dense"), None),
    "mlx-vlm affine": mlx_vlm(even("moe"), 8, 64),
    "mlx-vlm mixed": mlx_vlm(even("moe"), 4, 64, recipe="mixed_3_6"),
    "mlx-vlm nvfp4": mlx_vlm(even("dense"), 4, 16, "nvfp4"),
    "ours": ours(even("moe")),
}


class Shelf:
    """Each source written once, where it is first wanted."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.built: dict[str, Source] = {}

    def __getitem__(self, name: str) -> Source:
        if name not in self.built:
            folder = self.folder / name.replace(" ", "-").replace(",", "")
            source = SOURCES[name](folder)
            for file, text in COMPANIONS.items():
                (folder / file).write_text(text)
            config = json.loads((folder / "config.json").read_text())
            assert ("vision_config" in config) == source.vision
            mx.eval(list(written.read(folder).tensors.values()))
            self.built[name] = source
        return self.built[name]
