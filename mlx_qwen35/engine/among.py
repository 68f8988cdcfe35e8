"""Rows that copy what was said before, while others answer beside them: who takes a round of its own, and when.

A long match promises many tokens in the time of a few steps, in a round that one row takes alone. The others wait for
it. Where all of them copy, they take turns. Where one does not, rounds are as rare as pieces of prompts (pieces.py):

    credit += pause x seconds of a step        credit -= seconds of a round        a round needs credit for its time

A row whose round brought little steps with the others for a while, twice as long each time.

Knows lengths of matches, seconds and rows by their keys. Knows no arrays and reads no clock.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass

from mlx_qwen35.speculative.copying import LONG

MOST_ROWS = 4  # that answer; with more a step of all is worth more than a round of one
_LITTLE = 4  # tokens of a round, fewer of which are no gain over steps
_REST = 8, 128  # steps that a row takes with the others after a round that brought little: at first, at most
_SAVED = 1.5  # rounds' worth of credit that can be saved up
_NEW = 0.25  # weight of a new time among the old ones


@dataclass
class _Row:
    last: int = 0  # turn of its last round
    rest: int = 0  # steps until its next may come
    stretch: int = _REST[0]


class Among:
    """pause: seconds of rounds for each second of steps, where somebody waits that does not copy."""

    def __init__(self, pause: float) -> None:
        self.pause = pause
        self._rows: dict[Hashable, _Row] = {}
        self._credit = 0.0
        self._round: float | None = None  # seconds of one; None: none was measured
        self._turns = 0

    def next(self, matches: Mapping[Hashable, int | None]) -> Hashable | None:
        """Who takes a round now; None: all take a step. matches: of all that answer, the tokens of its match; None:
        nothing is known of what it said."""
        if not 2 <= len(matches) <= MOST_ROWS:
            return None
        self._rows = {key: row for key, row in self._rows.items() if key in matches}
        ready = [key for key, length in matches.items() if length is not None and length >= LONG and self._rested(key)]
        if not ready:
            return None
        waits = len(ready) < len(matches)  # somebody who does not copy; without credit nothing was measured yet
        if waits and (self._credit <= 0 or self._credit < (self._round or 0.0)):
            return None
        return min(ready, key=lambda key: self._rows[key].last if key in self._rows else -1)

    def stepped(self, seconds: float) -> None:
        """A step of all that answer took so long."""
        share = self.pause * seconds
        self._credit = min(self._credit + share, max(self._credit, share, _SAVED * (self._round or 0.0)))
        for row in self._rows.values():
            row.rest = max(0, row.rest - 1)

    def copied(self, key: Hashable, tokens: int, seconds: float) -> None:
        """A round of its own brought a row so many tokens, and took so long."""
        self._turns += 1
        row = self._rows.setdefault(key, _Row())
        row.last = self._turns
        if tokens < _LITTLE:
            row.rest, row.stretch = row.stretch, min(2 * row.stretch, _REST[1])
        else:
            row.stretch = _REST[0]
        self._round = seconds if self._round is None else self._round + _NEW * (seconds - self._round)
        self._credit = max(self._credit - seconds, -self._round)

    def _rested(self, key: Hashable) -> bool:
        return key not in self._rows or not self._rows[key].rest
