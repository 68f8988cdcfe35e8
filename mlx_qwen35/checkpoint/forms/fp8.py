"""FP8 as Qwen publishes it, and as vLLM's tools do: E4M3 codes, and scales for blocks, rows or whole tensors.

Knows quantization_config of quant_method "fp8". The codes are blocks.py's and grids.py's.

    X.weight  F8_E4M3 [out, in]    X.weight_scale_inv  [out / 128, in / 128], or blocks of other sizes
                                   X.weight_scale      [], [1] or [out, 1]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from mlx_qwen35.checkpoint.files import Entry
from mlx_qwen35.checkpoint.fitting import misfit
from mlx_qwen35.checkpoint.forms import grids
from mlx_qwen35.checkpoint.forms.blocks import CODES, Block, with_scales
from mlx_qwen35.checkpoint.forms.face import LEAST, Made, Published, named_dtype
from mlx_qwen35.checkpoint.inventory import Shape, is_linear
from mlx_qwen35.checkpoint.part import FLOATS, make_part
from mlx_qwen35.errors import CheckpointError

SUFFIX = "_scale_inv"  # after the whole name of the tensor that it scales
_LARGEST = 1 << 20
_FORMATS = ("e4m3", "float8_e4m3fn")


@dataclass(frozen=True)
class Fp8:
    """What config.json says. dtype: of the model that was quantized, as safetensors calls it.

    block: rows and columns that have one scale; None: a scale is of a row, or of a tensor.
    """

    dtype: str
    block: Block | None
    name: ClassVar[str] = "FP8"
    endings: ClassVar[tuple[str, ...]] = (SUFFIX, *grids.ENDINGS)
    unused: ClassVar[tuple[str, ...]] = grids.UNUSED
    spec: ClassVar[None] = None

    @property
    def streams(self) -> bool:
        return self.block is None

    def make(self, ours: str, shape: Shape, found: Published) -> Made | list[str] | None:
        """A linear map that holds codes: dequantized, or packed as MLX has it where scales are not of blocks."""
        if not is_linear(ours, shape):
            return None
        part = make_part(ours, found.entries, found.layout, found.experts)
        if isinstance(part, str) or not any(entry.dtype == CODES for entry in part.entries) or self.block is None:
            return grids.by_tensors(ours, shape, found, self.block, self.dtype)
        if any(f"{entry.name}_scale" in found.entries for entry in part.entries):
            return grids.by_tensors(ours, shape, found, self.block, self.dtype)
        problem = misfit(part, shape, (*FLOATS, CODES))
        made = problem or with_scales(part, found.entries, SUFFIX, self.block, self.dtype)
        return [made] if isinstance(made, str) else Made({ours: made})

    def left_over(self, entry: Entry) -> str | None:
        if not entry.name.endswith(SUFFIX):
            return None
        return f"{entry} is left over: its weight is missing or not FP8"


def read_config(section: Mapping[str, Any], raw: Mapping[str, Any], where: str) -> Fp8:
    """What a quantization_config of quant_method "fp8" says; raises CheckpointError for what of it is not read.

    section: the quantization_config; raw: all of config.json; where: the file, for errors.
    """
    fmt, block = section.get("fmt", "e4m3"), section.get("weight_block_size")
    if fmt not in _FORMATS:
        raise CheckpointError(f"{where}: quantization_config.fmt is {fmt!r:.40}, and only 'e4m3' is read: {LEAST}")
    if block is not None and not is_block(block):
        raise CheckpointError(
            f"{where}: quantization_config.weight_block_size is {block!r:.40} where two counts are expected, or none: "
            f"{LEAST}"
        )
    return Fp8(named_dtype(raw), tuple(block) if block else None)


def is_block(value: Any) -> bool:
    """Whether a value of config.json is the size of a block."""
    return isinstance(value, list) and len(value) == 2 and all(type(n) is int and 0 < n <= _LARGEST for n in value)
