"""Logits to token: penalties, temperature, top-k, top-p, min-p, and a seed of its own.

Knows arrays of logits and token ids. Knows nothing of text, of the model or of when things are evaluated: everything
here is lazy, and the history of a row lives on the device, so that the next step can be queued before this token is
read.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, fields, replace
from functools import wraps
from numbers import Integral
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from mlx_qwen35 import checks
from mlx_qwen35.errors import ArgumentError, CheckpointError

if TYPE_CHECKING:
    from mlx_qwen35.thinking import ThinkingBudget

BLOCK = 256  # vocabulary entries that share one maximum in `top_ids`


def _named_only(cls: type) -> type:
    """Values of a dataclass are given by name; errors say so, and which name was meant."""
    make, names = cls.__init__, [spec.name for spec in fields(cls)]

    @wraps(make)
    def __init__(self: Any, *values: Any, **named: Any) -> None:
        if values:
            raise ArgumentError(
                f"{cls.__name__} takes its values by name: write {cls.__name__}(temperature={values[0]!r}), say"
            )
        for name in named:
            if name not in names:
                hint = checks.suggestion(name, names) or f"; there are {', '.join(names)}"
                raise ArgumentError(f"{cls.__name__} has no {name}{hint}")
        make(self, **named)

    cls.__init__ = __init__
    return cls


@_named_only
@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is drawn: the steps run in the order of the fields.

    logit_bias: token id -> amount added to its logit (-inf forbids it).
    repetition_penalty: logits of tokens seen in prompt or answer are divided (positive) or multiplied (negative) by it.
    repetition_context_size: only the last so many tokens count for the repetition penalty; None: all of them.
    presence_penalty: subtracted once from the logit of every token of the answer so far (not of the prompt).
    temperature: 0 takes the largest logit, and the fields below have no effect.
    top_k: keep exactly the k largest; 0: keep all.
    top_p: of those, keep the fewest whose renormalised probabilities reach top_p; 1: keep all.
    min_p: of those, keep what has at least min_p times the largest probability; 0: keep all.
    seed: the same seed, logits and batch draw the same tokens, whatever `mx.random.seed` says; None: never the same.
    """

    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)
    repetition_penalty: float = 1.0
    repetition_context_size: int | None = None
    presence_penalty: float = 0.0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name in ("repetition_penalty", "presence_penalty", "temperature", "top_p", "min_p"):
            checks.number(name, getattr(self, name))
        checks.whole("top_k", self.top_k, 0)
        checks.whole("repetition_context_size", self.repetition_context_size, 1, otherwise="for all tokens")
        checks.whole("seed", self.seed, 0, 2**64 - 1, otherwise="for another one each time")
        self._check_bias()
        self._require(self.repetition_penalty > 0, "repetition_penalty", "above 0; 1 turns it off")
        self._require(self.temperature >= 0, "temperature", "0 (greedy) or above")
        self._require(0 < self.top_p <= 1, "top_p", "above 0 and at most 1; 1 turns it off")
        self._require(0 <= self.min_p <= 1, "min_p", "between 0 and 1; 0 turns it off")

    def _check_bias(self) -> None:
        if self.logit_bias is not None and not isinstance(self.logit_bias, Mapping):
            raise ArgumentError(f"logit_bias is {checks.shown(self.logit_bias)}; give a dict {{token id: amount}}")
        for token, amount in (self.logit_bias or {}).items():
            if isinstance(token, bool) or not isinstance(token, Integral):
                raise ArgumentError(f"logit_bias names token {checks.shown(token)}; an id is a whole number")
            if amount != -math.inf:
                checks.number(f"logit_bias of token {token} (-inf forbids it)", amount)

    def _require(self, holds: bool, name: str, rule: str) -> None:
        if not holds:
            raise ArgumentError(f"{name} is {getattr(self, name)}; it must be {rule}")

    @classmethod
    def from_generation_config(cls, settings: Mapping[str, Any], **overrides: Any) -> Sampling:
        """The sampling that generation_config.json asks for; an override that is None is as if not given.

        `do_sample: false` means greedy. Without that key, a file that names a temperature, top_k or top_p means to
        sample, and one that names none of them (or is empty) means greedy. A temperature left out is 1.
        """
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty")
        given = {name: settings[name] for name in names if settings.get(name) is not None}
        for name, value in given.items():
            wanted = int if name == "top_k" else (int, float)
            if isinstance(value, bool) or not isinstance(value, wanted):
                raise CheckpointError(
                    f"generation_config.json: {name} is {value!r}, not a number; correct the file or remove the key"
                )
        sample = settings.get("do_sample")
        if sample is None:
            sample = any(name in given for name in ("temperature", "top_k", "top_p"))
        given["temperature"] = given.get("temperature", 1.0) if sample else 0.0
        try:
            base = cls(**given)
        except ValueError as error:
            raise CheckpointError(f"generation_config.json: {error}") from error
        return replace(base, **{name: value for name, value in overrides.items() if value is not None})

    @property
    def needs_history(self) -> bool:
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0


