"""Attention over keys and values in stretches, a block of them at a time: packed ones are never unpacked as a whole.

Knows how the softmax of a row is put together from blocks. Knows neither where stretches come from nor who shares them.

    per row, over the blocks of keys:   m' = max(m, max(s))       s: scores of this block
                                        l  = l e^(m - m') + sum(e^(s - m'))
                                        o  = o e^(m - m') + e^(s - m') v          at last o / l
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from mlx_qwen35.cache.kv import KVFormat, Stretch

from ..kernels.backend import current
from ..kernels.few_rows import MOST_ROWS

MOST_SCORES = 2**24  # of one block
_MOST_ROWS = 512  # queries of one block
_FEW_ROWS = 8  # queries, or rows of a product
_LEAST = -1e30  # the score of a key that is not read; finite, so that no row is without a maximum


def few_alone() -> int:
    """Up to how many queries are each a call of their own, with the bits that a single step has."""
    return MOST_ROWS if mx.default_device().type == mx.cpu and current() is None else _FEW_ROWS


def stretched_attention(
    queries: mx.array,
    stretches: Sequence[Stretch],
    readable: mx.array | None = None,
    *,
    most_scores: int = MOST_SCORES,
) -> mx.array:
    """Attention of the last T of S positions: queries [B, Hq, T, D], S positions in stretches -> [B, Hq, T, D].

    Query t reads keys up to its own; readable [B, S]: which positions are tokens and not padding; None where all are.
    At most about `most_scores` scores exist at once, in a few copies.
    """
    length = queries.shape[2]
    most = _MOST_ROWS if length > few_alone() else 1  # a few each by itself, with the bits of a single step
    tiles = []
    for start in range(0, length, most):
        stop = min(start + most, length)
        asking = queries[:, :, start:stop]
        if tiles and most > 1:  # one after the other: MLX would begin twenty at once, each with its scores
            (asking,) = mx.depends([asking], [tiles[-1]])
        tiles.append(_rows(asking, length - stop, stretches, readable, most_scores))
    return tiles[0] if len(tiles) == 1 else mx.concatenate(tiles, axis=2)


def _rows(
    queries: mx.array, behind: int, stretches: Sequence[Stretch], readable: mx.array | None, most_scores: int
) -> mx.array:
    """Attention of queries [B, Hq, R, D], behind the last of which come `behind` positions."""
    batch, heads, rows, dim = queries.shape
    kv_heads = stretches[0].keys[0].shape[1]
    end = sum(stretch.length for stretch in stretches) - behind  # of the positions that the last row reads
    q = (queries * dim**-0.5).reshape(batch, kv_heads, -1, dim)  # [B, Hkv, G R, D]
    size = max(1, most_scores // (batch * heads * rows))
    most = mx.full((*q.shape[:3], 1), _LEAST, mx.float32)
    total, out = mx.zeros_like(most), mx.zeros(q.shape, mx.float32)
    first = 0  # position of the first key of a stretch
    for stretch in stretches:
        for start in range(0, min(stretch.length, end - first), size):
            stop = min(start + size, stretch.length, end - first)
            keys, values = stretch.block(start, stop)
            if first + start:  # one after the other, and no block unpacked before its turn
                held = mx.depends([*keys, *values], [out, total])
                keys, values = held[: len(keys)], held[len(keys) :]
            scores = _product(q, keys, stretch.form, transpose=True).astype(mx.float32)  # [B, Hkv, G R, K]
            unread = _unread(first + start, first + stop, end - rows, end, readable)
            if unread is not None:
                apart = scores.reshape(batch, heads, rows, -1)
                scores = mx.where(unread, _LEAST, apart).reshape(scores.shape)
            higher = mx.maximum(most, scores.max(axis=-1, keepdims=True))
            shares, fade = mx.exp(scores - higher), mx.exp(most - higher)
            total = total * fade + shares.sum(axis=-1, keepdims=True)
            out = out * fade + _product(shares.astype(q.dtype), values, stretch.form, transpose=False)
            most = higher
        first += stretch.length
    return (out / total).astype(queries.dtype).reshape(queries.shape)


def _unread(start: int, stop: int, first: int, end: int, readable: mx.array | None) -> mx.array | None:
    """Which of the keys start .. stop-1 the queries at positions first .. end-1 do not read: [B or 1, 1, R, K].

    None where all read all. A padding position reads itself, so that it is not without a key (attention.py).
    """
    if readable is None and stop <= first + 1:
        return None
    keys, queries = mx.arange(start, stop), mx.arange(first, end)[:, None]
    if readable is None:
        return (keys > queries)[None, None]
    return ~(((keys <= queries) & readable[:, None, None, start:stop]) | (keys == queries))


def _product(x: mx.array, block: Sequence[mx.array], form: KVFormat | None, *, transpose: bool) -> mx.array:
    """x [B, Hkv, R, .] with a block [B, Hkv, K, D]: x @ block.T where transposed, else x @ block."""
    if form is None:
        (block,) = block
        return x @ (block.swapaxes(-1, -2) if transpose else block)
    how = {"group_size": form.group_size, "bits": form.bits}
    if x.shape[2] < _FEW_ROWS or mx.default_device().type != mx.cpu:
        return mx.quantized_matmul(x, *block, transpose=transpose, **how)
    unpacked = mx.dequantize(*block, **how)
    return x @ (unpacked.swapaxes(-1, -2) if transpose else unpacked)
