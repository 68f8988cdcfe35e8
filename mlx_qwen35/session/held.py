"""Which arrays several paths hold, and what is free when one gives some up.

Knows identities and sizes of arrays. Knows nothing of what is in them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlx_qwen35.session.paths import Path


class Held:
    """Which arrays are held how often, while paths give some up."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._holders: Counter[int] = Counter()
        self.freed = 0
        for path in paths:
            self._holders.update(path.buffers().keys())

    @contextmanager
    def changing(self, path: Path) -> Iterator[None]:
        """Counts what a path, changed inside, frees."""
        before = path.buffers().items()
        yield
        after = path.buffers().items()  # with sizes: what is new may have the identity of what is gone
        for key, nbytes in before - after:
            self._holders[key] -= 1
            self.freed += 0 if self._holders[key] else nbytes
        for key, nbytes in after - before:
            self.freed -= 0 if self._holders[key] else nbytes
            self._holders[key] += 1

    def shared(self, path: Path) -> set[int]:
        """Arrays that others hold too."""
        return {key for key in path.buffers() if self._holders[key] > 1}


class Total:
    """Bytes of all arrays of many paths, those that several hold once. Paths that nobody uses are counted when one of
    them has changed."""

    def __init__(self) -> None:
        self._counted: list[dict[int, int]] = []
        self._union: dict[int, int] = {}
        self._sum = 0

    def of(self, paths: Iterable[Path]) -> int:
        paths = list(paths)
        idle = [path.buffers() for path in paths if path.asked is None]
        if len(idle) != len(self._counted) or any(a is not b for a, b in zip(idle, self._counted, strict=True)):
            self._counted, self._union = idle, union(idle)
            self._sum = sum(self._union.values())
        used = union(path.buffers() for path in paths if path.asked is not None)
        return self._sum + sum(nbytes for key, nbytes in used.items() if key not in self._union)


def union(buffers: Iterable[dict[int, int]]) -> dict[int, int]:
    """Each array once."""
    held: dict[int, int] = {}
    for each in buffers:
        held |= each
    return held
