"""How tokens are drawn: a sampler with a seed of its own.

Knows arrays of logits and the history of rows. Knows nothing of text, of the model or of when things are evaluated:
everything here is lazy.
"""

from __future__ import annotations

import secrets

import mlx.core as mx
import numpy as np

from .asked import Sampling
from .history import History
from .steps import Steps, drawn, normalised


class Sampler:
    """Draws one token a row. Holds the random key, which moves on with every call.

    tokens: how many the tokenizer has, as in `steps.Steps`. `words` of a call: what may come, as in `masking.masked`.
    """

    def __init__(self, sampling: Sampling, tokens: int | None = None) -> None:
        self.sampling, self.tokens = sampling, tokens
        self.greedy = sampling.temperature == 0
        self.key = mx.random.key(secrets.randbits(64) if sampling.seed is None else sampling.seed)
        self._steps = Steps([sampling], tokens)

    def __call__(
        self,
        logits: mx.array,
        history: History | None = None,
        words: np.ndarray | None = None,
        keys: mx.array | None = None,
        best: tuple[mx.array, mx.array] | None = None,
    ) -> tuple[mx.array, mx.array]:
        """logits: [B, V] -> token [B], logprobs [B, tokens], both lazy. keys: of each row, in place of the next one.
        best: as many of the largest logits as `best_wanted` said, and their ids, [B, K]: the token hangs on these.

        The log probabilities are those of the distribution after mask, bias and penalties and before temperature and
        truncation, as mlx-lm reports them; a token that a budget forces has all of it. The caller appends the token to
        `history`.
        """
        logits = self._steps.adjusted(logits, history, words)
        logprobs = normalised(logits)
        scores, ids = (logits, None) if best is None else best
        if self._steps.greedy:
            return self._steps.largest(scores, ids), logprobs
        return self._steps.draw(scores, self.next_key() if keys is None else keys, ids), logprobs

    def best_wanted(self, vocab_size: int) -> tuple[int, int] | None:
        """As Steps.best_wanted, where nothing but the sampling decides: no mask, no budget."""
        return self._steps.best_wanted(vocab_size)

    def weights(
        self, logits: mx.array, history: History | None = None, words: np.ndarray | None = None
    ) -> tuple[mx.array, mx.array]:
        """logits: [B, V] -> what a token is drawn with, as log weights [B, tokens] (-inf: never); and logprobs.

        Of the same logits and history, the distribution that a call draws from. For temperatures above 0.
        """
        logits = self._steps.adjusted(logits, history, words)
        scaled, ids = self._steps.candidates(logits)
        if ids is not None:
            scaled = mx.put_along_axis(mx.full(logits.shape, -mx.inf), ids, scaled, axis=-1)
        return scaled, normalised(logits)

    def guess(
        self, logits: mx.array, history: History | None = None, words: np.ndarray | None = None
    ) -> tuple[mx.array, mx.array | None]:
        """A call's token [B] with the log weights [B, tokens] it was drawn with; None where the largest is taken."""
        if self._steps.greedy:
            return mx.argmax(self._steps.adjusted(logits, history, words), axis=-1), None
        weights, _ = self.weights(logits, history, words)
        return drawn(weights, self.next_key()), weights

    def next_keys(self, count: int) -> tuple[mx.array, list[mx.array]]:
        """The keys of the next `count` calls [count, 2], and `key` after each of them; it does not move on."""
        states, keys, state = [], [], self.key
        for _ in range(count):
            state, key = mx.random.split(state)
            states.append(state)
            keys.append(key)
        return mx.stack(keys), states

    def next_key(self) -> mx.array:
        """A random key that was not used before."""
        self.key, key = mx.random.split(self.key)
        return key
