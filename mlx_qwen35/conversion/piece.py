"""A piece of a conversion: some rows of a tensor and the file that they go to.

Knows how they get there and how to see whether they did. Pieces have nothing to do with each other: threads may take
them in any order.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlx_qwen35.conversion.loss import Loss
from mlx_qwen35.conversion.plan import Plan
from mlx_qwen35.conversion.task import Task
from mlx_qwen35.conversion.write import SafetensorsFile

_BLOCK = 4096  # bytes, of which a checksum has a sum


@dataclass(frozen=True)
class Piece:
    """Rows start..stop of a task's tensors."""

    task: Task
    start: int
    stop: int
    file: SafetensorsFile

    @property
    def name(self) -> str:
        return f"{self.task.name}:{self.start}"

    @property
    def nbytes(self) -> int:
        """In the source; of all pieces of a tensor together as many as it has."""
        whole, rows = self.task.nbytes, self.task.rows
        return whole * self.stop // rows - whole * self.start // rows

    def write(self) -> tuple[list[str], Loss | None]:
        """Make it and put it in its place; the checksums of what was written, and what quantizing lost."""
        made, lost = self.task.make(self.start, self.stop)
        sums = []
        for kind, spec in self.task.specs().items():
            self.file.write(spec.name, made[kind], spec.nbytes * self.start // self.task.rows)
            sums.append(checksum(made[kind]))
        return sums, lost

    def found(self) -> list[str]:
        """The checksums of what lies in its place."""
        sums = []
        for spec in self.task.specs().values():
            begin, end = (spec.nbytes * row // self.task.rows for row in (self.start, self.stop))
            sums.append(checksum(self.file.read(spec.name, begin, end - begin)))
        return sums


def checksum(data: bytes | memoryview) -> str:
    """Against accidents: a disk that lost, mixed up or damaged what was written.

    CRC-32 of the sums of all blocks, and of the sums of the words at each place of a block: of every byte it would take
    a third of the time of a plain copy.
    """
    whole = len(data) // _BLOCK * _BLOCK
    words = np.frombuffer(data, np.uint64, whole // 8).reshape(-1, _BLOCK // 8)
    found = zlib.crc32(words.sum(axis=0), zlib.crc32(words.sum(axis=1)))
    return f"{zlib.crc32(memoryview(data)[whole:], found):08x}"


def safetensors_files(plan: Plan, folder: Path) -> dict[str, SafetensorsFile]:
    """The files of a plan, in `folder`; none is touched yet."""
    return {name: SafetensorsFile(folder / name, specs) for name, specs in plan.files.items()}


def pieces(plan: Plan, files: Mapping[str, SafetensorsFile]) -> Iterator[Piece]:
    """All pieces of a plan, in the order of their tasks."""
    home = {spec.name: files[name] for name, specs in plan.files.items() for spec in specs}
    for task in plan.tasks:
        file = home[next(iter(task.specs().values())).name]
        for start, stop in task.pieces():
            yield Piece(task, start, stop, file)


