"""Rows with samplers of their own, drawn together: as many operations for eight rows as for one.

Knows which rows take the same steps (`steps.Steps.form`), and whose key and history is whose. Each row's token is
the one that its own Sampler would draw, bit for bit, whoever is beside it. Knows nothing of requests, or of when things
are evaluated.

    rows        0 greedy   1 top_k 20, 0.6   2 greedy   3 top_k 20, 1.0
    groups      0, 2: one argmax             1, 3: one draw; temperatures [2, 1], keys [2, 2]
    together    0, 2, 1, 3, put back in order by one lookup
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from .history import History
from .masking import BITS, check
from .sampler import Sampler
from .steps import Steps, normalised

_ALL = np.uint32(0xFFFFFFFF)


class RowsSampler:
    """Draws a token for each row, and appends it to the row's history.

    rows: for each the sampler and the history, which are taken over: until `leave` they are not kept up here.
    Rows of one model: a vocabulary, and a count of tokens.
    """

    def __init__(self, rows: Sequence[tuple[Sampler, History]]) -> None:
        groups: dict[tuple, list[int]] = {}
        for row, (sampler, history) in enumerate(rows):
            kind = None if history.budget is None else history.budget.kind
            groups.setdefault((Steps.form(sampler.sampling), sampler.tokens, kind), []).append(row)
        self._count = len(rows)
        self._groups = [_Group(places, [rows[place] for place in places]) for places in groups.values()]
        order = [place for group in self._groups for place in group.places]
        self._back = None if len(groups) == 1 else mx.array(np.argsort(order))

    def best_wanted(self, vocab_size: int) -> tuple[int, int] | None:
        """As a Sampler's, for all rows."""
        wanted = [group.steps.best_wanted(vocab_size) for group in self._groups]
        if None in wanted or len({tokens for _, tokens in wanted}) > 1:
            return None
        return max(wanted)

    def __call__(
        self,
        logits: mx.array,
        masks: Sequence[np.ndarray | None] | None = None,
        best: tuple[mx.array, mx.array] | None = None,
    ) -> tuple[mx.array, mx.array]:
        """logits: [B, V] -> token [B], logprobs [B, tokens] as a Sampler has them, both lazy. best: as there.

        masks: for each row the words of what may come, as in `masking.masked`; None: anything. Raises ValueError if
        there are not as many as rows; then, and where a mask is refused, no key and no history has moved.
        """
        if logits.shape[0] != self._count or (masks is not None and len(masks) != self._count):
            raise ValueError(
                f"{self._count} rows, logits {list(logits.shape)} and {len(masks or ())} masks: give one of each a row"
            )
        words = [None if masks is None else group.words(masks, logits.shape[1]) for group in self._groups]
        parts = [logits if self._back is None else logits[group.index] for group in self._groups]
        adjusted = [group.adjusted(part, word) for group, part, word in zip(self._groups, parts, words, strict=True)]
        drawn = [group.draw(part, best) for group, part in zip(self._groups, adjusted, strict=True)]
        if self._back is None:
            return drawn[0]
        tokens, logprobs = (mx.concatenate(found)[self._back] for found in zip(*drawn, strict=True))
        return tokens, logprobs

    def leave(self) -> list[History]:
        """Each row's history by itself, in order; the samplers have their keys again."""
        found: list[History] = [None] * self._count  # type: ignore[list-item]
        for group in self._groups:
            for place, history in zip(group.places, group.leave(), strict=True):
                found[place] = history
        return found


class _Group:
    """Rows that take the same steps. places: which rows they are."""

    def __init__(self, places: list[int], rows: Sequence[tuple[Sampler, History]]) -> None:
        self.places, self.index = places, mx.array(places)
        self._samplers = [sampler for sampler, _ in rows]
        self._history = rows[0][1] if len(rows) == 1 else History.joined([history for _, history in rows])
        self.steps = Steps([sampler.sampling for sampler in self._samplers], self._samplers[0].tokens)
        self._keys = mx.stack([sampler.key for sampler in self._samplers])  # [B, 2]

    def words(self, masks: Sequence[np.ndarray | None], vocab_size: int) -> np.ndarray | None:
        """Of all rows' masks those of these rows, as one [B, W]; None where no row has one."""
        mine, size = [masks[place] for place in self.places], self.steps.width(vocab_size)
        if all(mask is None for mask in mine):
            return None
        words = np.full((len(mine), -(-size // BITS)), _ALL)
        for row, mask in enumerate(mine):
            if mask is not None:
                check(mask[None], 1, size)
                words[row] = mask[: words.shape[1]]
        return words

    def adjusted(self, logits: mx.array, words: np.ndarray | None) -> mx.array:
        return self.steps.adjusted(logits, self._history, words)

    def draw(self, logits: mx.array, best: tuple[mx.array, mx.array] | None) -> tuple[mx.array, mx.array]:
        """Adjusted logits [B, V], the best of all rows -> token [B], logprobs [B, V]"""
        scores, ids = (logits, None) if best is None else (part[self.index] for part in best)
        if self.steps.greedy:
            token = self.steps.largest(scores, ids)
        else:
            both = mx.vmap(mx.random.split)(self._keys)  # [B, 2, 2]: the key that stays, the key to draw with
            self._keys = both[:, 0]
            token = self.steps.draw(scores, both[:, 1], ids)
        self._history = self._history.then(token)
        return token, normalised(logits)

    def leave(self) -> list[History]:
        for row, sampler in enumerate(self._samplers):
            sampler.key = self._keys[row]
        return self._history.split()
