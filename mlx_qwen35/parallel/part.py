"""A part of one of a checkpoint's tensors, as a rank reads it: of the files only the rows that it holds.

Knows parts of checkpoints and cuts. Knows no plan.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_qwen35.checkpoint.files import Entry
from mlx_qwen35.checkpoint.part import AnyPart
from mlx_qwen35.parallel.cuts import Cut


@dataclass(frozen=True)
class CutPart:
    """What `read_weights` needs of a part, for some of its rows and columns. Columns are read whole, and cut in memory.
    """

    part: AnyPart
    cut: Cut

    @property
    def ours(self) -> str:
        return self.part.ours

    @property
    def entries(self) -> tuple[Entry, ...]:
        return self.part.entries

    @property
    def dtype(self) -> str:
        return self.part.dtype

    @property
    def _rows(self) -> tuple[tuple[int, int], ...] | None:
        """None: all. Factors of one for all rows are whole."""
        return None if self.cut.rows is None or self.part.rows == 1 else self.cut.rows

    @property
    def nbytes(self) -> int:
        """That are read."""
        if self._rows is None or not self.part.cuts:
            return self.part.nbytes
        return self.part.nbytes * sum(stop - start for start, stop in self._rows) // max(self.part.rows, 1)

    def fetch(self) -> list[Any]:
        if self._rows is None or not self.part.cuts:
            return [self.part.fetch()]
        return [self.part.fetch(start, stop) for start, stop in self._rows if start < stop]

    def finish(self, raw: list[Any], dtype: mx.Dtype | None) -> mx.array:
        made = [self.part.finish(each, dtype) for each in raw]
        raw.clear()
        if self._rows is not None and not self.part.cuts:
            made = [made[0][start:stop] for start, stop in self._rows]
        x = made[0] if len(made) == 1 else mx.concatenate(made)
        if self.cut.columns is not None:
            first, stop, count = self.cut.columns
            width = x.shape[-1]
            x = x[..., width * first // count : width * stop // count]
        if self.cut.columns is not None or not self.part.cuts:
            x = mx.contiguous(x)
        mx.eval(x)
        return x
