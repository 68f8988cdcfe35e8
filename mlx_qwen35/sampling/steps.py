"""From logits to a token, step by step: mask, bias, penalties, temperature, top-k, top-p, min-p, and the draw.

Knows arrays, and the numbers of a Sampling or of several. Knows no random key but the one that it is given, and nothing
of who asks: sampler.py for itself, rows.py for many rows. Everything is lazy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from mlx_qwen35.errors import ArgumentError

from .largest import top_ids
from .masking import masked

if TYPE_CHECKING:
    from .asked import Sampling
    from .history import History

MOST_BEST = 64  # largest logits that are worth asking for by themselves
_LEAST = 2.0**-33  # in place of a random number of 0, half of the least above it


class Steps:
    """The steps of a Sampling over logits; or those of several that differ in numbers only, one for each row.

    tokens: how many the tokenizer has. The head may have more rows than that, which no token stands for: they are cut
    off here, before anything else, so that nothing is ever drawn from them. None: every row of the head is a token.
    """

    def __init__(self, samplings: Sequence[Sampling], tokens: int | None = None) -> None:
        self._samplings, self._tokens, first = samplings, tokens, samplings[0]
        self.greedy = first.temperature == 0
        self._needs_history, self._top_k, self._sorts = first.needs_history, first.top_k, first.top_p < 1
        self._bias: mx.array | None = None  # [1 or B, V], made when V is known
        self._repetition = self._column("repetition_penalty", 1.0)
        self._presence = self._column("presence_penalty", 0.0)
        self._frequency = self._column("frequency_penalty", 0.0)
        self._temperature = self._column("temperature", 0.0)
        self._top_p = self._column("top_p", 1.0)
        self._min_p = self._column("min_p", 0.0, lambda value: math.log(value) if value else -math.inf)

    @staticmethod
    def form(sampling: Sampling) -> tuple[Any, ...]:
        """Samplings with the same form can be the rows of one `Steps`."""
        penalised = sampling.repetition_penalty != 1.0
        return (
            bool(sampling.logit_bias),
            penalised,
            sampling.repetition_context_size if penalised else None,
            sampling.presence_penalty != 0.0,
            sampling.frequency_penalty != 0.0,
            None if sampling.temperature == 0 else (sampling.top_k, sampling.top_p < 1),
        )

    def _column(self, name: str, off: float, of: Callable[[float], float] = float) -> float | mx.array | None:
        """A number, or [B, 1] of them; None where it is off in all rows."""
        values = [getattr(sampling, name) for sampling in self._samplings]
        if all(value == off for value in values):
            return None
        return of(values[0]) if len(values) == 1 else mx.array([of(value) for value in values], mx.float32)[:, None]

    def width(self, vocab_size: int) -> int:
        """How many of the head's rows are tokens."""
        return vocab_size if self._tokens is None else min(self._tokens, vocab_size)

    def adjusted(self, logits: mx.array, history: History | None = None, words: np.ndarray | None = None) -> mx.array:
        """logits [B, V] -> [B, tokens] float32, with mask, bias and penalties, or as a budget forces them."""
        if self._needs_history and history is None:
            raise ValueError("a repetition, presence or frequency penalty needs a History of the rows")
        size = self.width(logits.shape[-1])
        logits = logits[:, :size].astype(mx.float32)
        if words is not None:
            logits = masked(logits, words)
        if self._samplings[0].logit_bias:
            if self._bias is None:
                rows = [bias_row(sampling.logit_bias, size) for sampling in self._samplings]
                self._bias = mx.array(np.concatenate(rows))
            logits = logits + self._bias
        if self._repetition is not None:
            smaller = mx.where(logits < 0, logits * self._repetition, logits / self._repetition)
            logits = mx.where(history.repeated()[:, :size], smaller, logits)
        if self._presence is not None:
            logits = logits - history.answered[:, :size].astype(mx.float32) * self._presence
        if self._frequency is not None:
            logits = logits - history.counts[:, :size].astype(mx.float32) * self._frequency
        return logits if history is None or history.budget is None else history.budget.only(logits)

    def best_wanted(self, vocab_size: int) -> tuple[int, int] | None:
        """(how many of a row's largest logits decide about its token, of the first how many); None: others do too, or
        the draw hangs on their order."""
        if self._samplings[0].logit_bias or self._needs_history:
            return None
        sorted_few = self._sorts and 0 < self._top_k <= MOST_BEST
        return (1 if self.greedy else self._top_k, self.width(vocab_size)) if self.greedy or sorted_few else None

    def largest(self, logits: mx.array, ids: mx.array | None = None) -> mx.array:
        """The token [B] of the largest; ids: of these logits, [B, K], None: in their order."""
        place = mx.argmax(logits, axis=-1)
        return place if ids is None else mx.take_along_axis(ids, place[:, None], axis=-1)[:, 0]

    def draw(self, logits: mx.array, key: mx.array, ids: mx.array | None = None) -> mx.array:
        """Adjusted logits [B, V], key as in `drawn` -> token [B]. For temperatures above 0. ids: as in `largest`."""
        scaled, ids = self.candidates(logits, ids)
        place = drawn(scaled, key)
        return place if ids is None else mx.take_along_axis(ids, place[:, None], axis=-1)[:, 0]

    def candidates(self, logits: mx.array, ids: mx.array | None = None) -> tuple[mx.array, mx.array | None]:
        """Adjusted logits [B, V] -> log weights [B, K] of what may be drawn, and its ids; None: all, in their order.

        Nothing here needs log probabilities: those of a whole vocabulary are computed where somebody reads them.
        ids: as in `largest`.
        """
        if 0 < self._top_k < logits.shape[-1]:
            kept = top_ids(logits, self._top_k)
            ids = kept if ids is None else mx.take_along_axis(ids, kept, axis=-1)
            logits = mx.take_along_axis(logits, kept, axis=-1)
        if self._sorts:
            order = mx.argsort(-logits, axis=-1)
            ids = order if ids is None else mx.take_along_axis(ids, order, axis=-1)
            logits = mx.take_along_axis(logits, order, axis=-1)
        scaled = logits / self._temperature
        if self._sorts:
            probs = mx.softmax(scaled, axis=-1)
            before = mx.cumsum(probs, axis=-1) - probs  # mass of the better ones: 0 for the best, which always stays
            scaled = mx.where(before < self._top_p, scaled, -mx.inf)
        if self._min_p is not None:
            floor = scaled.max(axis=-1, keepdims=True) + self._min_p
            scaled = mx.where(scaled >= floor, scaled, -mx.inf)
        return scaled, ids


