"""A residual connection and the norm behind it, in plain MLX: what the kernel has to equal. Knows rows."""

from __future__ import annotations

import mlx.core as mx

from ..rms_norm import rms_norm


def add_norm(x: mx.array, added: mx.array, weight: mx.array, *, eps: float) -> tuple[mx.array, mx.array]:
    """x, added [.., H], weight [H] -> (x + added, its RMS norm times weight), both in the dtype of x."""
    total = x + added
    # A float32 scale beside bfloat16 activations promotes the result: bring it back.
    return total, rms_norm(total, weight, eps).astype(x.dtype)
