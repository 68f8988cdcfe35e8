"""One of our tensors on its way from a source to a file: what holds it now, and what is written for it.

Knows how some rows of it become the bytes of the target. Knows neither where those are written nor who asks for which
rows: any thread may make any piece, and what it makes does not depend on the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from threading import Lock
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_qwen35.checkpoint.files import Entry
from mlx_qwen35.checkpoint.inventory import Shape
from mlx_qwen35.checkpoint.names import TARGET
from mlx_qwen35.checkpoint.part import FLOATS, AnyPart, Part
from mlx_qwen35.checkpoint.quantize import packed, unpack
from mlx_qwen35.config import QuantSpec
from mlx_qwen35.conversion.loss import Loss, loss
from mlx_qwen35.conversion.rounding import pack
from mlx_qwen35.conversion.staging import as_numpy, staging
from mlx_qwen35.conversion.write import TAGS, TensorSpec
from mlx_qwen35.errors import CheckpointError

PIECE_BYTES = 4 << 20  # of a source tensor in memory at a time, for each worker
# Bits of the exponent, all of which are set in NaN and infinity; and the integers that have as many bits.
_EXPONENT = {"F32": (0x7F800000, np.uint32), "F16": (0x7C00, np.uint16), "BF16": (0x7F80, np.uint16)}
_FITS_CACHE = 1 << 16  # values looked at together
_GPU = Lock()  # one command queue: threads that read and write overlap it, threads that compute take turns

Update = Callable[[mx.array, int, int], mx.array]


@dataclass(frozen=True)
class Task:
    """One of our tensors: the parts that hold it now and how it is to be quantized.

    parts: {"weight": ..} and, for a quantized source, "scales" and "biases". shape: unquantized. had, has: its
    quantization in the source and in the target. dtype: of the unquantized values in the target, scales and biases
    included. search: as quantize.pack() takes it. update: makes new float32 values of rows start..stop from the old
    ones, where an adapter changes them.
    """

    name: str
    parts: dict[str, AnyPart]
    shape: Shape
    had: QuantSpec | None
    has: QuantSpec | None
    dtype: mx.Dtype
    search: bool = False
    update: Update | None = None

    @property
    def carried(self) -> bool:
        """Whether nothing but the dtype of floats changes."""
        return self.had == self.has and self.update is None

    @property
    def is_same(self) -> bool:
        """Whether the target computes with the very values of the source."""
        floats = [part.dtype for part in self.parts.values() if part.dtype in FLOATS]
        if self.parts["weight"].computed or any(part.shifted for part in self._plain()):
            return self.carried and self.dtype == mx.float32
        return self.carried and all(tag == TAGS[self.dtype] for tag in floats)

    @property
    def nbytes(self) -> int:
        """In the source."""
        return sum(part.nbytes for part in self.parts.values())

    @property
    def rows(self) -> int:
        return self.parts["weight"].rows

    def specs(self) -> dict[str, TensorSpec]:
        """What is written for it: "weight" and, where it will be quantized, "scales" and "biases"."""
        name = TARGET.source(self.name).names[0]
        if self.has is None:
            return {"weight": TensorSpec(name, TAGS[self.dtype], self.shape)}
        stem = name.removesuffix(".weight")
        return {
            kind: TensorSpec(f"{stem}.{kind}", TAGS[self.dtype] if tags == FLOATS else tags[0], shape)
            for kind, (shape, tags) in packed(self.shape, self.has).items()
        }

    def pieces(self) -> Iterator[tuple[int, int]]:
        """Rows start..stop one after the other; how many depends on the tensor alone. Of what is packed anew they have
        as many values as of a bfloat16 source: those are float32 on the way."""
        weight, rows = self.parts["weight"], self.rows
        if not weight.cuts:
            yield 0, rows
            return
        step = max(1, PIECE_BYTES * rows // max(1, self.nbytes * weight.growth))
        if self.had and not self.carried:
            step = max(1, min(step, PIECE_BYTES // 2 * rows // max(1, math.prod(self.shape))))
        for start in range(0, rows, step):
            yield start, min(start + step, rows)

    def make(self, start: int, stop: int) -> tuple[dict[str, memoryview], Loss | None]:
        """The target's bytes of some rows, for each of specs(), and what quantizing them lost (None: they were not).

        The bytes may lie in memory that the next call on this thread takes. Raises CheckpointError for NaN and infinite
        values.
        """
        rows = max(1, self.rows)
        room = staging(*[-(-part.nbytes // rows) * (stop - start) for part in self._plain()])
        raw: dict[str, Any] = {
            kind: part.fetch(start, stop, room.empty) if isinstance(part, Part) else part.fetch(start, stop)
            for kind, part in self.parts.items()
        }
        for kind, part in self.parts.items():
            if isinstance(part, Part) and part.dtype in FLOATS:
                _check_finite(part, raw[kind], start)
        if self.carried and all(self._as_it_lies(part) for part in self.parts.values()):
            return {kind: _bytes_of(array) for kind, array in raw.items()}, None
        raw = {kind: room.as_mlx(found) if isinstance(found, np.ndarray) else found for kind, found in raw.items()}
        with _turn():
            arrays, lost = self._computed(raw, start, stop)
            return {kind: _bytes_of(self._numpy(array)) for kind, array in arrays.items()}, lost

    def _computed(self, raw: dict[str, Any], start: int, stop: int) -> tuple[dict[str, mx.array], Loss | None]:
        found = {
            kind: part.finish(raw.pop(kind), self._cast(part) if self.carried else None)
            for kind, part in self.parts.items()
        }
        for kind, part in self.parts.items():
            if not isinstance(part, Part) and TAGS[found[kind].dtype] in FLOATS:
                odd = first_odd(as_numpy(found[kind]), TAGS[found[kind].dtype])
                if odd is not None:
                    row = start + odd * len(found[kind]) // found[kind].size
                    raise CheckpointError(_damaged(part.entries[row if part.stacked else 0], ""))
        if self.carried:
            return found, None
        weight = unpack(found, self.had) if self.had else found["weight"]
        # What was computed is packed from float32: rounding it first would be a second loss.
        if self.update:
            weight = self.update(weight.astype(mx.float32), start, stop)
        meant = weight
        if not self.update and not self.had and not self.parts["weight"].computed:
            weight = weight.astype(self.dtype)
        found = pack(weight, self.has, dtype=self.dtype, search=self.search) if self.has else {"weight": weight}
        found = {k: a.astype(self.dtype) if TAGS[a.dtype] in FLOATS else a for k, a in found.items()}
        return found, loss(meant, found, self.has) if self.has else None

    def _numpy(self, array: mx.array) -> np.ndarray:
        values = as_numpy(array)
        if array.dtype == mx.float16 and first_odd(values, "F16") is not None:
            raise CheckpointError(
                f"{self.parts['weight'].entries[0]} has values that float16 does not hold: take dtype bfloat16"
            )
        return values

    def values(self, start: int, stop: int) -> mx.array:
        """Some rows as they count in the source, in float32."""
        found = {kind: part.finish(part.fetch(start, stop), None) for kind, part in self.parts.items()}
        weight = unpack(found, self.had) if self.had else found["weight"]
        return weight.astype(mx.float32)

    def _plain(self) -> list[Part]:
        return [part for part in self.parts.values() if isinstance(part, Part)]

    def _as_it_lies(self, part: AnyPart) -> bool:
        """Whether the target has the very bytes of the source."""
        if type(part) is not Part or part.axes or part.shifted:
            return False
        return part.dtype not in FLOATS or part.dtype == TAGS[self.dtype]

    def _cast(self, part: AnyPart) -> mx.Dtype | None:
        return self.dtype if part.dtype in FLOATS else None


def _turn() -> AbstractContextManager[object]:
    return nullcontext() if mx.default_device().type == mx.cpu else _GPU


def _check_finite(part: Part, raw: np.ndarray, start: int) -> None:
    """Name the first value of the rows from `start` that is NaN or infinite."""
    odd = first_odd(raw, part.dtype)
    if odd is None:
        return
    place = [int(i) for i in np.unravel_index(odd, raw.shape)]
    entry = part.entries[0]
    if part.stacked:
        entry, place = part.entries[start + place[0]], place[1:]
    elif place:
        place[0] += start
    if part.half is not None:
        place[1] += part.half * part.shape[1]
    raise CheckpointError(_damaged(entry, f" at {place}" if place else ""))


def _damaged(entry: Entry, where: str) -> str:
    return f"{entry} holds NaN or infinite values{where}: this checkpoint is damaged, download or train it again"


def first_odd(array: np.ndarray, tag: str) -> int | None:
    """Where in the flat array of a dtype the first value is that is NaN or infinite; None: all are numbers.

    With the sign bit clear these are the largest of the integers, with it set the largest of those without a sign.
    """
    exponent, bits = _EXPONENT[tag]
    values = array.reshape(-1).view(bits)
    signed = values.view(f"i{values.itemsize}")
    negative = exponent | 1 << 8 * values.itemsize - 1
    for begin in range(0, len(values), _FITS_CACHE):
        block = slice(begin, begin + _FITS_CACHE)
        if signed[block].max() >= exponent or values[block].max() >= negative:
            return begin + int(np.argmax(values[block] & bits(exponent) == exponent))
    return None


def _bytes_of(array: np.ndarray) -> memoryview:
    array = np.ascontiguousarray(array)
    return memoryview(array.reshape(-1)).cast("B") if array.size else memoryview(b"")
