"""What a chat has computed: the tokens in its cache, and how far a new prompt can go on from them.

Knows token ids, the cache and its snapshots. Knows nothing of messages or text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlx_qwen35.cache import Snapshot
    from mlx_qwen35.model import Model


class Timeline:
    """One cache and the tokens it covers, with one mark to go back to.

    A template writes an answer differently once it lies in the past (its reasoning is dropped), so the next prompt
    rarely goes on from the last token. It does go on from where the last answer's turn began: that is the mark.

        covered   user1 | <think> why </think> four          mark after user1
        prompt    user1 | four user2 | <think>               goes on from the mark, not from the end
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self.cache = model.make_cache()
        self.tokens: list[int] = []
        self._mark: tuple[int, Snapshot] | None = None

    def go_on(self, prompt: Sequence[int]) -> int:
        """Makes the cache cover as much of the beginning of `prompt` as it can, and returns how many tokens that is.

        At least one token of the prompt is left to compute.
        """
        shared = _common(self.tokens, prompt)
        if shared == len(self.tokens) < len(prompt):
            return shared
        if self._mark and self._mark[0] <= shared and self._mark[0] < len(prompt):
            length, snapshot = self._mark
            self.cache.restore(snapshot)
        else:
            length, self._mark = 0, None
            self.cache = self._model.make_cache()
        self.tokens = self.tokens[:length]
        return length

    def mark(self) -> None:
        """Remembers the present place of the cache."""
        self._mark = (self.cache.offset, self.cache.snapshot())

    def settle(self, tokens: Sequence[int]) -> None:
        """After an answer: `tokens`, prompt and answer, of which the cache covers the first `cache.offset`."""
        self.tokens = list(tokens[: self.cache.offset])


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens at the beginning are the same."""
    for at, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return at
    return min(len(left), len(right))
