"""Whether reading what the next layer will probably ask for pays, from what happened so far.

Knows seconds and counts. Knows no experts, no threads and no device.

A guess that comes true saves the time that a missing expert is waited for. One that does not keeps the disk from what
is needed for up to as long. And where the processor computes, either takes the copy's time from it: a guess is copied
while layers compute, and what is waited for while nothing does. So on a slow disk guesses pay where they mostly come
true, and from the page cache on a busy processor hardly ever.
"""

from __future__ import annotations

_ENOUGH = 32  # experts, before anything is judged
_REMEMBERED = 512  # experts: of two that lie so far apart, the older counts half as much or less
_TRY_EVERY = 32  # turns: who never guesses does not learn that guesses have become better


class _Mean:
    """Of what was added lately."""

    def __init__(self) -> None:
        self._sum = self._count = 0.0

    def add(self, value: float, count: int) -> None:
        """value: added up over `count`."""
        self._sum += value
        self._count += count
        if self._count > _REMEMBERED:
            self._sum, self._count = self._sum / 2, self._count / 2

    @property
    def known(self) -> bool:
        return self._count >= _ENOUGH

    @property
    def value(self) -> float:
        return self._sum / self._count


class Guessing:
    """Counts what guesses were good for, and decides turn by turn whether more are made."""

    def __init__(self, *, shared_processor: bool):
        """shared_processor: reading takes its processor time from computing."""
        self._shared = shared_processor
        self._right, self._waits, self._copies = _Mean(), _Mean(), _Mean()
        self._turns = 0

    def made(self, count: int) -> None:
        """So many are being read; a negative count: were given up before they began."""
        self._right.add(0, count)

    def came_true(self, count: int) -> None:
        """So many of them were asked for."""
        self._right.add(count, 0)

    def waited(self, seconds: float, count: int) -> None:
        """So long for `count` experts that nobody had guessed."""
        self._waits.add(seconds, count)

    def copied(self, seconds: float, count: int) -> None:
        """Processor time that reading `count` experts took, guessed or not."""
        self._copies.add(seconds, count)

    def pays(self) -> bool:
        """For the turn that begins now. True as long as too little is known, and now and then to learn."""
        self._turns += 1
        if self._turns % _TRY_EVERY == 0 or not (self._right.known and self._waits.known and self._copies.known):
            return True
        right, wait = min(self._right.value, 1.0), self._waits.value
        return right * wait > (1 - right) * wait + (self._copies.value if self._shared else 0.0)
