"""compressed-tensors, as llm-compressor, vLLM's users and RedHat AI publish them.

Knows quantization_config of quant_method "compressed-tensors". What each module is, its tensors say (grids.py): formats
may be mixed in one checkpoint, and names of targets are patterns of somebody else's modules.

    pack-quantized            weight_packed I32, weight_scale [out, in / group], weight_zero_point, weight_g_idx
    int-quantized             weight I8, weight_scale [out, 1]
    float-, naive-quantized   weight F8_E4M3, weight_scale [1], [out, 1] or of blocks
    nvfp4-pack-quantized      weight_packed U8, weight_scale F8_E4M3 [out, in / 16], weight_global_scale F32 [1]
    mxfp4-pack-quantized      weight_packed U8, weight_scale U8 [out, in / 32];  mxfp8-quantized: weight F8_E4M3

Scales of activations and of caches are passed by: this package computes with both as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from mlx_qwen35.checkpoint.files import Entry
from mlx_qwen35.checkpoint.forms import grids
from mlx_qwen35.checkpoint.forms.blocks import Block
from mlx_qwen35.checkpoint.forms.face import LEAST, Made, Published, named_dtype
from mlx_qwen35.checkpoint.forms.fp8 import is_block
from mlx_qwen35.checkpoint.inventory import Shape, is_linear
from mlx_qwen35.config import GROUP_SIZES, QuantSpec
from mlx_qwen35.errors import CheckpointError

_FORMATS = (
    "pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "nvfp4-pack-quantized",
    "mxfp4-pack-quantized", "mxfp8-quantized", "mixed-precision", "dense",
)  # fmt: skip


@dataclass(frozen=True)
class Compressed:
    """What config.json says. spec: what most modules are in MLX's terms, None where that is not known; block: of E4M3;
    dtype: of the model that was quantized."""

    spec: QuantSpec | None
    block: Block | None
    dtype: str
    name: ClassVar[str] = "compressed-tensors"
    endings: ClassVar[tuple[str, ...]] = grids.ENDINGS
    unused: ClassVar[tuple[str, ...]] = grids.UNUSED

    @property
    def streams(self) -> bool:
        return self.spec is not None

    def make(self, ours: str, shape: Shape, found: Published) -> Made | list[str] | None:
        """A linear map, by the tensors that it has."""
        return grids.by_tensors(ours, shape, found, self.block, self.dtype) if is_linear(ours, shape) else None

    def left_over(self, entry: Entry) -> str | None:
        if not entry.name.endswith(self.endings):
            return None
        return f"{entry} is left over: it has no part of its own in a linear map that is quantized so"


def read_config(section: Mapping[str, Any], raw: Mapping[str, Any], where: str) -> Compressed:
    """What a quantization_config of compressed-tensors says; raises CheckpointError for what of it is not read.

    raw: all of config.json; where: the file, for errors.
    """
    groups = section.get("config_groups")
    groups = list(groups.values()) if isinstance(groups, Mapping) else []
    if not groups or not all(isinstance(group, Mapping) for group in groups):
        raise _fail(where, "config_groups", "is no object of groups")
    for named in (section, *groups):
        how = named.get("format")
        if how is not None and how not in _FORMATS:
            raise _fail(where, "format", f"is {how!r:.40}, and only {', '.join(_FORMATS)} are read")
    if (section.get("transform_config") or {}) != {}:
        raise _fail(where, "transform_config", "rotates weights, which is not computed")
    sparsity = section.get("sparsity_config") or {}
    if not isinstance(sparsity, Mapping) or sparsity.get("format", "dense") != "dense":
        raise _fail(where, "sparsity_config", "leaves out weights, which is not read")
    told = [group.get("weights") for group in groups]
    weights = [how for how in told if isinstance(how, Mapping)]
    found = {tuple(how["block_structure"]) for how in weights if is_block(how.get("block_structure"))}
    if len(found) > 1:
        raise _fail(where, "config_groups", "has blocks of several sizes, which is not read")
    return Compressed(_spec(weights[0]) if len(weights) == 1 else None, next(iter(found), None), named_dtype(raw))


def _spec(weights: Mapping[str, Any]) -> QuantSpec | None:
    kind, bits, group = (weights.get(key) for key in ("type", "num_bits", "group_size"))
    if kind == "int" and bits in (2, 4, 8):
        return QuantSpec(bits, group if group in GROUP_SIZES["affine"] else GROUP_SIZES["affine"][-1], "affine")
    if kind == "float" and bits == 4:
        return QuantSpec(4, 16, "nvfp4") if group == 16 else QuantSpec(4, 32, "mxfp4")
    if kind == "float" and bits == 8 and weights.get("block_structure") is None:
        return QuantSpec(8, 32, "mxfp8")
    return None


def _fail(where: str, key: str, problem: str) -> CheckpointError:
    return CheckpointError(f"{where}: quantization_config.{key} {problem}: {LEAST}")
