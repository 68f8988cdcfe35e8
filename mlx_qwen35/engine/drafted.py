"""Steps of a row that drafts and goes on alone: rounds of guesses, and plain steps where guesses do not pay.

Knows how many guesses the drafter's pace asks for, and what it is told of the time they took.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from mlx_qwen35 import speculative
from mlx_qwen35.engine.group import Group, Seat, tell

if TYPE_CHECKING:
    from mlx_qwen35.decoding import Step
    from mlx_qwen35.grammar import Matcher
    from mlx_qwen35.model import Model


class Drafted:
    """The steps of one seat that has a drafter. What is between two calls is in no time that its pace is told of."""

    def __init__(self, model: Model, seat: Seat, clock: Callable[[], float] = time.perf_counter) -> None:
        self._model, self._seat, self._now = model, seat, clock
        self._group = Group(model)
        self._plain = self._count = 0  # plain steps left, of so many in a row
        self._seconds = 0.0

    def steps(self, left: int) -> list[Step]:
        """The next steps, of `left` at the most. An error or interrupt leaves the cache as it was."""
        pace = self._seat.drafter.pace
        if not self._plain:
            count = min(pace.choose(), left - 1)
            if count:
                return self._round(count)
            self._plain = self._count = min(pace.plain_tokens(), left)
            self._seconds = 0.0
            self._group.change(joining=[self._seat])
        start = self._now()
        more = left > 1
        (step,) = self._group.step(drawing=more)
        self._plain -= 1
        if not self._plain:
            self._group.change(leaving=[self._seat])
            mx.eval(self._seat.drawn[0], self._seat.cache.arrays())  # or the last step would not be in the time
            pace.decoded(self._count, self._seconds + self._now() - start)
        self._seconds += self._now() - start
        return [step]

    def stop(self) -> None:
        """The seat is to sit elsewhere: it has everything back."""
        self._group.change(leaving=[self._seat])
        self._plain = 0

    def _round(self, count: int) -> list[Step]:
        seat, start = self._seat, self._now()
        allow = None if seat.matcher is None else lambda tokens: allowed(seat.matcher, tokens)
        drawn = seat.drawn
        found, seat.drawn, seat.history = speculative.guess_and_verify(
            self._model, seat.cache, drawn, seat.sampler, seat.history, seat.drafter, count, allow
        )
        if seat.matcher is not None:
            for step in found:
                seat.matcher.advance(step.token)
        seat.drafter.pace.guessed(count, len(found) - 1, self._now() - start)
        if seat.top is None:
            return found
        tokens, logprobs = mx.array([step.token for step in found]), mx.stack([step.logprobs for step in found])
        return [replace(step, told=told) for step, told in zip(found, tell(tokens, logprobs, seat.top), strict=True)]


def allowed(matcher: Matcher, tokens: Sequence[int]) -> list[np.ndarray | None]:
    """What may come after the first of these tokens, which was drawn, and after each that may follow it; None: any."""
    ahead = matcher.copy()
    ahead.advance(tokens[0])
    words = [ahead.mask()]
    for token in tokens[1 : 1 + ahead.accepted(tokens[1:])]:
        ahead.advance(token)
        words.append(ahead.mask())
    return words
