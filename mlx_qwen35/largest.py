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
