"""A round of guessing and verifying: the token that was drawn last and k guesses after it in one call of the model.

Knows what a round computes and where the cache is after each of its tokens:

    cache  .. a b      drawn: c      guesses: d e f
    the model sees        c  d  e  f
    and says              d  e  x  y      -> d and e are right, x is drawn in place of f, y is void
    cache  .. a b c d e   drawn: x

A call with a few tokens computes of each what a call with it alone would: bit for bit where docs/EXACTNESS.md says so,
and there greedy decoding says the same with and without guesses; elsewhere but for ties within rounding. The state
after each token is kept on the way: going back to the last right one is a choice among them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from mlx_qwen35.decoding import Drawn, Step
from mlx_qwen35.sampling import History
from mlx_qwen35.speculative.rejection import judge

if TYPE_CHECKING:
    from mlx_qwen35.cache import Cache
    from mlx_qwen35.model import Model
    from mlx_qwen35.sampling import Sampler
    from mlx_qwen35.speculative.drafters import Drafter

# What may come after each of these tokens, of as many as may come themselves; words as Sampler takes them, None: any.
Allow = Callable[[Sequence[int]], "list[np.ndarray | None]"]


def guess_and_verify(
    model: Model,
    cache: Cache,
    drawn: Drawn,
    sampler: Sampler,
    history: History,
    drafter: Drafter,
    count: int,
    allow: Allow | None = None,
) -> tuple[list[Step], Drawn, History]:
    """A round with `count` guesses: its steps, the token drawn at its end, and the history with that token. The cache
    covers the steps.

    allow: of the drawn token and the guesses, which may come where a grammar decides it: guesses are cut where it ends
    them. An error or interrupt leaves the cache as it was.
    """
    token, logprobs = drawn
    histories, guesses, weights = [history], [], []

    def choose(guessed: mx.array) -> mx.array:
        guess, weight = sampler.guess(guessed, histories[-1])
        guesses.append(guess)
        weights.append(weight)
        histories.append(histories[-1].then(guess))
        return guess

    before = cache.snapshot()
    try:
        drafter.guess(token, count, choose)
        words = None
        if allow is not None:
            after_each = allow(mx.concatenate([token, *guesses]).tolist())
            words, kept = _stacked(after_each), len(after_each) - 1
            guesses, weights, histories = guesses[:kept], weights[:kept], histories[: kept + 1]
        tokens = mx.concatenate([token, *guesses])  # [k + 1]
        with cache.each_step() as after:
            hidden = model.hidden(tokens[None], cache)  # [1, k + 1, H]
            drafter.follow(tokens[None], hidden)
        greedy = not weights or weights[0] is None
        verdict = judge(
            sampler,
            model.head(hidden)[0],
            History.joined(histories),
            tokens[1:],
            None if greedy else mx.concatenate(weights),
            words,
        )
        mx.eval(tokens, verdict, cache.arrays())
        right, said = verdict.right.item(), tokens.tolist()
        cache.restore(after[right])
        mx.eval(cache.arrays())  # which are parts of what is there
    except BaseException:
        cache.restore(before)
        raise
    logprobs = mx.concatenate([logprobs, verdict.logprobs])
    befores = [before, *after]
    found = [
        Step(
            token=said[number],
            logprobs=logprobs[number],
            before=befores[number],
            after=after[number] if number < right else None,
            from_draft=number > 0,
            drafted=0 if number else count,
        )
        for number in range(right + 1)
    ]
    last = verdict.tokens[right : right + 1], verdict.logprobs[right : right + 1]
    return found, last, histories[right].then(last[0])


def _stacked(words: Sequence[np.ndarray | None]) -> np.ndarray | None:
    """As one array, a row each; None where any token may come everywhere."""
    some = next((each for each in words if each is not None), None)
    if some is None:
        return None
    anything = np.full_like(some, 0xFFFFFFFF)
    return np.stack([anything if each is None else each for each in words])
