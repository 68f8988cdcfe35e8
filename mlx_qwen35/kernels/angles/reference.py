"""Cosines and sines of rotary positions in plain MLX: what the kernel has to equal. Knows no attention."""

from __future__ import annotations

import mlx.core as mx


def angles(positions: mx.array, rates: mx.array, axes: mx.array, factor: float = 1.0) -> tuple[mx.array, mx.array]:
    """positions [B, T] or [3, B, T], rates and axes [half] -> cos, sin [B, 1, T, half] in float32, times factor."""
    turned = positions.astype(mx.float32)[..., None, :, None] * rates  # [.., B, 1, T, half]
    if turned.ndim == 5:
        time, height, width = turned
        turned = mx.where(axes == 1, height, mx.where(axes == 2, width, time))
    cos, sin = mx.cos(turned), mx.sin(turned)
    return (cos, sin) if factor == 1 else (cos * factor, sin * factor)
