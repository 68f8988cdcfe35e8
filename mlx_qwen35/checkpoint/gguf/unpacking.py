"""Experts of a GGUF as streaming reads them: where each lies, and what becomes of its blocks in memory.

Knows one tensor that holds all experts of a layer. Reads nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from mlx_qwen35.checkpoint.gguf.decode import decode
from mlx_qwen35.checkpoint.gguf.grids import SIXTEEN, SPECS, scales_of, words_of
from mlx_qwen35.checkpoint.gguf.part import BIASES, SCALES, VALUES, GgufPart
from mlx_qwen35.checkpoint.gguf.types import KINDS, NUMBERS
from mlx_qwen35.checkpoint.quantize import packed
from mlx_qwen35.experts.layout import Extent, Tensor


@dataclass(frozen=True)
class Blocks:
    """What makes the arrays of a projection of its blocks. kind: their type; shape: of one expert's weight."""

    kind: str
    shape: tuple[int, ...]
    decoded: bool

    @property
    def unit(self) -> int:
        return KINDS[NUMBERS[self.kind]].nbytes

    @property
    def arrays(self) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
        if self.decoded:
            return (("weight", "F32", self.shape),)
        floats = "F16" if self.kind in SIXTEEN else "F32"
        made = packed(self.shape, SPECS[self.kind]).items()
        return tuple((kind, tags[0] if tags[0] in ("U32", "U8") else floats, shape) for kind, (shape, tags) in made)

    def unpack(self, raw: memoryview) -> tuple[np.ndarray, ...]:
        """Whole blocks as the words, scales and biases of MLX, or as values, floats in float32."""
        blocks = np.frombuffer(raw, np.uint8).reshape(-1, self.unit)
        if self.decoded:
            return (decode(self.kind, blocks),)
        scales, biases = scales_of(self.kind, blocks)
        words = words_of(self.kind, blocks)
        return (words, scales) if biases is None else (words, scales, biases)


def expert_tensor(part: GgufPart, name: str) -> tuple[Tensor, Extent, int] | None:
    """(a projection of one expert, where expert 0 has it, bytes to the next); None: another part brings it along.

    name: of the part, such as "gate_proj.weight".
    """
    if part.take in (SCALES, BIASES):
        return None
    origin, tensor = part.origin, part.origin.tensor
    size = origin.inner * origin.row_bytes
    first = origin.runs[0][0] if origin.runs else 0
    step = size * (math.prod(tensor.shape[:-1]) // (origin.shape[0] * origin.inner))
    made = Blocks(tensor.kind.name, origin.shape[1:], part.take == VALUES)
    shape = (origin.inner, origin.row_bytes)
    stem = name.rpartition(".")[0]
    place = Extent(tensor.file, tensor.offset + first * origin.row_bytes, size)
    return Tensor(f"{stem}.blocks", "U8", shape, made=made), place, step

