"""One of our tensors out of a GGUF: as MLX's packed arrays where those hold its blocks exactly, else as floats.

Knows how rows are read and how blocks become arrays. Knows neither names nor what a model needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import mlx.core as mx
import numpy as np

from mlx_qwen35.checkpoint import files
from mlx_qwen35.checkpoint.files import Entry
from mlx_qwen35.checkpoint.forms.grids import Factors
from mlx_qwen35.checkpoint.gguf.container import GgufTensor
from mlx_qwen35.checkpoint.gguf.decode import decode
from mlx_qwen35.checkpoint.gguf.grids import SIXTEEN, SPECS, scales_of, words_of
from mlx_qwen35.checkpoint.gguf.origins import Origin, Runs, tiled
from mlx_qwen35.checkpoint.inventory import FACTORS, Shape
from mlx_qwen35.checkpoint.part import DTYPES, FLOATS, Part, Passing, as_array
from mlx_qwen35.config import QuantSpec
from mlx_qwen35.errors import CheckpointError

VALUES, WORDS, SCALES, BIASES = "values", "words", "scales", "biases"
_BLOCKS_AT_ONCE = 1 << 20  # bytes of blocks that are taken apart together
_VALUES_AT_ONCE = 1 << 22  # in float32


@dataclass(frozen=True)
class GgufPart:
    """One of our tensors, or the words, scales or biases of one. shape: of that; take: which of these it is."""

    ours: str
    entries: tuple[Entry, ...]
    origin: Origin
    shape: Shape
    take: str = VALUES

    stacked = False
    shifted = False
    cuts = True

    @property
    def passing(self) -> Passing | None:
        """Experts are read past it where their bytes are all there is to their values (unpacking.py)."""
        return Passing() if self.origin.scale is None and self.origin.heads is None else None

    @property
    def kind(self) -> str:
        """As llama.cpp calls the type of the blocks."""
        return self.origin.tensor.kind.name

    @property
    def computed(self) -> bool:
        """Whether floats are made of blocks."""
        return self.take == VALUES and self.kind not in FLOATS

    @property
    def dtype(self) -> str:
        """As safetensors would call it; of values that are made of blocks what they most likely had once."""
        if self.take == WORDS:
            return "U32"
        if self.take == VALUES:
            return self.kind if self.kind in FLOATS else "BF16"
        return "U8" if SPECS[self.kind].mode != "affine" else "F16" if self.kind in SIXTEEN else "F32"

    @property
    def nbytes(self) -> int:
        """In the file; the blocks of a packed module count as its words."""
        return 0 if self.take in (SCALES, BIASES) else self.origin.nbytes

    @property
    def rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def growth(self) -> int:
        """Bytes that finish() makes of one of the file's, at most."""
        made = {VALUES: 32, WORDS: SPECS[self.kind].bits if self.take == WORDS else 0}.get(self.take, 8)
        return max(1, math.ceil(made / self.origin.tensor.kind.bits))

    def fetch(self, start: int = 0, stop: int | None = None) -> tuple[np.ndarray, int]:
        """The blocks of rows start..stop of axis 0, [rows of all axes but the last, bytes] uint8, and `start`."""
        stop = self.rows if stop is None else stop
        inner = self.origin.inner
        return read_rows(self.origin, self.entries[0], start * inner, stop * inner), start

    def finish(self, raw: tuple[np.ndarray, int], dtype: mx.Dtype | None) -> mx.array:
        """What fetch() gave, as our tensor, evaluated; dtype None: float32 of what is computed, else the file's.

        Raises CheckpointError where blocks hold a number that is NaN or infinite.
        """
        rows, start = raw
        shape = (len(rows) // max(self.origin.inner, 1), *self.shape[1:])
        if self.take == WORDS:
            made = mx.array(self._packed(rows, words_of, self._bits // 8).view(np.uint32))
        elif self.take == VALUES:
            made = self._values(rows, start, dtype)
        else:
            made = self._scales(rows)
            made = made.astype(dtype or made.dtype) if self.dtype in FLOATS else made
        made = made.reshape(shape)
        mx.eval(made)
        return made

    @property
    def _bits(self) -> int:
        """Of the words of one block."""
        return SPECS[self.kind].bits * self.origin.tensor.kind.values

    def _packed(self, rows: np.ndarray, take: Callable[[str, np.ndarray], np.ndarray], size: int) -> np.ndarray:
        """take() of the blocks of rows, `size` bytes of each block: [rows, bytes], groups in our order."""
        nbytes = self.origin.tensor.kind.nbytes
        blocks = rows.reshape(-1, nbytes)
        made = np.empty((len(blocks), size), np.uint8)
        step = max(1, _BLOCKS_AT_ONCE // nbytes)
        for begin in range(0, len(blocks), step):
            made[begin : begin + step] = take(self.kind, blocks[begin : begin + step])
        return self._in_order(made.reshape(len(rows), -1))

    def _scales(self, rows: np.ndarray) -> mx.array:
        blocks = rows.reshape(-1, self.origin.tensor.kind.nbytes)
        scales, biases = scales_of(self.kind, blocks)
        found = scales if self.take == SCALES else biases
        if SPECS[self.kind].mode == "affine":
            with np.errstate(over="ignore"):
                found = found.astype(np.float16 if self.kind in SIXTEEN else np.float32)
            self._check(found)
        return mx.array(self._in_order(np.ascontiguousarray(found).reshape(len(rows), -1)))

    def _in_order(self, rows: np.ndarray) -> np.ndarray:
        """[rows, n] of whole groups, with the columns of value heads in our order."""
        if self.origin.heads is None:
            return np.ascontiguousarray(rows)
        keys, values, _ = self.origin.heads
        apart = rows.reshape(len(rows), values, -1)
        return np.ascontiguousarray(apart[:, tiled(keys, values)]).reshape(len(rows), -1)

    def _values(self, rows: np.ndarray, start: int, dtype: mx.Dtype | None) -> mx.array:
        own = dtype or (mx.float32 if self.computed else DTYPES[self.dtype])
        if not self.computed and not self.origin.log and self.origin.scale is None:
            bare = np.ascontiguousarray(self._in_order(rows.view(_BARE[self.kind])))
            return as_array(bare, self.kind).astype(own)
        step = max(1, _VALUES_AT_ONCE // self.origin.width)
        scale = None if self.origin.scale is None else self._factors()
        pieces = []
        for begin in range(0, len(rows), step):
            values = self._in_order(decode(self.kind, rows[begin : begin + step]))
            if scale is not None:
                expert = start + np.arange(begin, begin + len(values)) // max(self.origin.inner, 1)
                values = values * (scale[expert, None] if scale.size > 1 else scale)
            self._check(values)
            if self.origin.log:
                values = log_of_minus(values)
            piece = mx.array(values).astype(own)
            mx.eval(piece)
            pieces.append(piece)
        return pieces[0] if len(pieces) == 1 else mx.concatenate(pieces)

    def _factors(self) -> np.ndarray:
        tensor = self.origin.scale
        if tensor.kind.name != "F32" or tensor.shape not in ((), (1,), self.shape[:1]):
            raise CheckpointError(
                f"{tensor} has shape {list(tensor.shape)} ({tensor.kind.name}), expected one factor, or one an expert: "
                "download the file again"
            )
        return read_all(tensor).view(np.float32).reshape(-1)

    def _check(self, numbers: np.ndarray) -> None:
        if not np.isfinite(numbers).all():
            raise CheckpointError(
                f"{self.origin.tensor} ({self.entries[0].name}) holds NaN or infinite values: this checkpoint is "
                "damaged, download it again"
            )


_BARE = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}


def packing(origin: Origin) -> QuantSpec | None:
    """How MLX packs what lies there without a loss; None where it does not."""
    spec = SPECS.get(origin.tensor.kind.name)
    if spec is None or origin.log or origin.scale is not None or len(origin.tensor.shape) < 2:
        return None
    if origin.heads is not None and origin.heads[2] % spec.group_size:
        return None  # groups would lie across two value heads that are not neighbours
    return spec


@dataclass(frozen=True)
class FactorPart(Part):
    """What the values of each expert are multiplied by: [E, 1], float32 whatever is computed in."""

    passing: ClassVar[Passing] = Passing(exact=True)


def factors_of(module: str, shape: Shape, scale: GgufTensor) -> FactorPart | Factors | None:
    """The factors of a packed module, one for all of it or one an expert; None: they are neither."""
    if scale.kind.name != "F32":
        return None
    entry = Entry(scale.name, scale.file, "F32", (1,), scale.offset, scale.nbytes)
    if len(shape) == 2 and scale.shape in ((), (1,)):
        return Factors(f"{module}{FACTORS}", (entry,), (1,), stacked=False)
    if len(shape) == 3 and scale.shape == shape[:1]:
        return FactorPart(f"{module}{FACTORS}", (replace(entry, shape=(shape[0], 1)),), (shape[0], 1))
    return None


def log_of_minus(values: np.ndarray) -> np.ndarray:
    """A_log of -exp(A_log): the bfloat16 of which that is the exponential within two roundings, else the float32.

    The logarithm of a rounded exponential need not give the number back; those that were bfloat16 it does.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        exact = np.log(-values.astype(np.float64)).astype(np.float32)
    bits = exact.view(np.uint32)
    short = ((bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)).view(np.float32)
    near = np.abs(np.exp(short.astype(np.float64)) + values) <= 2 * np.spacing(np.abs(values))
    return np.where(near, short, exact)


def read_rows(origin: Origin, entry: Entry, start: int, stop: int) -> np.ndarray:
    """Rows start..stop, in our order, of the tensor that something of ours lies in: [rows, bytes] uint8."""
    size = origin.row_bytes
    made = np.empty((stop - start, size), np.uint8)
    runs = origin.runs or ((0, stop),)
    stretches, at = [], 0
    for first, count in cut(runs, start, stop):
        stretches.append((origin.tensor.offset + first * size, made[at : at + count]))
        at += count
    return files.fill(entry, stretches, made)


def read_all(tensor: GgufTensor) -> np.ndarray:
    """All bytes of a small tensor."""
    entry = Entry(tensor.name, tensor.file, "U8", (tensor.nbytes,), tensor.offset, tensor.nbytes)
    return files.read(entry)


def cut(runs: Runs, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Of the rows that runs are of, in that order, those from start to stop."""
    at = 0
    for first, count in runs:
        begin, end = max(start, at), min(stop, at + count)
        if begin < end:
            yield first + begin - at, end - begin
        at += count
