"""A rank's rows of the head, for calls of which rank 0 looks at the largest logits alone.

Knows a matrix and a group. Knows nothing of how tokens are drawn.

    hidden, on every rank ──▶ its rows' logits ──▶ the largest of them ──▶ one sum of [B, ranks, 2 * count] ──▶ rank 0

Rank 0 has the whole head beside: where more is looked at (masks, penalties, log probabilities, what drafts), it
computes the logits alone, and nothing is sent.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlx_qwen35.layers.embedding import Embedding, QuantizedEmbedding
from mlx_qwen35.layers.linear import Linear, QuantizedLinear
from mlx_qwen35.parallel.cuts import Span, vocabulary_span
from mlx_qwen35.parallel.group import Group
from mlx_qwen35.sampling.largest import top_ids

_PLAIN = (Linear, QuantizedLinear, Embedding, QuantizedEmbedding)
_EXACT = 1 << 24  # ids below it are whole numbers in float32

Best = tuple[mx.array, mx.array]


def can_be_cut(head: nn.Module, vocabulary: int) -> bool:
    """Whether a head has rows that a rank can compute apart from others (with an adapter it has not)."""
    return type(head) in _PLAIN and vocabulary < _EXACT


class HeadShare:
    """The rows `span` of a head that is here whole, or that has those alone."""

    def __init__(self, head: nn.Module, vocabulary: int, group: Group) -> None:
        self._group = group
        self._first, stop = vocabulary_span(vocabulary, group.size, group.rank)
        self._head = head if head.weight.shape[0] < vocabulary else _rows(head, (self._first, stop))

    def best(self, hidden: mx.array, count: int, tokens: int) -> Best:
        """hidden [B, H] -> the `count` largest logits of the first `tokens` rows of the whole head, float32, -inf where
        there are fewer, and their ids, both [B, count] in no order; to be called by all ranks, the same on each."""
        head = self._head
        logits = head.as_linear(hidden) if hasattr(head, "as_linear") else head(hidden)
        here = min(max(tokens - self._first, 0), logits.shape[-1])
        values, ids = largest(logits[:, :here].astype(mx.float32), min(count, here))
        missing = [(0, 0), (0, count - values.shape[-1])]
        own = mx.concatenate(
            [
                mx.pad(values, missing, constant_values=-mx.inf),
                mx.pad((ids + self._first).astype(mx.float32), missing),
            ],
            axis=-1,
        )
        none = mx.zeros_like(own)
        parts = [own if rank == self._group.rank else none for rank in range(self._group.size)]
        all_of_them = self._group.sum(mx.stack(parts, axis=1))  # [B, ranks, 2 * count]
        values, ids = (part.reshape(len(hidden), -1) for part in mx.split(all_of_them, 2, axis=-1))
        values, place = largest(values, count)
        return values, mx.take_along_axis(ids, place, axis=-1).astype(mx.uint32)


def largest(scores: mx.array, count: int) -> Best:
    """The `count` largest of each row [B, V] and their places, [B, count]; of one alone the first of those as large."""
    if not count:
        return scores[:, :0], mx.zeros((len(scores), 0), mx.uint32)
    ids = mx.argmax(scores, axis=-1, keepdims=True) if count == 1 else top_ids(scores, count)
    return mx.take_along_axis(scores, ids, axis=-1), ids


def _rows(head: nn.Module, span: Span) -> nn.Module:
    """A module with some rows of another's matrix, which are in memory once."""
    made = type(head).__new__(type(head))
    made.__dict__.update(vars(head))
    vocabulary = head.weight.shape[0]
    for name, value in head.items():
        cut = isinstance(value, mx.array) and value.ndim and value.shape[0] == vocabulary and name != "signs"
        dict.__setitem__(made, name, value[span[0] : span[1]] if cut else value)
    return made
