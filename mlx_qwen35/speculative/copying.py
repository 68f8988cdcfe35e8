"""How many tokens to copy from what was said before: as many as make the most tokens a second, by what was measured.

Knows lengths of matches, seconds and counts. Knows no tokens and no models.
A match is the likelier to go on the longer it is, so that what is known of copies is known by kind: bits of the length
of the match, whether a drafter's first guess agreed, and runs that a grammar forces. Of each kind is counted how often
the first token was right, and how often one was behind another that was:

    rate(k) = (1 + a (1 + b + b^2 + ... + b^(k-1))) / seconds(1 + k rows)          against the rate without a copy

A kind that does not pay is tried again now and then, the others are not concerned.
"""

from __future__ import annotations

from mlx_qwen35.speculative.pace import Seconds

LEAST = 2  # tokens of a match
SURE = 4  # tokens of a match that needs no drafter to agree
LONG = 16  # tokens of a match that is worth a long copy
MOST = 31  # tokens of a copy
GRAMMAR = -1  # the kind of what a grammar forces

_COUNTS = 1, 3, 7, 15, 31
_MARGIN = 1.03  # a copy has to promise so much
_STRETCH = 8, 256  # times that a kind is passed over before it is tried again: at first, at most
_MEMORY = 60.0  # tries that a chance remembers
_TRIES = 4.0  # tries that what is thought beforehand counts for
# kind: (first token right, one behind a right one, tokens of a copy before anything is measured). By replaying commits
# of this repository; docs/SPEED.md.
_KINDS = {
    1: (0.45, 0.75, 1), 2: (0.60, 0.85, 3), 3: (0.90, 0.93, 7), 4: (0.95, 0.97, MOST),
    11: (0.80, 0.80, 3), GRAMMAR: (0.97, 0.97, MOST),
}  # fmt: skip
_AGREED = 10


def kind_of(length: int, *, agreed: bool = False) -> int:
    """Of a match of `length` tokens: 2-3, 4-7, 8-15, 16 and more. agreed: if a drafter's first guess agrees."""
    kind = min(length.bit_length() - 1, 4)
    return kind + _AGREED if agreed and length < SURE else kind


class _Kind:
    def __init__(self, first: float, more: float) -> None:
        self.first, self.more = [first * _TRIES, _TRIES], [more * 4 * _TRIES, 4 * _TRIES]
        self.passed, self.stretch = 0, _STRETCH[0]

    def expected(self, count: int) -> float:
        """Tokens of a round."""
        first, more = (right / tries for right, tries in (self.first, self.more))
        return 1 + first * (count if more == 1 else (1 - more**count) / (1 - more))

    def saw(self, count: int, right: int) -> None:
        _count(self.first, [right > 0])
        _count(self.more, [True] * max(right - 1, 0) + [False] * (0 < right < count))


def _count(chance: list[float], seen: list[bool]) -> None:
    for right in seen:
        keep = min(1.0, (_MEMORY - 1) / chance[1])
        chance[:] = keep * chance[0] + right, keep * chance[1] + 1


class Copying:
    """steady: as many as is thought beforehand, so that what is drawn with a seed does not hang on the clock."""

    def __init__(self, *, steady: bool = False) -> None:
        self.steady = steady
        self._kinds = {name: _Kind(first, more) for name, (first, more, _) in _KINDS.items()}
        self._seconds: dict[int, Seconds] = {}  # by the rows of a call; 1: a plain step

    def choose(self, kind: int, most: int, otherwise: float | None = None) -> int:
        """How many tokens to copy, `most` at the most; 0: none. otherwise: tokens a second without a copy, if there are
        drafts; None: as plain steps have it."""
        usual = min(_KINDS[kind][2], most)
        plain = self._seconds.get(1)
        if otherwise is None and plain is not None and plain.settled:
            otherwise = 1 / plain.value
        if self.steady or otherwise is None or not self._seconds or most < 1:
            return max(usual, 0)
        known, counts = self._kinds[kind], [count for count in _COUNTS if count < most] + [min(most, MOST)]
        best = max(counts, key=lambda count: known.expected(count) / self._time(count + 1))
        if known.expected(best) / self._time(best + 1) > _MARGIN * otherwise:
            known.passed, known.stretch = 0, _STRETCH[0]
            return best
        known.passed += 1
        if known.passed < known.stretch:
            return 0
        known.passed, known.stretch = 0, min(2 * known.stretch, _STRETCH[1])
        return best

    def copied(self, kind: int, count: int, right: int, seconds: float | None) -> None:
        """A round with a copy of `count` tokens, of which the first `right` were right, took so long; None: that says
        nothing."""
        self._kinds[kind].saw(count, right)
        if seconds is not None:
            self._seconds.setdefault(count + 1, Seconds()).add(seconds)

    def decoded(self, tokens: int, seconds: float) -> None:
        """So many plain steps took so long."""
        self._seconds.setdefault(1, Seconds()).add(seconds / tokens)

    def _time(self, rows: int) -> float:
        """Measured, or in a line between what was measured; beyond that as long as the longest, until it is tried."""
        if rows in self._seconds:
            return self._seconds[rows].value
        below = max((known for known in self._seconds if known < rows), default=None)
        above = min((known for known in self._seconds if known > rows), default=None)
        if below is None or above is None:
            return self._seconds[above if below is None else below].value
        low, high = self._seconds[below].value, self._seconds[above].value
        return low + (high - low) * (rows - below) / (above - below)
