"""Steps of a row that drafts and goes on alone: rounds of guesses or copies, and plain steps where neither pays.

Knows whose draft a round takes, and what is told of the time that it took. A round takes one source: what a grammar
forces; a copy of what followed a long match; the drafter's guesses, or a copy from a short match where the first of
them agrees with it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_qwen35.engine.group import CATCH_UP, Group, Seat, tell
from mlx_qwen35.speculative import copying
from mlx_qwen35.speculative.rounds import Draft, copied, guessed, verify
from mlx_qwen35.speculative.rows import most_rows

if TYPE_CHECKING:
    from mlx_qwen35.grammar import Matcher
    from mlx_qwen35.model import Model
    from mlx_qwen35.speculative.step import Step

_NO_END = 2**40  # plain steps, where nothing says how many
_LEAST_FORCED = 2  # tokens that a grammar forces, for which plain steps are left


class _Copy(NamedTuple):
    kind: int
    tokens: list[int]
    source: str


class Drafted:
    """The steps of one seat that drafts. What is between two calls is in no time that is told of."""

    def __init__(self, model: Model, seat: Seat, clock: Callable[[], float] = time.perf_counter) -> None:
        self._model, self._seat, self._now = model, seat, clock
        self._group = Group(model)
        self._plain = self._count = 0  # plain steps left, and made in a row
        self._seconds = 0.0
        self._rows = most_rows(model)
        self._least = copying.LONG if model.expert_stats is not None else copying.LEAST  # tokens of a match
        self._planned = (0, 0)  # kind of a copy for which plain steps were left, and its length

    def steps(self, left: int) -> list[Step]:
        """The next steps, of `left` at the most. An error or interrupt leaves the cache as it was."""
        if self._plain and self._breaks(left):
            self._leave()
        if not self._plain:
            found = self._round(left - 1) if left > 1 else None
            if found is not None:
                return found
            drafter = self._seat.drafter
            self._plain, self._count = min(_NO_END if drafter is None else drafter.pace.plain_tokens(), left), 0
            self._seconds = 0.0
            self._group.change(joining=[self._seat])
        start = self._now()
        (step,) = self._group.step(drawing=left > 1)
        self._plain, self._count = self._plain - 1, self._count + 1
        if not self._plain:
            self._leave(start)
        else:
            self._seconds += self._now() - start
        return [step]

    def stop(self) -> None:
        """The seat is to sit elsewhere: it has everything back."""
        self._group.change(leaving=[self._seat])
        self._plain = 0

    def _leave(self, start: float | None = None) -> None:
        """Plain steps end; start: when the last of them began, if it is not in the time yet."""
        start = self._now() if start is None else start
        self._group.change(leaving=[self._seat])
        mx.eval(self._seat.drawn[0], self._seat.cache.arrays())  # or the last step would not be in the time
        seconds, self._plain = self._seconds + self._now() - start, 0
        if self._seat.drafter is not None:
            self._seat.drafter.pace.decoded(self._count, seconds)
        if self._seat.text is not None:
            self._seat.text.copying.decoded(self._count, seconds)

    @property
    def _otherwise(self) -> float | None:
        """Tokens a second of the drafter, as far as that is known."""
        return None if self._seat.drafter is None else self._seat.drafter.pace.best_rate

    def _breaks(self, left: int) -> bool:
        """Whether plain steps are to be left, since the token that is being computed is likely to begin a copy."""
        text, matcher = self._seat.text, self._seat.matcher
        if text is None or left < 2:
            return False
        if matcher is not None and len(matcher.forced()) >= _LEAST_FORCED:
            return True
        length = text.match.length + 1
        if length < max(copying.SURE, self._least):
            return False
        kind = copying.kind_of(length)
        count = text.copying.choose(kind, min(left - 1, self._rows - 1), self._otherwise)
        self._planned = kind, count
        return count > 0

    def _round(self, most: int) -> list[Step] | None:
        """A round with `most` guesses at the most; None: a plain step is better."""
        seat, most = self._seat, min(most, self._rows - 1)
        copy = None if seat.text is None else self._copy(most)
        self._planned = 0, 0
        if copy is not None:
            found, draft, seconds = self._verified(lambda: copied(copy.tokens, seat.history, copy.source))
            if draft.guesses:
                seat.text.copying.copied(copy.kind, len(draft.guesses), len(found) - 1, seconds)
            if seat.drafter is not None and seat.drafter.waiting >= CATCH_UP:
                seat.drafter.catch_up()  # what waits for it would grow with the text
            return found
        count = 0 if seat.drafter is None else min(seat.drafter.pace.choose(), most)
        if not count:
            return None
        short = None if seat.text is None else self._copy(most, agreed=True)
        instead = [] if short is None else short.tokens
        token, history = seat.drawn[0], seat.history
        found, draft, seconds = self._verified(
            lambda: guessed(seat.drafter, token, seat.sampler, history, count, instead)
        )
        if draft.source == "head":
            seat.drafter.pace.guessed(count, len(found) - 1, seconds)
        elif draft.guesses:
            seat.text.copying.copied(short.kind, len(draft.guesses), len(found) - 1, None)
        return found

    def _copy(self, most: int, *, agreed: bool = False) -> _Copy | None:
        """What to copy after the drawn token. agreed: from a short match, in case a drafter agrees."""
        text, matcher = self._seat.text, self._seat.matcher
        token = self._seat.drawn[0].item()
        if matcher is not None and not agreed:
            ahead = matcher.copy()
            ahead.advance(token)
            forced = ahead.forced()[:most]
            if forced and (count := text.copying.choose(copying.GRAMMAR, len(forced), self._otherwise)):
                return _Copy(copying.GRAMMAR, forced[:count], "grammar")
        match = text.after(token)
        short = match.length < copying.SURE and self._seat.drafter is not None
        if match.length < self._least or short != agreed:
            return None
        kind = copying.kind_of(match.length, agreed=agreed)
        planned, count = self._planned
        if kind != planned:
            count = text.copying.choose(kind, most, self._otherwise)
        tokens = text.draft(match, count, token)
        return _Copy(kind, tokens, "copy") if tokens else None

    def _verified(self, make: Callable[[], Draft]) -> tuple[list[Step], Draft, float]:
        seat, start = self._seat, self._now()
        allow = None if seat.matcher is None else lambda tokens: allowed(seat.matcher, tokens)
        found, seat.drawn, seat.history, draft = verify(
            self._model, seat.cache, seat.drawn, seat.sampler, seat.history, make, allow
        )
        if seat.matcher is not None:
            for step in found:
                seat.matcher.advance(step.token)
        seconds = self._now() - start
        if seat.top is not None:
            tokens, logprobs = mx.array([step.token for step in found]), mx.stack([step.logprobs for step in found])
            told = tell(tokens, logprobs, seat.top)
            found = [replace(step, told=each) for step, each in zip(found, told, strict=True)]
        return found, draft, seconds


def allowed(matcher: Matcher, tokens: Sequence[int]) -> list[np.ndarray | None]:
    """What may come after the first of these tokens, which was drawn, and after each that may follow it; None: any."""
    ahead = matcher.copy()
    ahead.advance(tokens[0])
    words = [ahead.mask()]
    for token in tokens[1 : 1 + ahead.accepted(tokens[1:])]:
        ahead.advance(token)
        words.append(ahead.mask())
    return words
