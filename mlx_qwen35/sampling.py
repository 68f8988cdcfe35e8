"""How tokens are drawn: what was asked for, the tokens that a row has seen, and a sampler with a seed of its own.

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
from typing import TYPE_CHECKING, Any, TypeVar

import mlx.core as mx
import numpy as np

from mlx_qwen35 import checks
from mlx_qwen35.errors import ArgumentError, CheckpointError
from mlx_qwen35.steps import Steps, drawn, normalised

if TYPE_CHECKING:
    from mlx_qwen35.thinking import ThinkingBudget

_Class = TypeVar("_Class")


def _named_only(cls: type[_Class]) -> type[_Class]:
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


_NUMBERS = ("repetition_penalty", "presence_penalty", "frequency_penalty", "temperature", "top_p", "min_p")
_KEPT = ("seen", "recent", "answered", "counts")  # of a History, an array with a row for each of its rows


@_named_only
@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is drawn: the steps run in the order of the fields.

    logit_bias: token id -> amount added to its logit (-inf forbids it).
    repetition_penalty: logits of tokens seen in prompt or answer are divided (positive) or multiplied (negative) by it.
    repetition_context_size: only the last so many tokens count for the repetition penalty; None: all of them.
    presence_penalty: subtracted once from the logit of every token of the answer so far (not of the prompt).
    frequency_penalty: the same, as many times as the token is in the answer.
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
    frequency_penalty: float = 0.0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name in _NUMBERS:
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
        names = (*_NUMBERS, "top_k")
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
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


class History:
    """Which tokens each row has seen, as masks and counts on the device: `append` takes a token that is not computed.

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
        self.counts: mx.array | None = None  # [B, V] int32: how often it is in the answer
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
        if sampling.frequency_penalty != 0.0:
            self.counts = mx.zeros((rows, vocab_size), dtype=mx.int32)

    def append(self, token: mx.array) -> None:
        """token: [B]"""
        index = token[:, None]
        if self.seen is not None:
            self.seen = mx.put_along_axis(self.seen, index, mx.array(True), axis=1)
        if self.recent is not None:
            self.recent = mx.concatenate([self.recent[:, 1:], index.astype(self.recent.dtype)], axis=1)
        if self.answered is not None:
            self.answered = mx.put_along_axis(self.answered, index, mx.array(True), axis=1)
        if self.counts is not None:
            once_more = mx.take_along_axis(self.counts, index, axis=1) + 1
            self.counts = mx.put_along_axis(self.counts, index, once_more, axis=1)
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
        for name in _KEPT:
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
            for name in _KEPT:
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
    ) -> tuple[mx.array, mx.array]:
        """logits: [B, V] -> token [B], logprobs [B, tokens], both lazy. keys: of each row, in place of the next one.

        The log probabilities are those of the distribution after mask, bias and penalties and before temperature and
        truncation, as mlx-lm reports them; a token that a budget forces has all of it. The caller appends the token to
        `history`.
        """
        logits = self._steps.adjusted(logits, history, words)
        logprobs = normalised(logits)
        if self._steps.greedy:
            return mx.argmax(logits, axis=-1), logprobs
        return self._steps.draw(logits, self.next_key() if keys is None else keys), logprobs

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
