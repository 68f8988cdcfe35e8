"""Logits under a mask of bits. Knows arrays only."""

from __future__ import annotations

import mlx.core as mx

_BITS = [1 << bit for bit in range(32)]


def masked(logits: mx.array, words: mx.array) -> mx.array:
    """logits [B, V], words uint32 [B, ceil(V / 32)] -> the logits, -inf where the bit is 0: token 32 w + i is bit i of
    word w. Lazy, three launches; [1, ...] words serve all rows."""
    bits = words[..., None] & mx.array(_BITS, mx.uint32)  # [B, W, 32]
    allowed = bits.astype(mx.bool_).reshape(*words.shape[:-1], -1)[..., : logits.shape[-1]]
    return mx.where(allowed, logits, mx.array(-mx.inf, logits.dtype))
