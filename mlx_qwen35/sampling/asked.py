"""What is asked of how tokens are drawn: numbers by their names, checked.

Knows nothing of arrays, text or the model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import wraps
from numbers import Integral
from typing import Any, TypeVar

from mlx_qwen35 import checks
from mlx_qwen35.errors import ArgumentError, CheckpointError

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
