"""How long a piece of a prompt may be that is computed while others decode, and when it is its turn.

Knows seconds and counts of tokens. Knows nothing of requests, and reads no clock.

Whoever decodes waits while a piece is computed. On average that adds at most `pause` times a step's time:

    credit += pause x seconds of a step        credit -= seconds of a piece        a piece needs credit for its time

What a piece takes is what its turn and the step behind it take beyond what two steps do: a step that was queued before
it is waited for inside it, and the one behind it begins with nothing queued.

Where more wait for their prompts than decode, `pause` is as many times larger: seven do not wait for one.

A piece is as long as is predicted to take pause x step, or, where shorter ones cost more a token or several prompts
wait, a tenth of a second (as rarely as credit has it), and as many tenths as prompts wait for each row that decodes.
Where even `least` tokens take longer (a short piece reads all weights, as a step does), it is `least`, and what costs
next to nothing more. The prediction is a line through what was measured of short, longer and long pieces, as running
means that one hiccup does not move far.
"""

from __future__ import annotations

_NEW = 0.25  # weight of a new time among the old ones
_OUTLIER = 2.5  # a time so many times the usual one is a hiccup, and counts as that many
_SURE = 2  # times a length was measured before its time is believed: the first may have compiled kernels
_UNSURE = 4.0  # steps' shares that a piece whose time is not known well waits for, or is charged, at the most
_NEARLY = 1.25  # times as long as the shortest a piece may take, or as much a token as a longer one, to be as good
_SAVED = 1.5  # pieces' worth of credit that can be saved up
_DEBT = 4.0  # pieces' worth of credit that can be owed
_UNIT = 4  # tokens: pieces are multiples of it
_UNSEEN = 0.1  # seconds that a piece may take, which nobody sees: short ones may cost several times as much a token
_SOME = 0.1  # of what was measured of a piece, which counts even where the step behind it was as much quicker
_SHORT = 256  # tokens of a piece that may go with others' while little is known of times
_LITTLE = 5.0  # times as long as the shortest a piece may take alone, to be better computed with others
_BLIND = 4  # turns without any measured step after which the least is computed all the same


class _Mean:
    """A running mean of a time (and of the tokens it was measured at); of the first two, the shorter time counts."""

    def __init__(self) -> None:
        self.seconds, self.tokens, self.count = 0.0, 0.0, 0

    def add(self, seconds: float, tokens: float = 1.0) -> None:
        self.count += 1
        if self.count == 1:
            self.seconds, self.tokens = seconds, tokens
        elif self.count == 2 and seconds / tokens < self.seconds / self.tokens:
            self.seconds, self.tokens = seconds, tokens
        else:
            usual = self.seconds * tokens / self.tokens if tokens > self.tokens else self.seconds
            self.seconds += _NEW * (min(seconds, _OUTLIER * usual) - self.seconds)
            self.tokens += _NEW * (tokens - self.tokens)


def _on_line(points: list[tuple[float, float]], at: float) -> float:
    """The line through points of which neither x nor y falls; after the last, in proportion to it, which is careful."""
    if at < points[0][0] and len(points) > 1:
        (x, y), (x2, y2) = points[:2]
        return max(y * at / x, y - (y2 - y) * (x - at) / (x2 - x))
    below = None
    for above in points:
        if above[0] > at:
            break
        below = above
    else:
        above = None
    if below is None or above is None:
        x, y = below or above
        return y * at / x
    return below[1] + (above[1] - below[1]) * (at - below[0]) / (above[0] - below[0])


