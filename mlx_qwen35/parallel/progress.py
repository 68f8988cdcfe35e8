"""How far a rank has come, as its signs of life say it: what tells one that hangs from one that computes for long, and
from one that waits for another.

Knows counts and seconds. Knows no arrays and no sockets.

Ranks meet in the same order: where all stand still, the one that has come to the fewest meetings is the one for which
the others wait.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

STANDS = 15.0  # seconds without progress in a call of the model, after which a rank hangs
EACH = 0.02  # seconds more for each token of the call: layers of a long piece of a prompt take their time
READS = 120.0  # likewise while weights are read: a tensor may be large, and a disk slow
WRITES = 600.0  # likewise while a share of a session is written or read, which is one step

IDLE, WORKS, WAITS = 0, 1, 2  # for rank 0's word; at something of its own; for a neighbour
_SIGN = struct.Struct("!BQQd")


class Sign(NamedTuple):
    """What a rank says of itself. count: grows with all that is done; met: with the places at which it meets others;
    allowed: seconds that `count` may stand."""

    state: int = IDLE
    count: int = 0
    met: int = 0
    allowed: float = READS

    def packed(self) -> bytes:
        return _SIGN.pack(*self)

    @classmethod
    def read(cls, body: bytes) -> Sign:
        """What `packed` made; raises ValueError for anything else."""
        try:
            return cls(*_SIGN.unpack(body))
        except struct.error:
            raise ValueError("this is no rank of this program") from None


class Progress:
    """Of one rank: written by the thread that works, read by the one that gives signs."""

    def __init__(self) -> None:
        self._state, self._count, self._met, self._allowed = IDLE, 0, 0, READS

    def sign(self) -> Sign:
        return Sign(self._state, self._count, self._met, self._allowed)

    def step(self, *_: object) -> None:
        """Something is done."""
        self._count += 1

    def meet(self) -> None:
        """It has come to a place where all ranks meet."""
        self._met += 1
        self._count += 1

    @contextmanager
    def working(self, allowed: float) -> Iterator[None]:
        """Inside, `step` comes at least once in so many seconds."""
        self._allowed = allowed
        with self._as(WORKS):
            yield

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside, it waits for a neighbour, and has nothing of its own to do."""
        with self._as(WAITS):
            yield

    @contextmanager
    def _as(self, state: int) -> Iterator[None]:
        before, self._state = self._state, state
        self._count += 1
        try:
            yield
        finally:
            self._state = before
            self._count += 1


def allowed(tokens: int) -> float:
    """Seconds that a rank may stand in a call with so many tokens."""
    return STANDS + EACH * tokens


def hanging(signs: Mapping[int, tuple[Sign, float]]) -> list[int]:
    """The ranks of which one hangs, by what each said last and the seconds since it said something else; mostly one.

    Several: all stand at one place, inside of what MLX computes, and nothing says which of them keeps the others.
    """
    busy = {rank: each for rank, each in signs.items() if each[0].state != IDLE}
    suspects = {rank: each for rank, each in busy.items() if each[0].state == WORKS} or busy
    if not suspects:
        return []
    fewest = min(sign.met for sign, _ in suspects.values())
    behind = {rank: each for rank, each in suspects.items() if each[0].met == fewest}
    return sorted(behind) if all(seconds > sign.allowed for sign, seconds in behind.values()) else []