def normalised(logits: mx.array) -> mx.array:
    """Logits [B, V] -> log probabilities."""
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def drawn(weights: mx.array, key: mx.array) -> mx.array:
    """An id of each row [B], with probabilities as exp(weights) are, [B, V]; -inf is never drawn.

    key: one for all rows [2], or each row's own [B, 2], which draws for it what the row alone with that key would get.
    (mx.random.categorical draws by other rules for one row than for several, and takes one key.)

    Each id waits for a time -log(1 - u) / exp(weight), u random: who is first has won with the right probability.
    """
    if key.ndim == 1:
        u = mx.random.uniform(_LEAST, 1.0, weights.shape, key=key)
    else:
        u = mx.vmap(lambda one: mx.random.uniform(_LEAST, 1.0, weights.shape[1:], key=one))(key)
    return mx.argmax(weights - mx.log(-mx.log1p(-u)), axis=-1)


def bias_row(bias: Mapping[int, float], vocab_size: int) -> np.ndarray:
    """token id -> amount as one row [1, V]"""
    row = np.zeros((1, vocab_size), dtype=np.float32)
    for token, amount in bias.items():
        if not 0 <= int(token) < vocab_size:
            raise ArgumentError(f"logit_bias names token {token}; the vocabulary has ids 0 to {vocab_size - 1}")
        row[0, int(token)] = amount
    return row
