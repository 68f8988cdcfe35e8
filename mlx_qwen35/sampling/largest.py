"""The largest scores of each row of a vocabulary, without sorting all of it.

Knows rows of numbers. Knows nothing of what they are: logits, weights or log probabilities. Everything is lazy.
"""

from __future__ import annotations

import mlx.core as mx

BLOCK = 256  # vocabulary entries that share one maximum


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


def top_logprobs(logprobs: mx.array, tokens: mx.array, most: int) -> tuple[mx.array, mx.array, mx.array]:
    """What is told of a token that was drawn. logprobs [B, V] float32, tokens [B], most: how many others.

    -> the log probability of the token [B]; the ids [B, k] of the k = min(most, V) most probable ones and their log
    probabilities [B, k], falling, of equal ones the least id first. -inf comes last: such a token could not have come.
    """
    own = mx.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]
    ids = _best(_falling(logprobs), min(most, logprobs.shape[-1]))
    return own, ids, mx.take_along_axis(logprobs, ids, axis=-1)


def _falling(scores: mx.array) -> mx.array:
    """Whole numbers [B, V] that rise as the scores fall, and are equal where they are."""
    bits = (scores + 0.0).view(mx.uint32)  # -0.0 is 0.0
    return bits ^ mx.where(bits >= 1 << 31, mx.array(0, mx.uint32), mx.array((1 << 31) - 1, mx.uint32))


def _best(falling: mx.array, k: int) -> mx.array:
    """The places [B, k] of the k least of each row, in order, of equal ones the first one first; blocks as above."""
    rows, vocab = falling.shape
    blocks = -(-vocab // BLOCK)
    if 2 * k >= blocks:
        return _first(falling, mx.arange(vocab), k)
    padded = mx.pad(falling, [(0, 0), (0, blocks * BLOCK - vocab)], constant_values=mx.array(2**32 - 1, mx.uint32))
    padded = padded.reshape(rows, blocks, BLOCK)
    best = _first(padded.min(axis=-1), mx.arange(blocks), k)[:, :, None]
    inside = mx.take_along_axis(padded, best, axis=1)
    return _first(inside.reshape(rows, -1), (best * BLOCK + mx.arange(BLOCK)).reshape(rows, -1), k)


def _first(falling: mx.array, ids: mx.array, k: int) -> mx.array:
    """The ids of the k least [B, k]: number and id are sorted as one number, which no other equals."""
    keys = (falling.astype(mx.uint64) << 32) | ids.astype(mx.uint64)
    return mx.sort(keys, axis=-1)[:, :k].astype(mx.uint32)
