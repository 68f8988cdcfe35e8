"""How many tokens to guess: as many as make the most tokens a second, by what was measured so far; none, perhaps.

Knows seconds and counts. Knows nothing of models.
Three things are estimated while an answer is made: what a round with k guesses takes, for each k; how often the j-th
guess is right when those before it were; and from both, tokens a second:

    rate(k) = (1 + a1 + a1 a2 + ... + a1 ... ak) / seconds(k)          seconds(0): of a plain step
"""

from __future__ import annotations

from mlx_qwen35.errors import ArgumentError

MOST = 4  # guesses in a round, where each is a pass of what drafts
_FIRST = 2  # rounds of each kind before anything is decided
_NEW = 0.15  # weight of a new time among the old ones
_OUTLIER = 2.0  # a time so many times the usual one is a hiccup, and counts as that many
_MARGIN = 1.03  # a change has to promise so much
_STRETCH = 16, 512  # tokens between two looks at what else might pay: at first, at most
_PRIOR = 0.7, 4.0  # what a guess is taken for before it was tried, and how many tries that counts for
_MEMORY = 50.0  # tries that an acceptance remembers
_PROBES = 4  # rounds of one look at what else might pay


class Seconds:
    """A running estimate of a time; the first measurement may be slow for reasons of its own and only counts alone."""

    def __init__(self) -> None:
        self.value, self.count = 0.0, 0

    def add(self, seconds: float) -> None:
        self.count += 1
        if self.count <= _FIRST:
            self.value = seconds if self.count == 1 else min(self.value, seconds)
        else:
            self.value += _NEW * (min(seconds, _OUTLIER * self.value) - self.value)

    @property
    def settled(self) -> bool:
        return self.count >= _FIRST


def check_count(most: int, limit: int = MOST) -> None:
    """Raises ArgumentError unless so many tokens, of `limit` at the most, can be guessed in a round."""
    if not 1 <= most <= limit:
        raise ArgumentError(f"num_draft_tokens is {most}; it must be 1 to {limit}")


class Pace:
    """most: guesses in a round at the most (1 to `limit`). steady: always so many, whatever it costs, so that what is
    drawn with a seed does not hang on the clock."""

    def __init__(self, most: int, *, steady: bool = False, limit: int = MOST) -> None:
        check_count(most, limit)
        self.most, self.steady = most, steady
        self._seconds = [Seconds() for _ in range(most + 1)]
        self._tries = [_PRIOR[1]] * most
        self._right = [_PRIOR[0] * _PRIOR[1]] * most
        self._chosen, self._stretch, self._since = most, _STRETCH[0], 0
        self._probing, self._probes = 0, 0

    @property
    def acceptance(self) -> list[float]:
        """How often the j-th guess of a round is right, when those before it were."""
        return [right / tries for right, tries in zip(self._right, self._tries, strict=True)]

    def choose(self) -> int:
        """How many tokens to guess next; 0: decode plainly."""
        if self.steady:
            return self.most
        for count in dict.fromkeys((self.most, 1, 0)):
            if not self._seconds[count].settled:
                return count
        if self._probes:
            self._probes -= 1
            return self._probing
        best = max(range(self.most + 1), key=self.rate)
        if best != self._chosen and self.rate(best) > _MARGIN * self.rate(self._chosen):
            self._chosen, self._stretch, self._since = best, _STRETCH[0], 0
        if self._since >= self._stretch:  # has the second best become better?
            self._stretch, self._since = min(2 * self._stretch, _STRETCH[1]), 0
            if self._chosen == 0:  # what was seen of guesses is old
                self._tries, self._right = ([value / 2 for value in values] for values in (self._tries, self._right))
            self._probing = max((k for k in range(self.most + 1) if k != self._chosen), key=self.rate)
            self._probes = _PROBES - 1 if self._probing else 0
            return self._probing
        return self._chosen

    @property
    def best_rate(self) -> float | None:
        """Tokens a second with as many guesses as pay; None: that is being measured."""
        if any(not self._seconds[count].settled for count in {self.most, 1, 0}):
            return None
        return max(map(self.rate, range(self.most + 1)))

    def plain_tokens(self) -> int:
        """How many tokens to decode plainly before `choose` is asked again."""
        return self._stretch - self._since if self._chosen == 0 and self._since < self._stretch else _FIRST

    def rate(self, count: int) -> float:
        """Tokens a second with so many guesses."""
        expected, likely = 1.0, 1.0
        for chance in self.acceptance[:count]:
            likely *= chance
            expected += likely
        return expected / self._time(count)

    def guessed(self, count: int, right: int, seconds: float) -> None:
        """A round with `count` guesses, of which the first `right` were, took so long."""
        self._seconds[count].add(seconds)
        self._since += right + 1
        for number in range(min(right + 1, count)):
            keep = min(1.0, (_MEMORY - 1) / self._tries[number])
            self._tries[number] = keep * self._tries[number] + 1
            self._right[number] = keep * self._right[number] + (number < right)

    def decoded(self, tokens: int, seconds: float) -> None:
        """So many tokens without guesses took so long."""
        for _ in range(min(tokens, _FIRST)):
            self._seconds[0].add(seconds / tokens)
        self._since += tokens

    def _time(self, count: int) -> float:
        """Measured, or in a line between what was measured: a round takes so much, and so much more a guess."""
        if self._seconds[count].count:
            return self._seconds[count].value
        known = [k for k, seconds in enumerate(self._seconds) if seconds.count]
        below, above = max(k for k in known if k < count), min(k for k in known if k > count)
        low, high = self._seconds[below].value, self._seconds[above].value
        return low + (high - low) * (count - below) / (above - below)
