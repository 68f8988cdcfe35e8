"""Passes over the values of many groups, of which a search for scales needs a few sums a group: by NumPy on a CPU, some
groups after the other, by MLX on a GPU.

Knows arrays of values, a row a group. Knows nothing of what the sums are for. On a CPU MLX's operations take two to
three times as long as NumPy's (docs/SPEED.md).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import numpy as np

Column = Any  # [N] of NumPy or MLX, float32: a number for each group
Pack = Callable[[Any], Any]  # codes uint8 [.., G] -> what is kept of them

_BLOCK = 1 << 17  # values


class HostPasses:
    """Passes over values [N, G]: float16 or float32, or uint16 that are the bits of bfloat16."""

    xp = np

    def __init__(self, values: np.ndarray, dtype: mx.Dtype):
        """dtype: of scales and biases."""
        self._values, self._dtype, self.size = values, dtype, values.shape[1]
        self._y = _memory("y", values.size).reshape(values.shape)
        rows = max(1, _BLOCK // self.size)
        self._t, self._q = (_memory(name, rows * self.size).reshape(rows, self.size) for name in "tq")
        self._ones = np.ones(self.size, np.float32)

    def ends(self) -> tuple[Column, Column]:
        """The least and the largest value of each group. The first of the passes.

        Where a group has both signs they are the largest of the integers that are its bits, without a sign and with
        one: half of the time that floats take.
        """
        found = np.empty((2, len(self._y)), np.float32)
        for rows, y, _, _ in self._blocks():
            values, bits = self._values[rows], y.view(np.uint32)
            if values.dtype == np.uint16:
                np.copyto(bits, values)
                np.left_shift(bits, 16, out=bits)
            else:
                np.copyto(y, values)
            found[:, rows] = bits.max(-1).view(np.float32), bits.view(np.int32).max(-1).view(np.float32)
        low, high = found
        odd = np.flatnonzero(np.signbit(high) | ~np.signbit(low))
        if len(odd):
            low[odd], high[odd] = self._y[odd].min(-1), self._y[odd].max(-1)
        return low, high

    def look(
        self, centre: Column, inverse: Column, ratio: Column, offset: Column
    ) -> tuple[Column, Column, Column, Column]:
        """Sums of r, |r| and r |r|, and of s^2: r is how far y = (value - centre) inverse is from the next integer, s
        how far ratio y + offset is. Values count as y from now on. The second of the passes."""
        found = np.empty((4, len(self._y)), np.float32)
        for rows, y, t, q in self._blocks():
            if centre[rows].any():
                np.subtract(y, centre[rows, None], out=y)
            np.multiply(y, inverse[rows, None], out=y)
            r = np.subtract(y, np.rint(y, out=q), out=t)
            size = np.abs(r, out=q)
            self._sums(found[:3], rows, r, size, (r, size))
            _line(y, ratio[rows], offset[rows], t)
            s = np.subtract(t, np.rint(t, out=q), out=t)
            self._sums(found[3:], rows, (s, s))
        return tuple(found)

    def fit(
        self, ratio: Column | None, offset: Column, top: int, pack: Pack | None = None
    ) -> tuple[tuple[Column, ...], np.ndarray | None]:
        """Sums of r, q, q^2, r q and r^2: q is t = ratio y + offset (ratio None: 1) as an integer 0..top, r = t - q.
        With them what pack() makes of q."""
        found, kept = np.empty((5, len(self._y)), np.float32), []
        for rows, y, t, q in self._blocks():
            _line(y, None if ratio is None else ratio[rows], offset[rows], t)
            np.clip(np.rint(t, out=q), 0, top, out=q)
            r = np.subtract(t, q, out=t)
            self._sums(found, rows, r, q, (q, q), (r, q), (r, r))
            if pack is not None:
                kept.append(pack(q.astype(np.uint8)))
        return tuple(found), np.concatenate(kept) if kept else None

    def codes(self, ratio: Column, offset: Column, top: int, pack: Pack) -> tuple[Column, Column, np.ndarray]:
        """The sums of r and r^2 of fit(), and what pack() makes of q."""
        found, kept = np.empty((2, len(self._y)), np.float32), []
        for rows, y, t, q in self._blocks():
            _line(y, ratio[rows], offset[rows], t)
            np.clip(np.rint(t, out=q), 0, top, out=q)
            kept.append(pack(q.astype(np.uint8)))
            r = np.subtract(t, q, out=t)
            self._sums(found, rows, r, (r, r))
        return *found, np.concatenate(kept)

    def settle(
        self, kept: np.ndarray, most: Column, ratio: Column, offset: Column, top: int, pack: Pack
    ) -> tuple[Column, np.ndarray]:
        """-> (in which groups the sum of r^2 is below `most`, `kept` with their codes in it): r is what is left of
        ratio y + offset when it is an integer 0..top. Only where `most` is above 0 there is anything to be settled."""
        better, some = np.zeros(len(most), bool), np.flatnonzero(most > 0)
        t = _line(self._y[some], ratio[some], offset[some])
        q = np.clip(np.rint(t), 0, top)
        t -= q
        less = np.einsum("ng,ng->n", t, t) < most[some]
        better[some] = less
        kept[some[less]] = pack(q[less].astype(np.uint8))
        return better, kept

    def rounded(self, column: Column) -> Column:
        """What of it is stored."""
        if self._dtype == mx.bfloat16:
            bits = column.view(np.uint32)
            return (bits + (0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).view(np.float32)
        return column.astype(np.float16).astype(np.float32) if self._dtype == mx.float16 else column

    @staticmethod
    def choose(mask: np.ndarray, one: Column, other: Column) -> Column:
        """As where(), which takes six times as long."""
        found = other.copy()
        np.copyto(found, one, where=mask)
        return found

    def _blocks(self) -> Iterator[tuple[slice, np.ndarray, np.ndarray, np.ndarray]]:
        """Some rows, their y, and room for two arrays alike."""
        for start in range(0, len(self._y), len(self._t)):
            rows = slice(start, start + len(self._t))
            y = self._y[rows]
            yield rows, y, self._t[: len(y)], self._q[: len(y)]

    def _sums(self, found: np.ndarray, rows: slice, *terms: np.ndarray | tuple[np.ndarray, np.ndarray]) -> None:
        """Row sums of arrays, and of products of two. A product of matrix and vector would take half of the time, but
        there the bits of a row depend on how many rows there are."""
        for place, term in zip(found, terms, strict=True):
            a, b = term if isinstance(term, tuple) else (term, self._ones)
            np.matmul(a[:, None, :], b[..., None], out=place[rows, None, None])


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
        self._y = (self._y - centre[:, None]) * inverse[:, None]
        r = self._y - mx.round(self._y)
        s = self._t(ratio, offset)
        s = s - mx.round(s)
        return r.sum(-1), mx.abs(r).sum(-1), (r * mx.abs(r)).sum(-1), (s * s).sum(-1)

    def fit(
        self, ratio: Column | None, offset: Column, top: int, pack: Pack | None = None
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

    def _t(self, ratio: Column | None, offset: Column) -> mx.array:
        return (self._y if ratio is None else self._y * ratio[:, None]) + offset[:, None]


Passes = HostPasses | DevicePasses

_THREADS = threading.local()


def _memory(name: str, count: int) -> np.ndarray:
    """Room for so many floats, a thread's own under that name. What was in it is lost."""
    memory: np.ndarray | None = getattr(_THREADS, name, None)
    if memory is None or len(memory) < count:
        memory = np.empty(count, np.float32)
        setattr(_THREADS, name, memory)
    return memory[:count]


def _line(y: np.ndarray, ratio: Column | None, offset: Column, out: np.ndarray | None = None) -> np.ndarray:
    if ratio is None:
        return np.add(y, offset[:, None], out=out)
    return np.add(np.multiply(y, ratio[:, None], out=out), offset[:, None], out=out)
