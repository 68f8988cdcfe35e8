"""Names for what caches held, which every rank knows: rank 0 gives them, the others keep what they stand for.

Knows caches and numbers. Knows no layers, no messages and no ranks.

Rank 0 says of each call from which point it goes on and what the points after it are called. A point lives as long as
something on rank 0 can go back to it (a cache, a snapshot, a session); then its name is told, and dropped. So the
others follow whatever sessions, stores and drafts do, without knowing of any.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from itertools import count

import mlx.core as mx

from mlx_qwen35.cache import Cache, Snapshot
from mlx_qwen35.cache.copies import cache_at
from mlx_qwen35.cache.rows import RowsCache


class Point:
    """What a cache held at one time. kept: something else than that cache knows of it, so it may be gone back to."""

    __slots__ = ("number", "kept", "_dropped", "__weakref__")

    def __init__(self, number: int, dropped: deque[int]) -> None:
        self.number, self.kept, self._dropped = number, False, dropped

    def __del__(self) -> None:
        self._dropped.append(self.number)


class Names:
    """Gives points, and knows which nobody holds any more."""

    def __init__(self) -> None:
        self._numbers, self._dropped = count(1), deque()

    def new(self) -> Point:
        return Point(next(self._numbers), self._dropped)

    def dropped(self) -> list[int]:
        """The numbers of those that nobody has held since this was asked last."""
        found = []
        while self._dropped:
            found.append(self._dropped.popleft())
        return found


class Mirrors:
    """The caches of a rank that follows, by the points that they hold or can go back to."""

    def __init__(self) -> None:
        self._points: dict[int, tuple[Cache, Snapshot | None]] = {}  # None: the cache is there, and nowhere else kept
        self._now: dict[int, int] = {}  # id of a cache -> the point it is at
        self._rows: RowsCache | None = None

    def __len__(self) -> int:
        return len(self._points)

    def drop(self, numbers: Iterable[int]) -> None:
        """Nothing goes back to these any more."""
        for number in numbers:
            cache, _ = self._points.pop(number, (None, None))
            if cache is not None and not any(cache is other for other, _ in self._points.values()):
                self._now.pop(id(cache), None)
                self._out(cache)

    def add(self, number: int, cache: Cache, snapshot: Snapshot | None = None) -> None:
        """A point, at which the cache is if no snapshot is given."""
        self._points[number] = cache, snapshot
        if snapshot is None:
            self._now[id(cache)] = number

    def snapshot(self, number: int) -> tuple[Cache, Snapshot]:
        """What holds a point, and how to go back to it; nothing is changed but that rows side by side are settled."""
        cache, snapshot = self._points[number]
        if snapshot is None:
            self._out(cache)
            snapshot = cache.snapshot()
            self._points[number] = cache, snapshot
        return cache, snapshot

    def at(self, number: int, kept: bool) -> Cache:
        """A cache that holds a point and nothing later, to go on with alone. kept: it stays one to go back to."""
        cache = self._at(number)
        self._out(cache)
        self._leave(cache, kept)
        return cache

    def rows(self, numbers: Sequence[int], kept: Sequence[bool]) -> RowsCache:
        """Likewise several caches, to take a step each together."""
        caches = [self._at(number) for number in numbers]
        for cache, keep in zip(caches, kept, strict=True):
            if keep and self._points[self._now[id(cache)]][1] is None:
                self._settle(cache)
                self._leave(cache, True)
        self._side_by_side(caches)
        for cache in caches:
            self._leave(cache, False)
        return self._rows

    def _at(self, number: int) -> Cache:
        cache, snapshot = self._points[number]
        if self._now.get(id(cache)) == number:
            return cache
        self._out(cache)
        ahead = any(
            other is cache and (taken is None or taken.offset > snapshot.offset)
            for other, taken in self._points.values()
        )
        if ahead:  # what is held beyond it is still wanted: this one goes on in a copy
            made, _ = cache_at(cache, snapshot)
            self._points[number] = made, made.snapshot()
            cache = made
        else:
            cache.restore(snapshot)
        self._now[id(cache)] = number
        return cache

    def _leave(self, cache: Cache, kept: bool) -> None:
        """The cache goes on from the point where it is."""
        number = self._now.pop(id(cache), None)
        if number is None or number not in self._points:
            return
        if self._points[number][1] is None:
            if kept:
                self._points[number] = cache, cache.snapshot()
            else:
                del self._points[number]

    def _out(self, cache: Cache) -> None:
        """The cache is whole, and goes on alone."""
        if self._rows is not None and any(cache is row for row in self._rows.rows):
            self._rows.leave([number for number, row in enumerate(self._rows.rows) if row is cache])
            if not self._rows.rows:
                self._rows = None

    def _settle(self, cache: Cache) -> None:
        if self._rows is not None:
            self._rows.settle([number for number, row in enumerate(self._rows.rows) if row is cache])

    def _side_by_side(self, caches: list[Cache]) -> None:
        """Those that go on together stay together; who is no more among them leaves, and who is new comes behind."""
        here = [] if self._rows is None else self._rows.rows
        staying = [cache for cache in here if any(cache is other for other in caches)]
        if any(a is not b for a, b in zip(staying, caches, strict=False)):
            staying = []  # in another order
        leaving = [number for number, cache in enumerate(here) if not any(cache is other for other in staying)]
        if leaving:
            self._rows.leave(leaving)
        if not staying:
            self._rows = RowsCache(caches)
        elif joining := caches[len(staying) :]:
            self._rows.join(joining)


def evaluated(cache: Cache | RowsCache | None) -> list[mx.array]:
    """What has to be computed for a cache to hold what it says."""
    return [] if cache is None else cache.arrays()
