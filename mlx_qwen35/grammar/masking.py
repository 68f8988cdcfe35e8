"""Logits under a mask of bits. Knows arrays only."""

from __future__ import annotations

import mlx.core as mx


def masked(logits: mx.array, words: mx.array) -> mx.array:
    """logits [B, V], words uint32 [B, ceil(V / 32)] -> the logits, -inf where the bit is 0: token 32 w + i is bit i of
    word w. Lazy; [1, ...] words serve all rows."""
    size = logits.shape[-1]
    bits = (words[..., None] >> mx.arange(32, dtype=mx.uint32)) & 1  # [B, W, 32]
    allowed = bits.reshape(*words.shape[:-1], -1)[..., :size].astype(mx.bool_)
    return mx.where(allowed, logits, mx.array(-mx.inf, logits.dtype))
