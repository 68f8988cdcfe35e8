"""What follows a cache: something that is computed of the same tokens, and goes back with it.

Knows a face, and nothing behind it: a drafter has it (speculative/drafters.py).
"""

from __future__ import annotations

from collections.abc import Container
from typing import TYPE_CHECKING, Any, Protocol

import mlx.core as mx

if TYPE_CHECKING:
    from .cache import Cache


class Follower(Protocol):
    """What is computed beside a cache and goes back with it."""

    cache: Cache  # the one that it follows

    def mark(self) -> Any:
        """Its present state, at no cost."""
        ...

    def go_back(self, mark: Any, offset: int) -> None:
        """To a mark of a time when the cache held `offset` tokens or more, as it was when it held `offset`."""
        ...

    def branched(self, cache: Cache) -> Follower:
        """One that follows `cache`, a branch of its own, from the same past; marks are good for both."""
        ...

    def copied(self, cache: Cache, mark: Any, offset: int) -> Follower:
        """One that follows `cache`, with what this one had at `mark`, gone back to `offset` as in `go_back`, in arrays
        of its own; this one is not touched."""
        ...

    def as_copied(self, mark: Any) -> Any:
        """A mark of an earlier time, as one that was `copied` has it."""
        ...

    def shrink(self, shared: Container[int]) -> None:
        """Leave no room behind what is held; shared: ids of arrays that others hold too, which stay."""
        ...

    def arrays(self) -> list[mx.array]: ...

    def marked(self, mark: Any) -> list[mx.array]:
        """What a mark keeps alive beside `arrays`."""
        ...

    def detach(self) -> None:
        """As `Cache.detach`."""
        ...
