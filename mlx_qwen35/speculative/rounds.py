"""A round of guessing and verifying: the token that was drawn last and k guesses after it in one call of the model.

Knows what a round computes and where the cache is after each of its tokens:

    cache  .. a b      drawn: c      guesses: d e f
    the model sees        c  d  e  f
    and says              d  e  x  y      -> d and e are right, x is drawn in place of f, y is void
    cache  .. a b c d e   drawn: x

A call with a few tokens computes of each what a call with it alone would: bit for bit where docs/EXACTNESS.md says so,
and there greedy decoding says the same with and without guesses; elsewhere but for ties within rounding. The state
after each token is kept on the way: going back to the last right one is a choice among them. Of many tokens, what went
into the recurrence is kept in place of so many states, and it runs once more as far as they were right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from mlx_qwen35.sampling import History
from mlx_qwen35.speculative.drafters import Tapped
from mlx_qwen35.speculative.rejection import judge
from mlx_qwen35.speculative.step import Drawn, Step

if TYPE_CHECKING:
    from mlx_qwen35.cache import Cache
    from mlx_qwen35.model import Model
    from mlx_qwen35.sampling import Sampler
    from mlx_qwen35.speculative.drafters import Drafter

# What may come after each of these tokens, of as many as may come themselves; words as Sampler takes them, None: any.
Allow = Callable[[Sequence[int]], "list[np.ndarray | None]"]
KEPT = 8  # tokens of a call after each of which the states are kept


@dataclass
class Draft:
    """k guesses, as they are made: the history before each and after all, and log weights that they were drawn with
    (None: they were not). known: the same as numbers, where they are."""

    source: str
    histories: list[History]
    guesses: list[mx.array] = field(default_factory=list)
    weights: list[mx.array | None] = field(default_factory=list)
    known: list[int] | None = None

    def cut(self, count: int) -> None:
        """The first `count` alone."""
        self.guesses, self.weights = self.guesses[:count], self.weights[:count]
        self.histories = self.histories[: count + 1]


def copied(tokens: Sequence[int], history: History, source: str = "copy") -> Draft:
    """Guesses that are known; history: before the first."""
    draft = Draft(source, [history], known=list(tokens))
    for guess in mx.array(draft.known, mx.uint32).split(len(draft.known)) if draft.known else ():
        draft.guesses.append(guess)
        draft.histories.append(draft.histories[-1].then(guess))
    draft.weights = [None] * len(draft.guesses)
    return draft


def guessed(
    drafter: Drafter, token: mx.array, sampler: Sampler, history: History, count: int, instead: Sequence[int] = ()
) -> Draft:
    """`count` guesses of a drafter after `token` [1], history: with it. instead: tokens to take in place of them, if
    the drafter thinks the first of them the likeliest."""
    draft = Draft("head", [history])
    agreed = False

    def choose(logits: mx.array) -> mx.array | None:
        nonlocal agreed
        guess, weight = sampler.guess(logits, draft.histories[-1])
        if instead and not draft.guesses:  # by what is likeliest: what was drawn would be chosen among
            agreed = (guess if weight is None else mx.argmax(weight, axis=-1)).item() == instead[0]
            if agreed:
                return None
        draft.guesses.append(guess)
        draft.weights.append(weight)
        draft.histories.append(draft.histories[-1].then(guess))
        return guess

    drafter.guess(token, count, choose)
    return copied(instead, history) if agreed else draft


def verify(
    model: Model,
    cache: Cache,
    drawn: Drawn,
    sampler: Sampler,
    history: History,
    make: Callable[[], Draft],
    allow: Allow | None = None,
) -> tuple[list[Step], Drawn, History, Draft]:
    """A round with the guesses that `make` makes: its steps, the token drawn at its end, the history with that token,
    and the guesses. The cache covers the steps.

    history: with the drawn token. allow: of the drawn token and the guesses, which may come where a grammar decides it:
    guesses are cut where it ends them. An error or interrupt leaves the cache as it was.
    """
    token, logprobs = drawn
    before = cache.snapshot()
    try:
        draft = make()
        words, proposed = None, len(draft.guesses)
        if allow is not None:
            known = [token.item(), *draft.known] if draft.known is not None else None
            after_each = allow(known or mx.concatenate([token, *draft.guesses]).tolist())
            words = _stacked(after_each)
            draft.cut(len(after_each) - 1)
            proposed = proposed if draft.known is None else len(draft.guesses)
        tokens = mx.concatenate([token, *(guess.astype(token.dtype) for guess in draft.guesses)])  # [k + 1]
        with cache.each_step(late=len(tokens) > KEPT) as after:
            tapped = Tapped([cache.draft])
            hidden = model.hidden(tokens[None], cache, **tapped.asked)  # [1, k + 1, H]
            if cache.draft is not None:
                cache.draft.follow(tokens[None], tapped.of(cache.draft, hidden))
        drawn_with = bool(draft.weights) and draft.weights[0] is not None
        keys, states = (None, None)
        if not drawn_with and not sampler.greedy:
            keys, states = sampler.next_keys(len(tokens))
        verdict = judge(
            sampler,
            model.head(hidden)[0],
            History.joined(draft.histories),
            tokens[1:],
            mx.concatenate(draft.weights) if drawn_with else None,
            words,
            keys,
        )
        mx.eval(tokens, verdict.right, verdict.tokens, cache.arrays())
        right, said = verdict.right.item(), tokens.tolist()
        cache.restore(after[right])
        mx.eval(cache.arrays())  # which are parts of what is there, or computed once more
    except BaseException:
        cache.restore(before)
        raise
    if states is not None:
        sampler.key = states[right]
    logprobs = mx.concatenate([logprobs, verdict.logprobs])
    befores = [before, *after]
    found = [
        Step(
            token=said[number],
            logprobs=logprobs[number],
            before=befores[number],
            after=after[number] if number < right else None,
            from_draft=number > 0,
            drafted=0 if number else proposed,
            source=draft.source,
        )
        for number in range(right + 1)
    ]
    last = verdict.tokens[right : right + 1], verdict.logprobs[right : right + 1]
    return found, last, draft.histories[right].then(last[0]), draft


def _stacked(words: Sequence[np.ndarray | None]) -> np.ndarray | None:
    """As one array, a row each; None where any token may come everywhere."""
    some = next((each for each in words if each is not None), None)
    if some is None:
        return None
    anything = np.full_like(some, 0xFFFFFFFF)
    return np.stack([anything if each is None else each for each in words])
