"""Which guesses are kept: those that decoding would say itself, or by rejection sampling where they were drawn.

Knows distributions over the vocabulary, one a position. Knows nothing of who guessed.
With q what a guess d was drawn from and p what decoding would draw from there, d is kept with probability
min(1, p(d) / q(d)); otherwise a token is drawn from what p has over q, and later guesses are void:

    P(token = x)  =  min(p(x), q(x))  +  P(rejected) max(p(x) - q(x), 0) / sum max(p - q, 0)  =  p(x)

A guess that was not drawn, as what stood behind the same words before, needs no q: what decoding draws is drawn, by the
key that it would take for this token, and the guess is kept if it is the same. So nothing of the answer hangs on it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_qwen35.sampling.steps import drawn

if TYPE_CHECKING:
    import numpy as np

    from mlx_qwen35.sampling import History, Sampler


class Verdict(NamedTuple):
    """Of k guesses. right []: how many, from the first on, are kept; tokens [k + 1]: what is drawn where guess j is not
    kept, and after all of them; logprobs [k + 1, V]. All lazy."""

    right: mx.array
    tokens: mx.array
    logprobs: mx.array


def judge(
    sampler: Sampler,
    logits: mx.array,
    history: History,
    guesses: mx.array,
    weights: mx.array | None,
    words: np.ndarray | None = None,
    keys: mx.array | None = None,
) -> Verdict:
    """logits [k + 1, V]: where decoding draws the tokens that guesses [k] stand for, and the one after them.

    history: k + 1 rows, the tokens before each. weights [k, V]: log weights that the guesses were drawn with; None:
    they were not drawn, so that each is right if it is what decoding draws there, with the key that it would have,
    keys [k + 1, 2]. words [k + 1, W]: what may come at each place, as in `masking.masked`.
    """
    if weights is None:
        tokens, logprobs = sampler(logits, history, words, keys)
        kept = tokens[:-1] == guesses
    else:
        target, logprobs = sampler.weights(logits, history, words)
        kept, tokens = _drawn(target, guesses, weights, *mx.random.split(sampler.next_key()))
    return Verdict(mx.cumprod(kept.astype(mx.int32)).sum(), tokens, logprobs)


def _drawn(
    target: mx.array, guesses: mx.array, weights: mx.array, coins: mx.array, dice: mx.array
) -> tuple[mx.array, mx.array]:
    """target [k + 1, V], weights [k, V]: log weights; coins, dice: random keys -> kept [k] bool, tokens [k + 1]."""
    p, q = mx.softmax(target, axis=-1), mx.softmax(weights, axis=-1)
    p_guess, q_guess = (mx.take_along_axis(of, guesses[:, None], axis=-1)[:, 0] for of in (p[:-1], q))
    kept = mx.random.uniform(shape=guesses.shape, key=coins) * q_guess < p_guess
    over = mx.maximum(p[:-1] - q, 0)
    # p and q alike up to rounding: a rejection is as good as impossible, and p is right for it.
    over = mx.where(over.sum(axis=-1, keepdims=True) > 0, over, p[:-1])
    tokens = drawn(mx.log(mx.concatenate([over, p[-1:]])), dice)
    return kept, tokens
