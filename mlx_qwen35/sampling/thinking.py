"""A budget of reasoning: after so many tokens the reasoning is closed, by tokens that are forced.

Knows token ids and counts, one row of a batch beside the other. Knows nothing of text, of the model or of when things
are evaluated: everything is lazy and lives on the device, as `sampling.History` does, which carries it along.

    inside              spent < tokens    anything
                        spent = tokens    closing[0], closing[1], ... one a step; with the last of them it is outside
    outside                               anything; <think> goes inside (what was spent is not given back)
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass

import mlx.core as mx

# What Qwen puts in to halt the thinking: Qwen3 Technical Report (arXiv 2505.09388), section 4.3, "Thinking Budget".
_SENTENCE = "Considering the limited time by the user, I have to give the solution based on the thinking directly now."
WORDS = f"\n\n{_SENTENCE}\n"
NO_WORDS = "\n"  # nothing was reasoned: what a template writes where thinking is off
AFTER = "\n\n"  # between </think> and the answer


@dataclass(frozen=True)
class Tags:
    """opening, ending: the ids of <think> and </think>. closing: what is forced, `ending` among it."""

    opening: int
    ending: int
    closing: tuple[int, ...]


class ThinkingBudget:
    """Where each of B rows is: `after` a token there is another, and this one stays as it is.

    tokens: of reasoning, at the most. inside: for each row, whether it begins inside the reasoning.
    """

    def __init__(self, tokens: int, tags: Tags, inside: Sequence[bool]) -> None:
        self._tokens, self._tags = tokens, tags
        self._closing = mx.array(tags.closing)  # [C]
        self._inside = mx.array(list(inside))  # [B] bool
        self._spent = mx.zeros(len(inside), mx.int32)  # [B] tokens of reasoning so far
        self._closed = mx.zeros(len(inside), mx.int32)  # [B] tokens of `closing` that have come, while it comes

    def only(self, logits: mx.array) -> mx.array:
        """logits [B, V] -> the same, or for a row whose next token is forced 0 for that token and -inf for all else."""
        forced, token = self._next()
        alone = mx.where(mx.arange(logits.shape[-1]) == token[:, None], 0.0, -mx.inf)
        return mx.where(forced[:, None], alone, logits)

    def after(self, token: mx.array) -> ThinkingBudget:
        """token: [B], perhaps not yet computed"""
        forced, _ = self._next()
        last = self._closed == len(self._tags.closing) - 1
        inside = (self._inside & (token != self._tags.ending)) | (token == self._tags.opening)
        other = copy(self)
        other._closed = mx.where(forced & ~last, self._closed + 1, 0)
        other._inside = mx.where(forced, ~last, inside)
        other._spent = self._spent + (self._inside & inside)  # past `tokens` it says no more
        return other

    @staticmethod
    def joined(budgets: Sequence[ThinkingBudget]) -> ThinkingBudget:
        """One whose rows are those of all."""
        other = copy(budgets[0])
        for name in ("_inside", "_spent", "_closed"):
            setattr(other, name, mx.concatenate([getattr(budget, name) for budget in budgets]))
        return other

    def split(self) -> list[ThinkingBudget]:
        """Each row by itself."""
        found = []
        for row in range(self._inside.shape[0]):
            one = copy(self)
            for name in ("_inside", "_spent", "_closed"):
                setattr(one, name, getattr(self, name)[row : row + 1])
            found.append(one)
        return found

    @property
    def kind(self) -> tuple[int, Tags]:
        """What budgets that are joined have in common."""
        return self._tokens, self._tags

    def _next(self) -> tuple[mx.array, mx.array]:
        """-> forced [B] bool, and the token [B] that it is"""
        forced = self._inside & (self._spent >= self._tokens)
        return forced, self._closing[self._closed]
