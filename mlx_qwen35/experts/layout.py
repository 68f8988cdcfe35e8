"""Where an expert's bytes lie, and in which pieces they are best read.

Knows files by name, offsets and sizes. Knows neither checkpoints nor their headers, and opens nothing.

    tensors of a layer    gate_proj.weight   gate_proj.scales   ...   down_proj.biases     the same for every expert
    an expert             an extent          an extent                an extent            where they are in the files
    jobs                  [chunk, chunk, ..] [chunk] ...                                   what one thread reads

Extents that follow one another in a file become one chunk, and with it one system call; a chunk that is larger than a
job becomes several, so that threads share one expert when there is only one to be read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np

from .cast import Step

ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "U32": 4, "U8": 1}
_PAD = 64  # bytes between two parts of a record that are read along: fewer than this
_CUT = 4096  # pieces of one tensor begin at multiples of this


class Unpacker(Protocol):
    """What makes arrays of a tensor's bytes that no kernel reads as they lie. Two that are equal do the same.

    unit: bytes that belong together. arrays: what the tensor of one expert becomes: (kind, dtype, shape) of each, kind
    such as "weight"; as many bytes of each array come of any unit.
    """

    @property
    def unit(self) -> int: ...
    @property
    def arrays(self) -> tuple[tuple[str, str, tuple[int, ...]], ...]: ...

    def unpack(self, raw: memoryview) -> tuple[np.ndarray, ...]:
        """The items of each array that some whole units make: packed ones as they are, floats as float32."""


@dataclass(frozen=True)
class Tensor:
    """One tensor of one expert. name: such as "gate_proj.weight"; dtype: as safetensors calls it; shape: of one.

    step: what becomes of its bytes on their way into memory beside a cast. exact: floats that stay as they are whatever
    is computed in. made: what makes the arrays of a projection of it; None: it is one of them.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    step: Step | None = None
    exact: bool = False
    made: Unpacker | None = None

    @property
    def cut(self) -> int:
        """It is read in pieces that begin at multiples of so many bytes."""
        return _CUT if self.made is None else -(-_CUT // self.made.unit) * self.made.unit

    @property
    def nbytes(self) -> int:
        """In the file."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Fixed:
    """A tensor of every expert that lies nowhere: one number. dtype: "U8", or a float's."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    value: int


@dataclass(frozen=True)
class Extent:
    """Bytes that follow one another. offset: from the start of the file."""

    file: Path
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Piece:
    """Bytes start .. stop of a tensor, by its number; tensor None: padding, whose bytes nobody wants."""

    tensor: int | None
    start: int
    stop: int


@dataclass(frozen=True)
class Chunk:
    """Pieces that follow one another in a file: those of expert e begin at offset + e * step."""

    file: Path
    offset: int
    step: int
    pieces: tuple[Piece, ...]

    @cached_property
    def nbytes(self) -> int:
        return sum(piece.stop - piece.start for piece in self.pieces)

    @cached_property
    def slices(self) -> tuple[tuple[int, slice], ...] | None:
        """(tensor, which bytes of it) of each piece; None if there is padding among them."""
        if any(piece.tensor is None for piece in self.pieces):
            return None
        return tuple((piece.tensor, slice(piece.start, piece.stop)) for piece in self.pieces)


Job = tuple[Chunk, ...]


@dataclass(frozen=True)
class LayerLayout:
    """The experts of one layer.

    places: for each expert its extents, one a tensor in order. Where experts follow one another at even distances, as
    in a stacked tensor, only those of expert 0 are given, and steps: bytes from one expert to the next, by tensor.
    fixed: tensors that are not read.
    Raises ValueError if they do not belong together.
    """

    layer: int
    num_experts: int
    tensors: tuple[Tensor, ...]
    places: tuple[tuple[Extent, ...], ...]
    steps: tuple[int, ...] | None = None
    fixed: tuple[Fixed, ...] = ()

    def __post_init__(self) -> None:
        if len(self.places) != (self.num_experts if self.steps is None else 1):
            raise ValueError(f"layer {self.layer}: {len(self.places)} places for {self.num_experts} experts")
        sizes = [tensor.nbytes for tensor in self.tensors]
        if any([extent.nbytes for extent in place] != sizes for place in self.places):
            raise ValueError(f"layer {self.layer}: extents and tensors are not of one size")
        if self.steps is not None and len(self.steps) != len(sizes):
            raise ValueError(f"layer {self.layer}: {len(self.steps)} steps for {len(sizes)} tensors")

    def part(self, first: int, stop: int) -> LayerLayout:
        """Experts first .. stop alone, which count from 0 there."""
        places = (self.extents(first),) if self.steps is not None else self.places[first:stop]
        return LayerLayout(self.layer, stop - first, self.tensors, places, self.steps, self.fixed)

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file with bytes of these experts, once."""
        return tuple(dict.fromkeys(extent.file for place in self.places for extent in place))

    def extents(self, expert: int) -> tuple[Extent, ...]:
        """Where an expert's tensors lie, in order; raises IndexError for an expert that is not there."""
        self._check(expert)
        if self.steps is None:
            return self.places[expert]
        moved = zip(self.places[0], self.steps, strict=True)
        return tuple(Extent(extent.file, extent.offset + expert * step, extent.nbytes) for extent, step in moved)

    def end(self, file: Path) -> int:
        """The smallest size that a file can have and hold these experts, in bytes."""
        last = (self.num_experts - 1) if self.steps else 0
        steps = self.steps or (0,) * len(self.tensors)
        ends = (
            extent.offset + last * step + extent.nbytes
            for place in self.places
            for extent, step in zip(place, steps, strict=True)
            if extent.file == file
        )
        return max(ends, default=0)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Bytes of each tensor of one expert, as they are in the file."""
        return tuple(tensor.nbytes for tensor in self.tensors)

    @property
    def expert_bytes(self) -> int:
        """Of one expert, as it is in the file."""
        return sum(self.sizes)

    @cached_property
    def read_bytes(self) -> int:
        """What reading one expert takes off the disk: its bytes, and the padding between parts of a packed record."""
        return max(sum(chunk.nbytes for chunk in self._chunks(number)) for number in range(len(self.places)))

    def jobs(self, expert: int, size: int) -> tuple[Job, ...]:
        """An expert's chunks, dealt out in jobs of about `size` bytes; to be read at chunk.offset + expert * step."""
        self._check(expert)
        if self.steps is None:
            return deal(self._chunks(expert), size, self._cuts)
        made = self._dealt.get(size)
        if made is None:
            made = self._dealt[size] = deal(self._chunks(0), size, self._cuts)
        return made

    @cached_property
    def _dealt(self) -> dict[int, tuple[Job, ...]]:
        return {}

    @cached_property
    def _cuts(self) -> tuple[int, ...]:
        return tuple(tensor.cut for tensor in self.tensors)

    def _chunks(self, number: int) -> list[Chunk]:
        return join(self.places[number], self.steps or (0,) * len(self.tensors))

    def _check(self, expert: int) -> None:
        if not 0 <= expert < self.num_experts:
            raise IndexError(f"layer {self.layer} has experts 0 to {self.num_experts - 1}, not {expert}")


def join(extents: Sequence[Extent], steps: Sequence[int]) -> list[Chunk]:
    """The extents of one expert as chunks, in the order of the files: neighbours, and what only padding parts.

    Neighbours of one expert are neighbours of all only where their steps are equal.
    """
    chunks: list[Chunk] = []
    order = sorted(range(len(extents)), key=lambda n: (str(extents[n].file), extents[n].offset))
    for n in order:
        extent, step = extents[n], steps[n]
        piece = Piece(n, 0, extent.nbytes)
        last = chunks[-1] if chunks else None
        if last is not None and (last.file, last.step) == (extent.file, step):
            gap = extent.offset - last.offset - last.nbytes
            if 0 <= gap < _PAD:
                pad = (Piece(None, 0, gap),) if gap else ()
                chunks[-1] = Chunk(last.file, last.offset, step, (*last.pieces, *pad, piece))
                continue
        chunks.append(Chunk(extent.file, extent.offset, step, (piece,)))
    return chunks


def deal(chunks: Sequence[Chunk], size: int, cuts: Sequence[int] = ()) -> tuple[Job, ...]:
    """Chunks in jobs of nearly the same size: as many as there are times `size` bytes in them, but at least one.

        chunks      aaaaaaaa bbb ccccc      with jobs of six:   aaaaaa | aa bbb c | cccc

    A tensor is cut only at multiples of 4 KiB from its start, or of what `cuts` says of it, so that none of its items
    is; a job may be that much larger.
    """
    total = sum(chunk.nbytes for chunk in chunks)
    share = math.ceil(total / max(1, total // size))
    jobs: list[list[Chunk]] = [[]]
    room = share
    for chunk in chunks:
        begin = offset = chunk.offset
        pieces: list[Piece] = []
        for piece in chunk.pieces:
            start = piece.start
            cut = _CUT if piece.tensor is None or not cuts else cuts[piece.tensor]
            while start < piece.stop:
                if room <= 0:
                    if pieces:
                        jobs[-1].append(Chunk(chunk.file, begin, chunk.step, tuple(pieces)))
                    begin, pieces = offset, []
                    jobs.append([])
                    room = share
                stop = min(piece.stop, start + room + -(start + room) % cut)
                if piece.stop - stop < cut:
                    stop = piece.stop
                pieces.append(Piece(piece.tensor, start, stop))
                room -= stop - start
                offset += stop - start
                start = stop
        jobs[-1].append(Chunk(chunk.file, begin, chunk.step, tuple(pieces)))
    return tuple(tuple(job) for job in jobs)
