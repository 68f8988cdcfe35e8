"""E4M3 codes with a scale for each block of a matrix, dequantized in float32.

Knows how codes and scales lie, and how they become floats: value = code * scale of its block. Knows no config.json.

    X.weight                  F8_E4M3 [out, in]     X.weight_scale_inv                  [out / rows, in / columns]
    mlp.experts.gate_up_proj  F8_E4M3 [E, 2M, H]    mlp.experts.gate_up_proj_scale_inv  [E, 2M / rows, H / columns]

Quotients are rounded up: the last block of a row or column may be narrower.
The up rows of a fused tensor begin at row M, which may lie inside a block: blocks are counted from row 0 of the file's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx
import numpy as np

from mlx_qwen35.checkpoint import files
from mlx_qwen35.checkpoint.files import Entry
from mlx_qwen35.checkpoint.inventory import Shape
from mlx_qwen35.checkpoint.part import FLOATS, Part, as_array
from mlx_qwen35.errors import CheckpointError

CODES = "F8_E4M3"
_PIECE_VALUES = 1 << 24  # in float32 at a time: 64 MiB, and the scaled ones beside them

Block = tuple[int, int]  # rows and columns that have one scale


@dataclass(frozen=True)
class Fp8Part:
    """One of our tensors, out of codes and scales. codes: as if it were plain; scales: as the files have them.

    dtype: what the values had before they became codes; finish() makes float32 of them unless it is told otherwise.
    """

    codes: Part
    scales: tuple[Entry, ...]
    dtype: str
    block: Block
    computed: ClassVar[bool] = True
    cuts: ClassVar[bool] = True
    growth: ClassVar[int] = 4
    passing: ClassVar[None] = None

    @property
    def ours(self) -> str:
        return self.codes.ours

    @property
    def entries(self) -> tuple[Entry, ...]:
        return self.codes.entries + self.scales

    @property
    def shape(self) -> Shape:
        return self.codes.shape

    @property
    def nbytes(self) -> int:
        scales = sum(entry.nbytes for entry in self.scales)
        return self.codes.nbytes + (scales if self.codes.half is None else scales // 2)

    @property
    def rows(self) -> int:
        return self.codes.rows

    @property
    def stacked(self) -> bool:
        return self.codes.stacked

    def fetch(self, start: int = 0, stop: int | None = None) -> tuple[np.ndarray, np.ndarray, int]:
        """The codes of rows start..stop, the scales [.., blocks, blocks] that they need, and `start`."""
        codes = self.codes.fetch(start, stop)
        if self.codes.stacked:
            return codes, files.read_stacked(self.scales[start:stop]), start
        whole = len(self.shape) == 2  # [out, in]: all of its few scales
        return codes, files.read(self.scales[0]) if whole else files.read(self.scales[0], start, stop), start

    def finish(self, raw: tuple[np.ndarray, np.ndarray, int], dtype: mx.Dtype | None) -> mx.array:
        """What fetch() gave, dequantized in float32 and then cast; dtype None keeps float32.

        Raises CheckpointError for a code that is NaN and a scale that is not finite.
        """
        codes, scales, start = raw
        scales = as_array(scales, self.scales[0].dtype).astype(mx.float32)
        self._check_scales(scales, start)
        shape = codes.shape
        codes = codes.reshape(-1, shape[-1])
        high = scales.shape[-2]  # rows of blocks of one expert
        scales = scales.reshape(-1, scales.shape[-1])
        inner = self.shape[-2]  # rows of one expert, or of the whole
        first = self.codes.half * inner if self.codes.half else 0
        step = max(1, _PIECE_VALUES // shape[-1])
        pieces = []
        for begin in range(0, len(codes), step):
            here = mx.array(codes[begin : begin + step])
            row = np.arange(begin, begin + len(here))
            if len(shape) == 2:
                block = (start + row) // self.block[0]
            else:
                block = row // inner * high + (first + row % inner) // self.block[0]
            if mx.any((here & 0x7F) == 0x7F).item():
                self._fail_at(codes, begin, start, inner)
            codes_here = mx.from_fp8(here, dtype=mx.float32)
            values = _scaled(codes_here, scales[mx.array(block)], self.block[1]).astype(dtype or mx.float32)
            mx.eval(values)
            pieces.append(values)
        joined = pieces[0] if len(pieces) == 1 else mx.concatenate(pieces)
        joined = joined.reshape(shape)
        mx.eval(joined)
        return joined

    def _check_scales(self, scales: mx.array, start: int) -> None:
        if mx.all(mx.isfinite(scales)).item():
            return
        which = 0
        if self.codes.stacked:
            good = mx.all(mx.isfinite(scales), axis=(1, 2)).tolist()
            which = start + good.index(False)
        raise CheckpointError(
            f"{self.scales[which]} holds NaN or infinite scales: this checkpoint is damaged, download it again"
        )

    def _fail_at(self, codes: np.ndarray, begin: int, start: int, inner: int) -> None:
        """Name the first NaN at or after row `begin` of codes [rows, in]."""
        row, column = next(
            (row, int(bad.argmax())) for row in range(begin, len(codes)) if (bad := codes[row] & 0x7F == 0x7F).any()
        )
        code, entry = int(codes[row, column]), self.codes.entries[0]
        place = [start + row, column]
        if len(self.shape) == 3:
            expert, row = start + row // inner, row % inner
            place = [expert, row + (self.codes.half or 0) * inner, column]
            if self.codes.stacked:
                entry, place = self.codes.entries[expert], place[1:]
        raise CheckpointError(
            f"{entry} holds NaN (the E4M3 code 0x{code:02X}) at {place}: this checkpoint is damaged, download it again"
        )


def with_scales(part: Part, entries: Mapping[str, Entry], suffix: str, block: Block, dtype: str) -> Fp8Part | str:
    """The part whose codes are `part`, with its scales, named like it and `suffix`; or what is wrong, in words."""
    scales = []
    for codes in part.entries:
        if len(codes.shape) < 2 or 0 in codes.shape:
            return f"{codes} of shape {list(codes.shape)} is FP8, which only matrices may be"
        name, shape = codes.name + suffix, blocks(codes.shape, block)
        scale = entries.get(name)
        if scale is None:
            wanted = f"{'/'.join(FLOATS)} {list(shape)}"
            return f"{codes} is FP8, and its scales {name} are in none of the files (expected {wanted})"
        if scale.dtype not in FLOATS or (scales and scale.dtype != scales[0].dtype):
            wanted = "/".join(FLOATS) if scale.dtype not in FLOATS else f"{scales[0].dtype} as its neighbours"
            return f"{scale} has dtype {scale.dtype}, expected {wanted}"
        if scale.shape != shape:
            return (
                f"{scale} has shape {list(scale.shape)}, expected {list(shape)}: a scale for each block of "
                f"{block[0]} x {block[1]} of {list(codes.shape)}"
            )
        scales.append(scale)
    return Fp8Part(part, tuple(scales), dtype, block)


def blocks(shape: Shape, block: Block) -> Shape:
    """Of the scales of a [.., out, in] tensor."""
    return (*shape[:-2], *(math.ceil(size / each) for size, each in zip(shape[-2:], block, strict=True)))


def _scaled(values: mx.array, scales: mx.array, each: int) -> mx.array:
    """values: [rows, in]; scales: [rows, blocks], one for `each` columns, the last block perhaps narrower."""
    rows, width = values.shape
    if width % each == 0:
        return (values.reshape(rows, -1, each) * scales[:, :, None]).reshape(rows, width)
    return values * mx.repeat(scales, each, axis=1)[:, :width]
