"""Rounds of guessing and verifying, and plain steps between them where guesses do not pay.

Knows when a round is computed and where the cache is after each of its tokens. A round verifies the token that was
drawn last and k guesses after it in one call of the model:

    cache  .. a b      drawn: c      guesses: d e f
    the model sees        c  d  e  f
    and says              d  e  x  y      -> d and e are right, x is drawn in place of f, y is void
    cache  .. a b c d e   drawn: x

A call with a few tokens computes of each what a call with it alone would: bit for bit where docs/EXACTNESS.md says so,
and there greedy decoding says the same with and without guesses; elsewhere but for ties within rounding. The state
after each token is kept on the way: going back to the last right one is a choice among them.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from typing import TYPE_CHECKING

import mlx.core as mx

from mlx_qwen35.decoding import Drawn, Step, draw, steps
from mlx_qwen35.sampling import History
from mlx_qwen35.speculative.rejection import judge

if TYPE_CHECKING:
    from mlx_qwen35.cache import Cache
    from mlx_qwen35.model import Model
    from mlx_qwen35.sampling import Sampler
    from mlx_qwen35.speculative.drafters import Drafter


def decode(
    model: Model,
    cache: Cache,
    logits: mx.array,
    sampler: Sampler,
    history: History,
    *,
    drafter: Drafter,
    max_tokens: int,
) -> Generator[Step, None, None]:
    """Draws tokens from `logits` [1, V] on, at most `max_tokens`; as decoding.decode, with guesses of `drafter`.

    When a step is yielded, the cache covers its token, and perhaps more that are yielded next: `step.after`.
    """
    if max_tokens < 1:
        return
    drawn, pace = draw(logits, sampler, history), drafter.pace
    left = max_tokens
    while left:
        count = min(pace.choose(), left - 1)
        if count:
            start = time.perf_counter()
            found, drawn, history = _round(model, cache, drawn, sampler, history, drafter, count)
            pace.guessed(count, len(found) - 1, time.perf_counter() - start)
            left -= len(found)
            yield from found
        else:
            plain = min(pace.plain_tokens(), left)
            left -= plain
            drawn = yield from _plainly(model, cache, drawn, sampler, history, drafter, plain, more=left > 0)
    mx.clear_cache()


def _plainly(
    model: Model,
    cache: Cache,
    drawn: Drawn,
    sampler: Sampler,
    history: History,
    drafter: Drafter,
    count: int,
    *,
    more: bool,
) -> Generator[Step, None, Drawn]:
    """Plain steps, timed without what is done between them."""
    stream = steps(model, cache, drawn, sampler, history, count=count, draw_more=more, follow=drafter.follow)
    seconds = 0.0
    while True:
        start = time.perf_counter()
        try:
            step = next(stream)
        except StopIteration as end:
            mx.eval(end.value[0])  # or the last step would not be in the time
            drafter.pace.decoded(count, seconds + time.perf_counter() - start)
            return end.value
        seconds += time.perf_counter() - start
        yield step


def _round(
    model: Model,
    cache: Cache,
    drawn: Drawn,
    sampler: Sampler,
    history: History,
    drafter: Drafter,
    count: int,
) -> tuple[list[Step], Drawn, History]:
    """The steps of one round, the token drawn at its end, and the history with that token. The cache covers the steps.

    An error or interrupt leaves the cache as it was.
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
        tokens = mx.concatenate([token, *guesses])  # [k + 1]
        with cache.each_step() as after:
            hidden = model.hidden(tokens[None], cache)  # [1, k + 1, H]
            drafter.follow(tokens[None], hidden)
        greedy = weights[0] is None
        verdict = judge(
            sampler,
            model.head(hidden)[0],
            History.joined(histories),
            tokens[1:],
            None if greedy else mx.concatenate(weights),
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
            tokens=[said[number]],
            logprobs=logprobs[number : number + 1],
            before=befores[number],
            after=after[number] if number < right else None,
            from_draft=number > 0,
            drafted=0 if number else count,
        )
        for number in range(right + 1)
    ]
    last = verdict.tokens[right : right + 1], verdict.logprobs[right : right + 1]
    return found, last, histories[right].then(last[0])
