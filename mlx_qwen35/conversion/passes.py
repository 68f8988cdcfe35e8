"""Passes over the values of many groups, of which a search for scales needs a few sums a group: by NumPy on a CPU, some
groups after the other, by MLX on a GPU.

Knows arrays of values, a row a group. Knows nothing of what the sums are for. On a CPU MLX's operations take two to
three times as long as NumPy's (docs/SPEED.md).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import numpy as np

Column = Any  # [N] of NumPy or MLX, float32: a number for each group
Pack = Callable[[Any], Any]  # codes uint8 [.., G] -> what is kept of them

_BLOCK = 1 << 17  # values
_LINE = 16  # floats of a processor's cache line


class HostPasses:
    """Passes over values [N, G]: float16 or float32, or uint16 that are the bits of bfloat16.

    They are worked on in blocks of some groups, turned so that a group lies in two columns, [G / 2, 2 N]. Two values or
    four move as one number, which makes turning cheap. A group's sum is one of columns then: half of the time of one of
    rows, and its bits do not depend on how many groups there are. Of bfloat16 four values are one number:

        3 2 1 0     ->  rows 0 .. G / 4     1 and 3 without their halves of these bits: 0 and 2
                        rows G / 4 ..       the upper halves: 1 and 3

    Between passes 16 bits stay 16 bits: memory that no cache holds takes longer than making float32 of them again.
    """

    xp = np

    def __init__(self, values: np.ndarray, dtype: mx.Dtype):
        """dtype: of scales and biases."""
        self._values, self._dtype, self.size = values, dtype, values.shape[1]
        self._rows = max(1, _BLOCK // self.size)
        self._bits = values.dtype == np.uint16
        self._together: Any = np.uint64 if self._bits or values.itemsize == 4 else np.uint32  # several values
        self._turned = _memory("turned", values.nbytes // 4)
        self._rooms = [_memory(name, min(self._rows * self.size, values.size)) for name in "ytq"]
        self._centre: Column = np.zeros(2 * len(values), np.float32)

    def ends(self) -> tuple[Column, Column]:
        """The least and the largest value of each group. The first of the passes."""
        found = self._room(2)
        for rows, _ in self._stretches():
            np.copyto(self._turned_of(rows), self._values[rows].view(self._together).T)
        for columns, y, _, _ in self._blocks():
            np.minimum.reduce(y, axis=0, out=found[0, columns])
            np.maximum.reduce(y, axis=0, out=found[1, columns])
        return np.minimum(found[0, ::2], found[0, 1::2]), np.maximum(found[1, ::2], found[1, 1::2])

    def look(
        self, centre: Column, inverse: Column, ratio: Column, offset: Column
    ) -> tuple[Column, Column, Column, Column]:
        """Sums of r, |r| and r |r|, and of s^2: r is how far inverse y is from the next integer, s how far ratio y +
        offset is. From now on y = value - centre. The second of the passes."""
        self._centre, inverse = _twice(centre), _twice(inverse)
        line, found = (_twice(ratio), _twice(offset)), self._room(4)
        for columns, y, t, q in self._blocks():
            r = np.multiply(y, inverse[columns], out=t)
            np.subtract(r, np.rint(r, out=q), out=r)
            size = np.abs(r, out=q)
            _sums(found[:3, columns], (r,), (size,), (r, size))
            s = _line(y, line, columns, t)
            np.subtract(s, np.rint(s, out=q), out=s)
            _sums(found[3:, columns], (s, s))
        return _added(found)

    def fit(
        self, ratio: Column, offset: Column, top: int, pack: Pack | None = None
    ) -> tuple[tuple[Column, ...], np.ndarray | None]:
        """Sums of r, q, q^2, r q and r^2: q is t = ratio y + offset as an integer 0..top, r = t - q. With them what
        pack() makes of q."""
        line, found, kept = (_twice(ratio), _twice(offset)), self._room(5), []
        for columns, y, t, q in self._blocks():
            _line(y, line, columns, t)
            np.clip(np.rint(t, out=q), 0, top, out=q)
            r = np.subtract(t, q, out=t)
            _sums(found[:, columns], (r,), (q,), (q, q), (r, q), (r, r))
            if pack is not None:
                kept.append(pack(self._codes(q)))
        return _added(found), np.concatenate(kept) if kept else None

    def codes(self, ratio: Column, offset: Column, top: int, pack: Pack) -> tuple[Column, Column, np.ndarray]:
        """The sums of r and r^2 of fit(), and what pack() makes of q."""
        line, found, kept = (_twice(ratio), _twice(offset)), self._room(2), []
        for columns, y, t, q in self._blocks():
            _line(y, line, columns, t)
            np.clip(np.rint(t, out=q), 0, top, out=q)
            r = np.subtract(t, q, out=t)
            _sums(found[:, columns], (r,), (r, r))
            kept.append(pack(self._codes(q)))
        return *_added(found), np.concatenate(kept)

    def settle(
        self, kept: np.ndarray, most: Column, ratio: Column, offset: Column, top: int, pack: Pack
    ) -> tuple[Column, np.ndarray]:
        """-> (in which groups the sum of r^2 is below `most`, `kept` with their codes in it): r is what is left of
        ratio y + offset when it is an integer 0..top. Only where `most` is above 0 there is anything to be settled."""
        better, some = np.zeros(len(most), bool), np.flatnonzero(most > 0)
        if len(some):
            turned = np.ascontiguousarray(self._values[some].view(self._together).T)
            t = self._floats(turned, np.empty((self.size // 2, 2 * len(some)), np.float32))
            t -= _twice(self._centre[2 * some])
            t *= _twice(ratio[some])
            t += _twice(offset[some])
            q = np.rint(t)
            np.clip(q, 0, top, out=q)
            t -= q
            found = np.einsum("km,km->m", t, t)
            better[some] = less = found[::2] + found[1::2] < most[some]
            kept[some[less]] = pack(self._codes(q)[less])
        return better, kept

    def rounded(self, column: Column) -> Column:
        """What of it is stored."""
        if self._dtype == mx.bfloat16:
            bits = column.view(np.uint32)
            return (bits + (0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).view(np.float32)
        return column.astype(np.float16).astype(np.float32) if self._dtype == mx.float16 else column

    @staticmethod
    def choose(mask: np.ndarray, one: Column, other: Column) -> Column:
        """As where(), which takes ten times as long: its branches cannot be foreseen."""
        chosen = mask.astype(np.uint32)
        np.negative(chosen, out=chosen)  # all bits or none
        bits = other.view(np.uint32)
        chosen &= one.view(np.uint32) ^ bits
        chosen ^= bits
        return chosen.view(np.float32)

    def _stretches(self) -> Iterator[tuple[slice, slice]]:
        """The groups of one block after the other, and their columns."""
        for start in range(0, len(self._values), self._rows):
            stop = min(start + self._rows, len(self._values))
            yield slice(start, stop), slice(2 * start, 2 * stop)

    def _turned_of(self, rows: slice) -> np.ndarray:
        width = self._values.strides[0] // 4
        turned = self._turned[rows.start * width : rows.stop * width].view(self._together)
        return turned.reshape(-1, rows.stop - rows.start)

    def _blocks(self) -> Iterator[tuple[slice, np.ndarray, np.ndarray, np.ndarray]]:
        """The columns of some groups, their y, and room for two arrays alike."""
        for rows, columns in self._stretches():
            shape = self.size // 2, columns.stop - columns.start
            y, t, q = (room[: math.prod(shape)].reshape(shape) for room in self._rooms)
            self._floats(self._turned_of(rows), y)
            if self._centre[columns].any():
                np.subtract(y, self._centre[columns], out=y)
            yield columns, y, t, q

    def _floats(self, turned: np.ndarray, out: np.ndarray) -> np.ndarray:
        if self._bits:
            pairs, bits = turned.view(np.uint32), out.view(np.uint32)
            np.left_shift(pairs, 16, out=bits[: len(pairs)])
            np.bitwise_and(pairs, 0xFFFF0000, out=bits[len(pairs) :])
        else:
            np.copyto(out, turned.view(self._values.dtype))
        return out

    def _codes(self, q: np.ndarray) -> np.ndarray:
        """Those of a block as uint8 [groups, G]. What q holds is lost."""
        if self._bits:
            upper, lower = q[len(q) // 2 :], q[: len(q) // 2]
            upper *= 256
            lower += upper
            fours = lower.astype(np.uint16).view(np.uint32)
            return np.ascontiguousarray(fours.T).view(np.uint8)
        return np.ascontiguousarray(q.astype(np.uint8).view(np.uint16).T).view(np.uint8)

    def _room(self, sums: int) -> np.ndarray:
        return _aligned(sums * 2 * len(self._values)).reshape(sums, -1)


class DevicePasses:
    """The same over an MLX array [N, G], on MLX's default device."""

    xp = mx

    def __init__(self, values: mx.array, dtype: mx.Dtype):
        self._dtype, self.size = dtype, values.shape[1]
        self._y = values.astype(mx.float32)

    def ends(self) -> tuple[Column, Column]:
        return self._y.min(-1), self._y.max(-1)

    def look(
        self, centre: Column, inverse: Column, ratio: Column, offset: Column
    ) -> tuple[Column, Column, Column, Column]:
        self._y = self._y - centre[:, None]
        r = self._y * inverse[:, None]
        r = r - mx.round(r)
        s = self._t(ratio, offset)
        s = s - mx.round(s)
        return r.sum(-1), mx.abs(r).sum(-1), (r * mx.abs(r)).sum(-1), (s * s).sum(-1)

    def fit(
        self, ratio: Column, offset: Column, top: int, pack: Pack | None = None
    ) -> tuple[tuple[Column, ...], mx.array | None]:
        t = self._t(ratio, offset)
        q = mx.clip(mx.round(t), 0, top)
        r = t - q
        sums = r.sum(-1), q.sum(-1), (q * q).sum(-1), (r * q).sum(-1), (r * r).sum(-1)
        return sums, None if pack is None else pack(q.astype(mx.uint8))

    def codes(self, ratio: Column, offset: Column, top: int, pack: Pack) -> tuple[Column, Column, mx.array]:
        t = self._t(ratio, offset)
        q = mx.clip(mx.round(t), 0, top)
        return (t - q).sum(-1), mx.square(t - q).sum(-1), pack(q.astype(mx.uint8))

    def settle(
        self, kept: mx.array, most: Column, ratio: Column, offset: Column, top: int, pack: Pack
    ) -> tuple[Column, mx.array]:
        t = self._t(ratio, offset)
        q = mx.clip(mx.round(t), 0, top)
        better = mx.square(t - q).sum(-1) < most
        return better, mx.where(better[:, None], pack(q.astype(mx.uint8)), kept)

    def rounded(self, column: Column) -> Column:
        return column.astype(self._dtype).astype(mx.float32)

    @staticmethod
    def choose(mask: mx.array, one: Column, other: Column) -> Column:
        return mx.where(mask, one, other)

    def _t(self, ratio: Column, offset: Column) -> mx.array:
        return (self._y if ratio is None else self._y * ratio[:, None]) + offset[:, None]


