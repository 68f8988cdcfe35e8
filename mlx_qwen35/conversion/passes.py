"""Passes over the values of many groups, of which a search for scales needs a few sums a group: by NumPy on a CPU, some
groups after the other, by MLX on a GPU.

Knows arrays of values, a row a group. Knows nothing of what the sums are for. On a CPU MLX's operations take two to
three times as long as NumPy's (docs/SPEED.md).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

Column = Any  # [N] of NumPy or MLX, float32: a number for each group
Pack = Callable[[Any], Any]  # codes -> what is kept of them: [N, G] uint8 of MLX, [N, G / 2] uint16 pairs of NumPy

_BLOCK = 1 << 16  # values: three arrays of them lie in a core's cache
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

    def __init__(self, values: np.ndarray, dtype: mx.Dtype, bits: int, words: np.ndarray | None = None):
        """dtype: of scales and biases. bits: of a code; a pair of them is first + second * 2^bits. words: for what is
        packed, uint32 [N, G * bits / 32]."""
        self._values, self._dtype, self.size = values, dtype, values.shape[1]
        self._second = 1 << bits
        self._words = np.empty((len(values), self.size * bits // 32), np.uint32) if words is None else words
        self._bits = values.dtype == np.uint16
        self._together: Any = np.uint64 if self._bits or values.itemsize == 4 else np.uint32  # several values
        self._far: Column | None = None
        turned, step = memory("turned", values.nbytes // 4), max(1, _BLOCK // self.size)
        self._blocks = []
        for start in range(0, len(values), step):
            stop = min(start + step, len(values))
            if stop - start != (len(self._blocks[0].source) if self._blocks else 0):
                rooms = [memory(name, (stop - start) * self.size).reshape(self.size // 2, -1) for name in "ytq"]
            some = turned[start * values.strides[0] // 4 : stop * values.strides[0] // 4]
            some = some.view(self._together).reshape(-1, stop - start)
            rows, columns = slice(start, stop), slice(2 * start, 2 * stop)
            self._blocks.append(_Block(rows, columns, values[rows], some, *rooms))

    def ends(self) -> tuple[Column, Column]:
        """The least and the largest value of each group. The first of the passes."""
        found = self._room(2)
        for block in self._blocks:
            np.copyto(block.turned, block.source.view(self._together).T)
            y = self._filled(block)
            np.minimum.reduce(y, axis=0, out=found[0, block.columns])
            np.maximum.reduce(y, axis=0, out=found[1, block.columns])
        return np.minimum(found[0, ::2], found[0, 1::2]), np.maximum(found[1, ::2], found[1, 1::2])

    def look(
        self, centre: Column, inverse: Column, ratio: Column, offset: Column, part: int = 1
    ) -> tuple[Column, Column, Column, Column]:
        """Sums of r, |r| and r |r|, and of s^2: r is how far inverse y is from the next integer, s how far ratio y +
        offset is, of one value of `part`. From now on y = value - centre. The second of the passes."""
        self._far = _twice(centre) if centre.any() else None
        inverse, line, found = _twice(inverse), (_twice(ratio), _twice(offset)), self._room(4)
        few = slice(0, self.size // 2 // part)
        for block in self._blocks:
            y, t, q, columns = self._filled(block), block.t, block.q, block.columns
            r = np.multiply(y, inverse[columns], out=t)
            np.subtract(r, np.rint(r, out=q), out=r)
            size = np.abs(r, out=q)
            np.add.reduce(r, axis=0, out=found[0, columns])
            np.add.reduce(size, axis=0, out=found[1, columns])
            _products(r, size, found[2, columns])
            s, q = _line(y[few], line, columns, t[few]), q[few]
            np.subtract(s, np.rint(s, out=q), out=s)
            _products(s, s, found[3, columns])
        return _added(found)

    def fit(
        self, ratio: Column, offset: Column, top: int, pack: Pack | None = None
    ) -> tuple[tuple[Column, ...], np.ndarray]:
        """Sums of r, q, q^2, r q and r^2: q is t = ratio y + offset as an integer 0..top, r = t - q. With them what
        pack() makes of q."""
        line, found = (_twice(ratio), _twice(offset)), self._room(5)
        for block in self._blocks:
            r, q = self._rounded(block, line, top)
            np.add.reduce(r, axis=0, out=found[0, block.columns])
            np.add.reduce(q, axis=0, out=found[1, block.columns])
            for place, (a, b) in zip(found[2:], ((q, q), (r, q), (r, r)), strict=True):
                _products(a, b, place[block.columns])
            if pack is not None:
                self._words[block.rows] = pack(self._pairs(q))
        return _added(found), self._words

    def codes(self, ratio: Column, offset: Column, top: int, pack: Pack) -> tuple[Column, Column, np.ndarray]:
        """The sums of r and r^2 of fit(), and what pack() makes of q."""
        line, found = (_twice(ratio), _twice(offset)), self._room(2)
        for block in self._blocks:
            r, q = self._rounded(block, line, top)
            np.add.reduce(r, axis=0, out=found[0, block.columns])
            _products(r, r, found[1, block.columns])
            self._words[block.rows] = pack(self._pairs(q))
        return *_added(found), self._words

    def settle(
        self, kept: np.ndarray, most: Column, ratio: Column, offset: Column, top: int, pack: Pack
    ) -> tuple[Column, np.ndarray]:
        """-> (in which groups the sum of r^2 is below `most`, `kept` with their codes in it): r is what is left of
        ratio y + offset when it is an integer 0..top. Only where `most` is above 0 there is anything to be settled."""
        better, some = np.zeros(len(most), bool), np.flatnonzero(most > 0)
        if len(some):
            turned = np.ascontiguousarray(self._values[some].view(self._together).T)
            t = self._floats(turned, np.empty((self.size // 2, 2 * len(some)), np.float32))
            if self._far is not None:
                t -= self._far.reshape(-1, 2)[some].reshape(-1)
            t *= _twice(ratio[some])
            t += _twice(offset[some])
            q = np.rint(t)
            q.clip(0, top, out=q)
            t -= q
            found = np.einsum("km,km->m", t, t)
            better[some] = less = found[::2] + found[1::2] < most[some]
            kept[some[less]] = pack(self._pairs(q)[less])
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

    def _filled(self, block: _Block) -> np.ndarray:
        """The y of a block."""
        y = self._floats(block.turned, block.y)
        return y if self._far is None else np.subtract(y, self._far[block.columns], out=y)

    def _rounded(
        self, block: _Block, line: tuple[np.ndarray, np.ndarray], top: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """r and q of a block."""
        t = _line(self._filled(block), line, block.columns, block.t)
        q = np.rint(t, out=block.q)
        q.clip(0, top, out=q)
        return np.subtract(t, q, out=t), q

    def _floats(self, turned: np.ndarray, out: np.ndarray) -> np.ndarray:
        if self._bits:
            pairs, bits = turned.view(np.uint32), out.view(np.uint32)
            np.left_shift(pairs, 16, out=bits[: len(pairs)])
            np.bitwise_and(pairs, 0xFFFF0000, out=bits[len(pairs) :])
        else:
            np.copyto(out, turned.view(self._values.dtype))
        return out

    def _pairs(self, q: np.ndarray) -> np.ndarray:
        """The codes of a block, [groups, G / 2] uint16. What q holds is lost."""
        byte = self._second <= 16  # then a pair is no more, and moves faster
        if self._bits:
            upper, lower = q[len(q) // 2 :], q[: len(q) // 2]
            upper *= self._second
            lower += upper
            one, two = (np.uint8, np.uint16) if byte else (np.uint16, np.uint32)
            return np.ascontiguousarray(lower.astype(one).view(two).T).view(one)
        pairs = np.ascontiguousarray(q.astype(np.uint8).view(np.uint16).T)
        upper = pairs >> 8
        upper *= 256 - self._second
        pairs -= upper
        return pairs.astype(np.uint8) if byte else pairs

    def _room(self, sums: int) -> np.ndarray:
        return memory("sums", sums * 2 * len(self._values)).reshape(sums, -1)


@dataclass(frozen=True)
class _Block:
    """Some groups: their values as they are given and turned, and room for y and for two arrays alike."""

    rows: slice
    columns: slice
    source: np.ndarray
    turned: np.ndarray
    y: np.ndarray
    t: np.ndarray
    q: np.ndarray


class DevicePasses:
    """The same over an MLX array [N, G], on MLX's default device."""

    xp = mx

    def __init__(self, values: mx.array, dtype: mx.Dtype):
        self._dtype, self.size = dtype, values.shape[1]
        self._y = values.astype(mx.float32)

    def ends(self) -> tuple[Column, Column]:
        return self._y.min(-1), self._y.max(-1)

    def look(
        self, centre: Column, inverse: Column, ratio: Column, offset: Column, part: int = 1
    ) -> tuple[Column, Column, Column, Column]:
        self._y = self._y - centre[:, None]
        r = self._y * inverse[:, None]
        r = r - mx.round(r)
        s = self._t(ratio, offset)[:, : self.size // part]
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
        return self._y * ratio[:, None] + offset[:, None]


Passes = HostPasses | DevicePasses


_THREADS = threading.local()


def memory(name: str, count: int) -> np.ndarray:
    """Room for so many floats, a thread's own under that name. What was in it is lost."""
    found: np.ndarray | None = getattr(_THREADS, name, None)
    if found is None or len(found) < count:
        found = _aligned(count)
        setattr(_THREADS, name, found)
    return found[:count]


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


def _products(a: np.ndarray, b: np.ndarray, out: np.ndarray) -> None:
    """The sums over columns of a * b."""
    np.einsum("km,km->m", a, b, out=out)


def _added(found: np.ndarray) -> tuple[Column, ...]:
    """Of both columns of each group."""
    return tuple(found[:, ::2] + found[:, 1::2])


def _twice(column: Column) -> np.ndarray:
    """A number for both columns of its group."""
    found = _aligned(2 * len(column))
    found[::2] = found[1::2] = column
    return found
