"""Logits to token: penalties, temperature, top-k, top-p, min-p, and a seed of its own.

Knows arrays of logits and token ids. Knows nothing of text, of the model or of when things are evaluated: everything
here is lazy, and the history of a row lives on the device, so that the next step can be queued before this token is
read.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, fields, replace
from functools import wraps
from numbers import Integral
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from mlx_qwen35 import checks
from mlx_qwen35.errors import ArgumentError, CheckpointError
from mlx_qwen35.largest import top_ids
from mlx_qwen35.masking import masked

if TYPE_CHECKING:
    from mlx_qwen35.thinking import ThinkingBudget

_LEAST = 2.0**-33  # in place of a random number of 0, half of the least above it


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

    def for_answer(self, index: int) -> Sampling:
        """The sampling of one of several answers to a prompt: its seed is `seed` + index (modulo 2^64), so that answer
        0 is the one that a single answer is. Without a seed all are drawn differently anyhow."""
        return self if self.seed is None else replace(self, seed=(self.seed + index) % 2**64)

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
        self.rows = rows = len(prompts)
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
        other.rows = sum(history.rows for history in histories)
        for name in ("seen", "recent", "answered"):
            if getattr(other, name) is not None:
                setattr(other, name, mx.concatenate([getattr(history, name) for history in histories]))
        if other.budget is not None:
            other.budget = other.budget.joined([history.budget for history in histories])
        return other

    def split(self) -> list[History]:
        """Each row by itself, in memory of its own: a row that is kept does not keep the others."""
        found = []
        budgets = None if self.budget is None else self.budget.split()
        for row in range(self.rows):
            one = copy(self)
            one.rows = 1
            for name in ("seen", "recent", "answered"):
                if getattr(one, name) is not None:
                    setattr(one, name, mx.contiguous(getattr(one, name)[row : row + 1]))
            one.budget = None if budgets is None else budgets[row]
            found.append(one)
        return found

    def repeated(self) -> mx.array | None:
        """[B, V] bool, what the repetition penalty touches"""
        if self.recent is None:
            return self.seen
        # one column more than the vocabulary takes the empty places
        empty = mx.zeros((self.recent.shape[0], self.vocab_size + 1), dtype=mx.bool_)
        return mx.put_along_axis(empty, self.recent, mx.array(True), axis=1)[:, : self.vocab_size]


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
            raise ValueError("a repetition or presence penalty needs a History of the rows")
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
        return logits if history is None or history.budget is None else history.budget.only(logits)

    def draw(self, logits: mx.array, key: mx.array) -> mx.array:
        """Adjusted logits [B, V], key as in `drawn` -> token [B]. For temperatures above 0."""
        scaled, ids = self.candidates(logits)
        place = drawn(scaled, key)
        return place if ids is None else mx.take_along_axis(ids, place[:, None], axis=-1)[:, 0]

    def candidates(self, logits: mx.array) -> tuple[mx.array, mx.array | None]:
        """Adjusted logits [B, V] -> log weights [B, K] of what may be drawn, and its ids; None: all, in their order.

        Nothing here needs log probabilities: those of a whole vocabulary are computed where somebody reads them.
        """
        ids = None  # [B, K] what is still a candidate, best first; None: everything, in the order of the vocabulary
        if 0 < self._top_k < logits.shape[-1]:
            ids = top_ids(logits, self._top_k)
            logits = mx.take_along_axis(logits, ids, axis=-1)
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


class Sampler:
    """Draws one token a row. Holds the random key, which moves on with every call.

    tokens: how many the tokenizer has, as in `Steps`. `words` of a call: which tokens may come, as in `masking.masked`.
    """

    def __init__(self, sampling: Sampling, tokens: int | None = None) -> None:
        self.sampling, self.tokens = sampling, tokens
        self.key = mx.random.key(secrets.randbits(64) if sampling.seed is None else sampling.seed)
        self._steps = Steps([sampling], tokens)

    def __call__(
        self, logits: mx.array, history: History | None = None, words: np.ndarray | None = None
    ) -> tuple[mx.array, mx.array]:
        """logits: [B, V] -> token [B], logprobs [B, tokens], both lazy.

        The log probabilities are those of the distribution after mask, bias and penalties and before temperature and
        truncation, as mlx-lm reports them; a token that a budget forces has all of it. The caller appends the token to
        `history`.
        """
        logits = self._steps.adjusted(logits, history, words)
        logprobs = normalised(logits)
        if self._steps.greedy:
            return mx.argmax(logits, axis=-1), logprobs
        return self._steps.draw(logits, self.next_key()), logprobs

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

    def next_key(self) -> mx.array:
        """A random key that was not used before."""
        self.key, key = mx.random.split(self.key)
        return key


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