Passes = HostPasses | DevicePasses

_THREADS = threading.local()


def _memory(name: str, count: int) -> np.ndarray:
    """Room for so many floats, a thread's own under that name. What was in it is lost."""
    memory: np.ndarray | None = getattr(_THREADS, name, None)
    if memory is None or len(memory) < count:
        memory = _aligned(count)
        setattr(_THREADS, name, memory)
    return memory[:count]


def _aligned(count: int) -> np.ndarray:
    """Floats that begin with a line of the cache: where wide loads cross one, what is multiplied takes half as long
    again."""
    memory = np.empty(count + _LINE, np.float32)
    begin = -memory.ctypes.data // 4 % _LINE
    return memory[begin : begin + count]


def _line(y: np.ndarray, line: tuple[np.ndarray, np.ndarray], columns: slice, out: np.ndarray) -> np.ndarray:
    ratio, offset = line
    np.multiply(y, ratio[columns], out=out)
    return np.add(out, offset[columns], out=out)


def _sums(found: np.ndarray, *terms: tuple[np.ndarray, ...]) -> None:
    """Of the columns of arrays, or of products of two."""
    for place, term in zip(found, terms, strict=True):
        np.einsum("km,km->m" if len(term) > 1 else "km->m", *term, out=place)


def _added(found: np.ndarray) -> tuple[Column, ...]:
    """Of both columns of each group."""
    return tuple(found[:, ::2] + found[:, 1::2])


def _twice(column: Column) -> np.ndarray:
    """A number for both columns of its group."""
    found = _aligned(2 * len(column))
    found[::2] = found[1::2] = column
    return found
