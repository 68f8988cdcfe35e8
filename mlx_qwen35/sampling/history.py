"""The tokens that rows have seen, as masks and counts on the device.

Knows token ids that may not be computed yet: everything is lazy, so that the next step can be queued before this token
is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from .asked import Sampling

if TYPE_CHECKING:
    from .thinking import ThinkingBudget

_KEPT = ("seen", "recent", "answered", "counts")  # of a History, an array with a row for each of its rows


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
