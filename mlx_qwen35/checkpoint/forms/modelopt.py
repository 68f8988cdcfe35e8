"""NVIDIA ModelOpt's checkpoints: NVFP4, FP8, and modules of each in one.

Knows where ModelOpt says what it did: quantization_config of config.json, or hf_quant_config.json beside it. What each
module is, its tensors say (grids.py).

    NVFP4   weight U8 [out, in / 2], weight_scale F8_E4M3 [out, in / 16], weight_scale_2 F32 []
    FP8     weight F8_E4M3 [out, in], weight_scale F32 [], or of blocks
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from mlx_qwen35.checkpoint.files import Entry
from mlx_qwen35.checkpoint.forms import grids
from mlx_qwen35.checkpoint.forms.blocks import Block
from mlx_qwen35.checkpoint.forms.face import LEAST, Made, Published, named_dtype
from mlx_qwen35.checkpoint.inventory import Shape, is_linear
from mlx_qwen35.config import QuantSpec
from mlx_qwen35.errors import CheckpointError

FILE = "hf_quant_config.json"
_KEYS = ("moe_quant_algo", "quant_algo")
_BLOCK: Block = (128, 128)  # of FP8_PB_WO, of the official FP8 that NVFP4 experts are put into
_READ = ("NVFP4", "W4A16_NVFP4", "FP8", "FP8_PB_WO", "FP8_PER_CHANNEL_PER_TOKEN", "MIXED_PRECISION")


@dataclass(frozen=True)
class ModelOpt:
    """What ModelOpt says. algorithm: as it calls it; dtype: of the model that was quantized."""

    algorithm: str
    dtype: str
    name: ClassVar[str] = "NVIDIA ModelOpt"
    endings: ClassVar[tuple[str, ...]] = grids.ENDINGS
    unused: ClassVar[tuple[str, ...]] = grids.UNUSED

    @property
    def spec(self) -> QuantSpec | None:
        if "NVFP4" in self.algorithm:
            return QuantSpec(4, 16, "nvfp4")
        return QuantSpec(8, 32, "mxfp8") if self.algorithm in ("FP8", "FP8_PER_CHANNEL_PER_TOKEN") else None

    @property
    def streams(self) -> bool:
        return self.spec is not None

    def make(self, ours: str, shape: Shape, found: Published) -> Made | list[str] | None:
        """A linear map, by the tensors that it has."""
        return grids.by_tensors(ours, shape, found, _BLOCK, self.dtype) if is_linear(ours, shape) else None

    def left_over(self, entry: Entry) -> str | None:
        if not entry.name.endswith(self.endings):
            return None
        return f"{entry} is left over: it has no part of its own in a linear map that is quantized so"


def algorithm(section: Mapping[str, Any]) -> str | None:
    """What ModelOpt calls the quantization that a quantization_config describes, "NVFP4" for one; None: none of it."""
    inner = section.get("quantization")
    for values in (section, inner if isinstance(inner, Mapping) else {}):
        named = next((values[key] for key in _KEYS if isinstance(values.get(key), str)), None)
        if named:
            return named
    return None


def read_config(section: Mapping[str, Any], raw: Mapping[str, Any], where: str) -> ModelOpt:
    """What a section of ModelOpt's says; raises CheckpointError for what of it is not read.

    raw: all of config.json; where: the file that has the section, for errors.
    """
    named = algorithm(section)
    if named not in _READ:
        raise CheckpointError(
            f"{where}: the weights are quantized by NVIDIA ModelOpt ({named!r:.40}), and of its forms NVFP4, FP8 and "
            f"mixtures of these are read: {LEAST}"
        )
    return ModelOpt(named, named_dtype(raw))


def beside(folder: Path) -> Mapping[str, Any] | None:
    """The section in hf_quant_config.json, where config.json has none; None: there is none that can be read."""
    try:
        told = json.loads((folder / FILE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return told if isinstance(told, dict) and algorithm(told) else None