class History:
    """Which tokens each row has seen, as masks on the device: `append` takes a token that is not yet computed.

    prompts: one list of token ids a row (they count for the repetition penalty only). budget: of the reasoning of the
    same rows, which may force tokens. Only what `sampling` needs is kept.
    """

    def __init__(
        self,
        sampling: Sampling,
        prompts: Sequence[Sequence[int]],
        vocab_size: int,
        *,
        budget: ThinkingBudget | None = None,
    ) -> None:
        self.vocab_size = vocab_size
        self.budget = budget
        self.seen: mx.array | None = None  # [B, V] bool: in prompt or answer
        self.recent: mx.array | None = None  # [B, N]: the last N tokens, oldest first, V where there is none
        self.answered: mx.array | None = None  # [B, V] bool: in the answer
        rows = len(prompts)
        if sampling.repetition_penalty != 1.0:
            if sampling.repetition_context_size is None:
                seen = np.zeros((rows, vocab_size), dtype=bool)
                for row, prompt in enumerate(prompts):
                    seen[row, np.asarray(prompt, dtype=np.int64)] = True
                self.seen = mx.array(seen)
            else:
                recent = np.full((rows, sampling.repetition_context_size), vocab_size, dtype=np.int32)
                for row, prompt in enumerate(prompts):
                    tail = list(prompt)[-recent.shape[1] :]
                    recent[row, recent.shape[1] - len(tail) :] = tail
                self.recent = mx.array(recent)
        if sampling.presence_penalty != 0.0:
            self.answered = mx.zeros((rows, vocab_size), dtype=mx.bool_)

    def append(self, token: mx.array) -> None:
        """token: [B]"""
        index = token[:, None]
        if self.seen is not None:
            self.seen = mx.put_along_axis(self.seen, index, mx.array(True), axis=1)
        if self.recent is not None:
            self.recent = mx.concatenate([self.recent[:, 1:], index.astype(self.recent.dtype)], axis=1)
        if self.answered is not None:
            self.answered = mx.put_along_axis(self.answered, index, mx.array(True), axis=1)
        if self.budget is not None:
            self.budget = self.budget.after(token)

    def then(self, token: mx.array) -> History:
        """Another history that goes on with token [B]; this one stays as it is."""
        other = copy(self)
        other.append(token)
        return other

    @staticmethod
    def joined(histories: Sequence[History]) -> History:
        """One whose rows are those of all."""
        other = copy(histories[0])
        for name in ("seen", "recent", "answered"):
            if getattr(other, name) is not None:
                setattr(other, name, mx.concatenate([getattr(history, name) for history in histories]))
        if other.budget is not None:
            other.budget = other.budget.joined([history.budget for history in histories])
        return other

    def repeated(self) -> mx.array | None:
        """[B, V] bool, what the repetition penalty touches"""
        if self.recent is None:
            return self.seen
        # one column more than the vocabulary takes the empty places
        empty = mx.zeros((self.recent.shape[0], self.vocab_size + 1), dtype=mx.bool_)
        return mx.put_along_axis(empty, self.recent, mx.array(True), axis=1)[:, : self.vocab_size]