class Pieces:
    """pause: seconds of pieces for each second of steps, on average. chunk, least: tokens of the longest piece, and of
    the shortest that is worth a turn."""

    def __init__(self, pause: float, chunk: int, least: int) -> None:
        self.pause, self.chunk, self.least = pause, chunk, min(least, chunk)
        self._base = pause
        self._step = _Mean()
        self._lengths: dict[int, _Mean] = {}  # by bits of the count of tokens
        self._credit = 0.0
        self._tried = False  # whether a piece was computed beside others yet
        self._several = False  # whether more than one prompt waits
        self._pending: tuple[int, float] | None = None  # tokens and seconds of a piece with no step behind it so far
        self._crowd = 1.0  # prompts that wait for each row that decodes, 1 at the least
        self._blind = 0

    def crowd(self, prompts: int, decoding: int) -> None:
        """So many wait for their prompts, and so many decode: where more wait, their seconds weigh more, and a piece
        may take longer."""
        self._several, self._crowd = prompts > 1, max(1.0, prompts / max(1, decoding))
        self.pause = self._base * self._crowd

    def nobody_decodes(self) -> None:
        """What was saved or owed is forgotten: there is nobody to owe it to."""
        self._credit, self._blind = 0.0, 0
        self._settle(0.0)

    def stepped(self, seconds: float) -> None:
        """A step of those that decode took so long."""
        if self._pending is not None and self._step.count:
            usual = self._step.seconds
            more = min(seconds, _OUTLIER * usual) - usual
            self._credit = max(self._credit - more, -_DEBT * self._price(self._pending[0]))
            self._settle(more)
        else:
            self._step.add(seconds)
            usual = min(seconds, _OUTLIER * self._step.seconds)
        share = self.pause * self._step.seconds
        piece = self.seconds(self._wanted()) or 0.0
        self._credit = min(self._credit + self.pause * usual, max(self._credit, _SAVED * max(share, piece)))

    def computed(self, tokens: int, seconds: float, *, beside: bool) -> None:
        """A piece of so many tokens took so long; beside: others decode, and waited for it."""
        if tokens < 1:
            return
        self._settle(0.0)
        self._pending = tokens, seconds
        if beside:
            self._tried = True
            self._credit = max(self._credit - seconds, -_DEBT * self._price(tokens))
        else:
            self._settle(0.0)

    def _settle(self, more: float) -> None:
        """What the last piece took is known: so much more than was measured of it alone."""
        if self._pending is not None:
            tokens, seconds = self._pending
            self._lengths.setdefault(tokens.bit_length(), _Mean()).add(max(seconds + more, _SOME * seconds), tokens)
            self._pending = None

    def next(self) -> int:
        """The most tokens of a piece in this turn, beside others; 0: none in this one."""
        if not self.pause:
            return 0
        if not self._step.count:
            self._blind += 1
            return self.least if self._blind > _BLIND else 0
        wanted = self._wanted()
        if self._credit >= self._price(wanted):
            return wanted
        if self._credit <= 0 or not self._known(wanted) or self.seconds(wanted) > self.pause * self._step.seconds:
            return 0
        smaller = self._longest(self._credit)  # something is owed: somewhat less, and at once
        return smaller if smaller >= wanted // 2 else 0

    def worth_sharing(self, tokens: int) -> bool:
        """Whether a piece of so many tokens is better computed in one call with others: they wait for its tokens, and
        it saves what a call takes whatever is in it."""
        if tokens <= self.least or not (self._known(self.least) and self._known(tokens)):
            return tokens <= _SHORT
        return self.seconds(tokens) <= _LITTLE * self.seconds(self.least)

    def seconds(self, tokens: int) -> float | None:
        """What a piece of so many tokens is predicted to take; None: nothing was measured."""
        points = self._points()
        return _on_line(points, tokens) if points else None

    def _points(self) -> list[tuple[float, float]]:
        """(tokens, seconds) of what was measured, neither falling."""
        points, highest = [], 0.0
        for _, mean in sorted(self._lengths.items()):
            highest = max(highest, mean.seconds)
            points.append((mean.tokens, highest))
        return points

    def _wanted(self) -> int:
        """Tokens of a piece for which there is credit."""
        shortest = self.seconds(self.least)
        if shortest is None or not self._tried:
            return self.least
        share = self.pause * self._step.seconds
        unseen = self._longest(max(share, _UNSEEN * self._crowd))
        if shortest <= share and not self._several:
            short = self._longest(share)
            return short if self.seconds(short) * unseen <= _NEARLY * self.seconds(unseen) * short else unseen
        if unseen:
            return unseen
        longer = min(2 * self.least, self.chunk)
        if self._known(self.least) and not self._known(longer):
            return longer  # twice, to see what more tokens cost
        return self._longest(_NEARLY * shortest)

    def _longest(self, seconds: float) -> int:
        """The most tokens predicted to take no longer (in fours, so that shapes recur); 0: not even the least."""
        points = self._points()
        low, high = self.least - 1, self.chunk
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if _on_line(points, middle) <= seconds else (low, middle - 1)
        return 0 if low < self.least else low if low == self.chunk else max(self.least, low // _UNIT * _UNIT)

    def _price(self, tokens: int) -> float:
        """Credit that a piece needs; one whose time is not known well needs no more than a few steps' shares."""
        share, predicted = self.pause * self._step.seconds, self.seconds(tokens)
        if predicted is None or not self._known(tokens):
            return min(predicted or share, _UNSURE * share)
        return predicted

    def _known(self, tokens: int) -> bool:
        """Whether pieces of about so many tokens were measured often enough."""
        mean = self._lengths.get(tokens.bit_length())
        return mean is not None and mean.count >= _SURE
