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


def total(paths: Iterable[Path]) -> int:
    """Bytes of all arrays, those that several hold once."""
    held: dict[int, int] = {}
    for path in paths:
        held |= path.buffers()
    return sum(held.values())
