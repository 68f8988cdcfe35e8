"""Attention of rows with one token each over pieces of arrays, in plain MLX, float32: what the kernels equal."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from .pieces import Arrays, Pieces


def ragged_attention(queries: mx.array, arrays: Sequence[Arrays], pieces: Sequence[Pieces]) -> mx.array:
    """queries [B, Hq, D], arrays of keys and values [N, Hkv, capacity, D], of each row its pieces -> [B, Hq, D]."""
    made = []
    for asking, own in zip(queries.astype(mx.float32), pieces, strict=True):
        parts = [[of[p.row, :, p.first : p.first + p.count] for of in arrays[p.arrays]] for p in own]
        keys, values = (mx.concatenate(of, axis=1).astype(mx.float32) for of in zip(*parts, strict=True))
        grouped = asking.reshape(keys.shape[0], -1, keys.shape[-1])  # [Hkv, Hq / Hkv, D]
        scores = grouped @ keys.swapaxes(-1, -2) * keys.shape[-1] ** -0.5
        made.append((mx.softmax(scores, axis=-1) @ values).reshape(asking.shape))
    return mx.stack(made)


def together(made: mx.array, ends: mx.array, firsts: Sequence[int]) -> mx.array:
    """What the first kernel has of spans, made [items, Hq, D] and ends [items, Hq, 2], put together: [B, Hq, D]."""
    rows = []
    for start, stop in zip(firsts, firsts[1:], strict=False):
        peaks, totals = ends[start:stop, :, :1], ends[start:stop, :, 1:]
        shares = mx.power(2.0, peaks - peaks.max(axis=0))
        rows.append((made[start:stop] * shares).sum(axis=0) / (totals * shares).sum(axis=0))
    return mx.stack(rows)
