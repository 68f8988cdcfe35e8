"""What a chat has computed: the prompt in its cache, and how far a new one can go on from it.

Knows token ids, what stands behind placeholders, the cache and its snapshots. Knows nothing of messages or text.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from mlx_qwen35.cache import Snapshot
    from mlx_qwen35.model import Model
    from mlx_qwen35.processor import Prompt
    from mlx_qwen35.vision.media import Media


class Timeline:
    """One cache and the tokens it covers, with one mark to go back to.

    A template writes an answer differently once it lies in the past (its reasoning is dropped), so the next prompt
    rarely goes on from the last token. It does go on from where the last answer's turn began: that is the mark.

        covered   user1 | <think> why </think> four          mark after user1
        prompt    user1 | four user2 | <think>               goes on from the mark, not from the end

    Two pictures of one size have the same tokens: what counts is the picture. One that the cache has the first half of
    is gone on with like anything else.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self.cache = model.make_cache()
        self.tokens: list[int] = []
        self._shown: list[tuple[int, Media]] = []  # where each image and video begins that is among them
        self._mark: tuple[int, Snapshot] | None = None

    def go_on(self, prompt: Prompt) -> int:
        """Makes the cache cover as much of the beginning of `prompt` as it can, and returns how many tokens that is.

        At least one token of the prompt is left to compute.
        """
        places = self._places(prompt)
        shared = min(_common(self.tokens, prompt.tokens), _first_other(self._shown, places))
        if shared == len(self.tokens) == self.cache.offset < len(prompt.tokens):
            length = shared
        elif self._mark and self._mark[0] <= shared and self._mark[0] < len(prompt.tokens):
            length, snapshot = self._mark
            self.tokens = []  # a cache that is halfway back, if this is interrupted, stands for nothing
            self.cache.restore(snapshot)
        else:
            length, self._mark = 0, None
            self.cache = self._model.make_cache()
        # Now the tokens are the beginning of this prompt, and stay it whatever interrupts what follows.
        self.tokens = prompt.tokens[:length]
        self._shown = places
        return length

    def mark(self) -> None:
        """Remembers the present place of the cache."""
        self._mark = (self.cache.offset, self.cache.snapshot())

    def settle(self, tokens: Sequence[int]) -> None:
        """After an answer: `tokens`, prompt and answer, of which the cache covers the first `cache.offset`."""
        self.tokens = list(tokens[: self.cache.offset])

    def _places(self, prompt: Prompt) -> list[tuple[int, Media]]:
        """Where the placeholders of each image and video begin, in the order of the tokens."""
        if not prompt.media:
            return []
        taken = self._model.placement([prompt.tokens], [prompt.media]).features[0]
        starts, first = [], 0
        for medium in prompt.media:
            starts.append((int(np.flatnonzero(taken == first)[0]), medium))
            first += medium.tokens
        return sorted(starts, key=lambda place: place[0])


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens at the beginning are the same."""
    for at, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return at
    return min(len(left), len(right))


def _first_other(left: Sequence[tuple[int, Media]], right: Sequence[tuple[int, Media]]) -> float:
    """Where the first image or video begins that the other does not have; infinity: nowhere."""
    for a, b in zip_longest(left, right):
        # The key is a hash of all pixels; a chat keeps its media, and then the object is the same.
        if a is None or b is None or not (a[1] is b[1] or a[1].key == b[1].key):
            return min(place[0] for place in (a, b) if place is not None)
    return float("inf")
