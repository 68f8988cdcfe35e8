"""One call of the model as every rank has to know it: a frame of small integers, and for pictures what they show.

Knows caches by their points. Knows no layers and no sockets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

NONE, ONE, ROWS = 0, 1, 2  # kinds of cache
EACH_NONE, EACH_ALL = -1, 0


@dataclass
class Past:
    """Of one cache: the point it is at (0: none, it is new), whether that stays one to go back to, the point after the
    call, and the rope_delta of each row. padding: of a new cache of several rows."""

    point: int
    kept: bool
    after: int
    deltas: list[int]
    padding: list[int] = field(default_factory=list)


@dataclass
class Call:
    """tokens [B, T]. wanted: how many of the last hidden states rank 0 looks at, -1: all. each: offsets at which points
    are wanted on the way (EACH_ALL in it alone: after each token), and their numbers. dropped: points that are gone.
    embedded: with pictures, the embeddings [B, T, H] and positions [3, B, T], which follow as bytes. best: how many of
    the largest logits of the last position are wanted, of how many tokens (head.py); None: none.
    """

    tokens: np.ndarray
    kind: int
    pasts: list[Past]
    more: bool
    wanted: int
    each: list[int] | None
    numbers: list[int]
    dropped: list[int]
    embedded: tuple[mx.array, mx.array] | None = None
    best: tuple[int, int] | None = None

    def frame(self) -> np.ndarray:
        """As int32."""
        batch, length = self.tokens.shape
        said = [self.kind, int(self.more), self.wanted, batch, length, int(self.embedded is not None)]
        said += self.best or (0, 0)
        said += _listed(self.dropped)
        said += [-1] if self.each is None else _listed(self.each)
        said += _listed(self.numbers)
        said += [len(self.pasts)]
        for past in self.pasts:
            said += [past.point, int(past.kept), past.after, *_listed(past.deltas), *_listed(past.padding)]
        return np.concatenate([np.array(said, np.int32), self.tokens.reshape(-1).astype(np.int32)])

    @classmethod
    def read(cls, frame: np.ndarray, embedded: tuple[mx.array, mx.array] | None) -> Call:
        """What `frame` made."""
        values = iter(frame.tolist())
        kind, more, wanted, batch, length, _, *best = (next(values) for _ in range(8))
        dropped = _read(values)
        count = next(values)
        each = None if count < 0 else [next(values) for _ in range(count)]
        numbers = _read(values)
        pasts = [Past(next(values), bool(next(values)), next(values), _read(values), _read(values))
                 for _ in range(next(values))]  # fmt: skip
        tokens = np.array(list(values), np.int32).reshape(batch, length)
        asked = tuple(best) if best[0] else None
        return cls(tokens, kind, pasts, bool(more), wanted, each, numbers, dropped, embedded, asked)


def has_embedded(frame: np.ndarray) -> bool:
    """Whether bytes follow."""
    return bool(frame[5])


def _listed(values: Sequence[int]) -> list[int]:
    return [len(values), *values]


def _read(values: object) -> list[int]:
    return [next(values) for _ in range(next(values))]
