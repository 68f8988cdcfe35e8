"""The patch embedding of a vision tower: llama.cpp writes its two frames as two tensors.

    v.patch_embd.weight    [V, C, P, P]   of the first frame       ours: [V, T, P, P, C]
    v.patch_embd.weight.1  [V, C, P, P]   of the second
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_qwen35.checkpoint import files
from mlx_qwen35.checkpoint.files import Entry
from mlx_qwen35.checkpoint.inventory import Shape
from mlx_qwen35.checkpoint.part import DTYPES, OfEntries, as_array


@dataclass(frozen=True)
class FramesPart(OfEntries):
    """The patch embedding out of its frames. entries: of the frames, as [V, C, P, P]."""

    ours: str
    entries: tuple[Entry, ...]

    stacked = False
    shifted = False
    computed = False
    cuts = True
    passing = None
    growth = 1

    @property
    def shape(self) -> Shape:
        wide, channels, *patch = self.entries[0].shape
        return (wide, len(self.entries), *patch, channels)

    @property
    def dtype(self) -> str:
        return self.entries[0].dtype

    def fetch(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """[T, rows, C, P, P] as they lie in the file."""
        return np.stack([files.read(entry, start, stop) for entry in self.entries])

    def finish(self, raw: np.ndarray, dtype: mx.Dtype | None) -> mx.array:
        made = as_array(raw, self.dtype).transpose(1, 0, 3, 4, 2)
        made = mx.contiguous(made.astype(dtype or DTYPES[self.dtype]))
        mx.eval(made)
        return made
