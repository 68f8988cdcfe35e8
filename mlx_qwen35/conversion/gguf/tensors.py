"""The tensors of a GGUF file, and how pieces of them are made of a source's and put in their places.

Knows how values become blocks and where rows lie. Knows neither metadata nor which files there are. Pieces have nothing
to do with each other: threads may take them in any order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from mlx_qwen35.checkpoint.gguf.types import Kind
from mlx_qwen35.checkpoint.inventory import Shape
from mlx_qwen35.config import TextConfig
from mlx_qwen35.conversion.gguf.blocks import Overflow, encode, faint
from mlx_qwen35.conversion.gguf.named import Named, named
from mlx_qwen35.conversion.gguf.outtype import kind_of
from mlx_qwen35.conversion.piece import checksum
from mlx_qwen35.conversion.task import Task
from mlx_qwen35.conversion.write import PlacedFile
from mlx_qwen35.errors import CheckpointError

_AT_ONCE = 1 << 20  # values of a piece, and those that are quantized together


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file. shape: as torch has it; task: gives its float32 values, rows as ours lie."""

    named: Named
    kind: Kind
    shape: Shape
    task: Task

    @property
    def name(self) -> str:
        return self.named.name

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) // self.kind.values * self.kind.nbytes

    @property
    def row_bytes(self) -> int:
        return self.nbytes // self.shape[0]

    def pieces(self) -> Iterator[tuple[int, int]]:
        """Rows start..stop of the task, one after the other."""
        rows = self.task.rows
        step = next(self.task.pieces())[1]
        if step < rows:  # else it is small, or cannot be read in pieces
            step = min(step, max(1, _AT_ONCE // math.prod(self.shape[1:])))
        for start in range(0, rows, step):
            yield start, min(start + step, rows)

    def make(self, start: int, stop: int) -> tuple[np.ndarray, tuple[int, int]]:
        """The bytes of some rows of the task, [rows, row_bytes], and what faint() says of them. Raises CheckpointError
        for NaN and infinite values, and for those that the type does not hold."""
        made, _ = self.task.make(start, stop)
        values = np.frombuffer(made["weight"], np.float32).reshape(stop - start, *self.task.shape[1:])
        if self.named.change:
            values = self.named.change(values)
        if self.named.columns is not None:
            values = values[:, self.named.columns]
        flat = values.reshape(-1, values.shape[-1]) if values.ndim > 1 else values[:, None]
        step = max(1, _AT_ONCE // flat.shape[1])
        try:
            parts = [flat[begin : begin + step] for begin in range(0, len(flat), step)]
            found = [encode(part, self.kind.name) for part in parts]
        except Overflow:
            raise CheckpointError(
                f"{self.task.parts['weight'].entries[0]} has values that {self.kind.name} does not hold: take "
                "--outtype bf16 (outtype='bf16')"
            ) from None
        counts = [faint(made, part, self.kind.name) for made, part in zip(found, parts, strict=True)]
        few, blocks = (sum(column) for column in zip(*counts, strict=True))
        return np.concatenate(found).reshape(stop - start, -1), (few, blocks)

    def runs(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """Where rows start..stop of the task lie: (first, end, its row here) of each run, first and end from start."""
        if self.named.rows is None:
            return [(0, stop - start, start)]
        rows = self.named.rows[start:stop]
        begins = [0, *(np.flatnonzero(np.diff(rows) != 1) + 1).tolist(), len(rows)]
        return [(a, b, int(rows[a])) for a, b in zip(begins[:-1], begins[1:], strict=True)]


@dataclass(frozen=True)
class GgufPiece:
    """Rows start..stop of the task of a tensor, and the file that they go to."""

    tensor: Tensor
    start: int
    stop: int
    file: PlacedFile

    @property
    def name(self) -> str:
        return f"{self.tensor.name}:{self.start}"

    @property
    def nbytes(self) -> int:
        """In the source; of all pieces of a tensor together as many as it has."""
        whole, rows = self.tensor.task.nbytes, self.tensor.task.rows
        return whole * self.stop // rows - whole * self.start // rows

    def write(self) -> tuple[list[str], tuple[int, int]]:
        """Make it and put it in its place; the checksum of what was written, and how many blocks are faint, of how
        many."""
        made, counts = self.tensor.make(self.start, self.stop)
        for begin, end, row in self.tensor.runs(self.start, self.stop):
            self.file.write(self.tensor.name, memoryview(made[begin:end]).cast("B"), row * self.tensor.row_bytes)
        return [checksum(memoryview(made).cast("B"))], counts

    def found(self) -> list[str]:
        """The checksum of what lies in its place."""
        width = self.tensor.row_bytes
        data = [
            self.file.read(self.tensor.name, row * width, (end - begin) * width)
            for begin, end, row in self.tensor.runs(self.start, self.stop)
        ]
        return [checksum(b"".join(data))]


def tensors_of(tasks: Iterable[Task], text: TextConfig, outtype: str) -> list[Tensor]:
    """The tensors that hold those of some tasks, each of which gives float32. outtype: as read_outtype() gives it."""
    found = []
    for task in tasks:
        for one in named(task.name, text):
            shape = task.shape
            if one.change:
                shape = (shape[0], *one.change(np.zeros((1, *shape[1:]), np.float32)).shape[1:])
            kind = kind_of(one.name, shape, outtype, tied=text.tie_word_embeddings)
            found.append(Tensor(one, kind, shape, task))
    return found
