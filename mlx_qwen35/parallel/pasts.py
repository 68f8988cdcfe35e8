"""Rank 0's word to the others that they write or read what they hold of pasts, each beside rank 0's file.

Knows points and what is told. What a rank then does is follower.py's, its files are kept.py's.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from pathlib import Path

from mlx_qwen35.errors import SessionError
from mlx_qwen35.model.pasts import Pasts
from mlx_qwen35.parallel.points import Names, Point
from mlx_qwen35.parallel.ranks import Ranks


class RanksPasts(Pasts):
    """Each of these returns when all others have done it, or raises SessionError with the words of one that has not."""

    def __init__(self, ranks: Ranks, names: Names) -> None:
        self._ranks, self._names = ranks, names

    def save(self, path: Path, points: Sequence[Point | None]) -> str:
        name = secrets.token_hex(8)
        self._ranks.ask(save=str(path), points=_numbers(points), name=name)
        return name

    def keep(self, path: Path, name: str) -> None:
        self._ranks.ask(keep=str(path), name=name)

    def put(self, path: Path, points: Sequence[Point | None], replaced: Path | None, most_bytes: int) -> str:
        name, before = secrets.token_hex(8), None if replaced is None else str(replaced)
        self._ranks.ask(put=str(path), points=_numbers(points), name=name, replaced=before, most_bytes=most_bytes)
        return name

    def written(self) -> None:
        self._ranks.ask(written=True)

    def load(self, path: Path, name: str | None, count: int, first: int | None = None) -> list[Point]:
        if name is None:
            raise SessionError(f"{path} was not saved on ranks: begin a new session, or load the model without ranks")
        points = [self._names.new() for _ in range(count if first is None else first)]
        for point in points:
            point.kept = True
        numbers = _numbers(points) + [0] * (count - len(points))
        self._ranks.ask(load=str(path), points=numbers, name=name)
        return points if first is None else [*points, points[-1]]


def _numbers(points: Sequence[Point | None]) -> list[int]:
    return [0 if point is None else point.number for point in points]