class Sampler:
    """Draws one token a row. Holds the random key, which moves on with every call."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._key = mx.random.key(secrets.randbits(64) if sampling.seed is None else sampling.seed)
        self._bias: mx.array | None = None

    def __call__(self, logits: mx.array, history: History | None = None) -> tuple[mx.array, mx.array]:
        """logits: [B, V] -> token [B], logprobs [B, V], both lazy.

        The log probabilities are those of the distribution after bias and penalties and before temperature and
        truncation, as mlx-lm reports them; a token that a budget forces has all of it. The caller appends the token to
        `history`.
        """
        logits = self._adjusted(logits, history)
        logprobs = _normalised(logits)
        if self.sampling.temperature == 0:
            return mx.argmax(logits, axis=-1), logprobs
        return self._draw(logprobs, self.next_key()), logprobs

    def weights(self, logits: mx.array, history: History | None = None) -> tuple[mx.array, mx.array]:
        """logits: [B, V] -> what a token is drawn with, as log weights [B, V] (-inf: never), and logprobs as above.

        Of the same logits and history, the distribution that a call draws from. For temperatures above 0.
        """
        logprobs = _normalised(self._adjusted(logits, history))
        scaled, ids = self._candidates(logprobs)
        if ids is None:
            return scaled, logprobs
        return mx.put_along_axis(mx.full(logprobs.shape, -mx.inf), ids, scaled, axis=-1), logprobs

    def guess(self, logits: mx.array, history: History | None = None) -> tuple[mx.array, mx.array | None]:
        """A call's token [B] with the log weights [B, V] that it was drawn with; None where the largest is taken."""
        if self.sampling.temperature == 0:
            return mx.argmax(self._adjusted(logits, history), axis=-1), None
        weights, _ = self.weights(logits, history)
        return mx.random.categorical(weights, axis=-1, key=self.next_key()), weights

    def next_key(self) -> mx.array:
        """A random key that was not used before."""
        self._key, key = mx.random.split(self._key)
        return key

    def _adjusted(self, logits: mx.array, history: History | None) -> mx.array:
        chosen = self.sampling
        if chosen.needs_history and history is None:
            raise ValueError("a repetition or presence penalty needs a History of the rows")
        logits = logits.astype(mx.float32)
        if chosen.logit_bias:
            if self._bias is None:
                self._bias = bias_row(chosen.logit_bias, logits.shape[-1])
            logits = logits + self._bias
        if chosen.repetition_penalty != 1.0:
            penalty = chosen.repetition_penalty
            smaller = mx.where(logits < 0, logits * penalty, logits / penalty)
            logits = mx.where(history.repeated(), smaller, logits)
        if chosen.presence_penalty != 0.0:
            logits = logits - history.answered.astype(mx.float32) * chosen.presence_penalty
        return logits if history is None or history.budget is None else history.budget.only(logits)

    def _draw(self, logprobs: mx.array, key: mx.array) -> mx.array:
        """logprobs: [B, V] -> token [B]"""
        scaled, ids = self._candidates(logprobs)
        drawn = mx.random.categorical(scaled, axis=-1, key=key)
        if ids is None:
            return drawn
        return mx.take_along_axis(ids, drawn[:, None], axis=-1)[:, 0]

    def _candidates(self, logprobs: mx.array) -> tuple[mx.array, mx.array | None]:
        """logprobs: [B, V] -> log weights [B, K] of what may be drawn, and its ids; None: of all, in their order."""
        chosen = self.sampling
        ids = None  # [B, K] what is still a candidate, best first; None: everything, in the order of the vocabulary
        if 0 < chosen.top_k < logprobs.shape[-1]:
            ids = top_ids(logprobs, chosen.top_k)
            logprobs = mx.take_along_axis(logprobs, ids, axis=-1)
        if chosen.top_p < 1:
            order = mx.argsort(-logprobs, axis=-1)
            ids = order if ids is None else mx.take_along_axis(ids, order, axis=-1)
            logprobs = mx.take_along_axis(logprobs, order, axis=-1)
        scaled = logprobs / chosen.temperature
        if chosen.top_p < 1:
            probs = mx.softmax(scaled, axis=-1)
            before = mx.cumsum(probs, axis=-1) - probs  # mass of the better ones: 0 for the best, which always stays
            scaled = mx.where(before < chosen.top_p, scaled, -mx.inf)
        if chosen.min_p > 0:
            floor = scaled.max(axis=-1, keepdims=True) + math.log(chosen.min_p)
            scaled = mx.where(scaled >= floor, scaled, -mx.inf)
        return scaled, ids


def _normalised(logits: mx.array) -> mx.array:
    """Logits [B, V] -> log probabilities."""
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def top_ids(scores: mx.array, k: int) -> mx.array:
    """The ids of the k largest scores of each row, in no order. scores: [B, V] -> [B, k]

    A whole vocabulary is not sorted (which is what argpartition does on a GPU): the k largest lie in the k blocks with
    the largest maxima, so the sort is over V / BLOCK maxima and then k * BLOCK scores. Of equal scores at the edge,
    any is kept.

        scores   3 1 | 0 9 | 7 8 | 2 4     BLOCK 2, k 2
        maxima    3  |  9  |  8  |  4      -> blocks 1 and 2
        inside   0 9 | 7 8                 -> ids 3 and 5
    """
    rows, vocab = scores.shape
    blocks = -(-vocab // BLOCK)
    if 2 * k >= blocks:
        return mx.argpartition(-scores, kth=k - 1, axis=-1)[:, :k]
    padded = mx.pad(scores, [(0, 0), (0, blocks * BLOCK - vocab)], constant_values=-mx.inf)
    padded = padded.reshape(rows, blocks, BLOCK)
    best = mx.argpartition(-padded.max(axis=-1), kth=k - 1, axis=-1)[:, :k]  # [B, k] block ids
    inside = mx.take_along_axis(padded, best[:, :, None], axis=1).reshape(rows, k * BLOCK)
    place = mx.argpartition(-inside, kth=k - 1, axis=-1)[:, :k]  # [B, k] places in `inside`
    ids = mx.take_along_axis(best, place // BLOCK, axis=-1) * BLOCK + place % BLOCK
    return mx.minimum(ids, vocab - 1)  # padding is only reached where fewer than k scores are above -inf


def bias_row(bias: Mapping[int, float], vocab_size: int) -> mx.array:
    """token id -> amount as one row [1, V]"""
    row = np.zeros((1, vocab_size), dtype=np.float32)
    for token, amount in bias.items():
        if not 0 <= int(token) < vocab_size:
            raise ArgumentError(f"logit_bias names token {token}; the vocabulary has ids 0 to {vocab_size - 1}")
        row[0, int(token)] = amount
    return mx.array(row)
