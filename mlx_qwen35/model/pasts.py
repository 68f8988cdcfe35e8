"""What other ranks hold of the pasts of a model's caches, as a session and a store have it written and read.

Knows the face alone; parallel/pasts.py has other ranks do it. A model that is alone has `Pasts`, which do nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


class Pasts:
    """points: what other ranks call a cache's pasts (`Snapshot.point`, `Cache.point`), None where there are none."""

    def save(self, path: Path, points: Sequence[Any]) -> str | None:
        """Have them write what they hold of these for a session at `path`; -> a name by which all files of it belong
        together; None: there are no others. Raises SessionError."""
        return None

    def keep(self, path: Path, name: str) -> None:
        """Have them delete what they wrote for it under other names."""

    def put(self, path: Path, points: Sequence[Any], replaced: Path | None, most_bytes: int) -> str | None:
        """As `save`, but they go on and write it later, in place of what they wrote for `replaced`, each with at most
        so many bytes in the folder; `written` waits for it. Raises SessionError, of an earlier one too."""
        return None

    def written(self) -> None:
        """All that `put` was given is on their disks."""

    def load(self, path: Path, name: str | None, count: int, first: int | None = None) -> list[Any]:
        """Have them read it; -> what they call the `count` pasts, nothing where there are no others. first: only so
        many are wanted, the last of which is the present one too. Raises SessionError."""
        return []
