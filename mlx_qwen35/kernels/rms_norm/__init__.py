"""The RMS norm of rows: MLX's own, and for a few rows on a CPU the operations that MLX's own is there, in two thirds of
their number.

Knows rows. A CPU has no fused norm: MLX unfolds it into twelve operations, of which four only give numbers and weights
the shape of the rows. Here those are remembered in it. Same operations in the same order, so the same bits.
"""

from __future__ import annotations

from functools import lru_cache

import mlx.core as mx

from ..few_rows import MOST_ROWS
from ..once import once


def rms_norm(x: mx.array, weight: mx.array | None, eps: float) -> mx.array:
    """x [B, T, .., H], weight [H] (None: 1) -> x / sqrt(mean(x^2) + eps) * weight, of the same shape."""
    few = x.ndim > 2 and x.shape[0] * x.shape[1] <= MOST_ROWS and x.dtype == mx.float32
    if not few or mx.default_device().type != mx.cpu or (weight is not None and weight.dtype != mx.float32):
        return mx.fast.rms_norm(x, weight, eps)
    shape = x.shape
    part, least = _numbers(shape[:-1], shape[-1], eps)
    y = x * mx.rsqrt(mx.square(x).sum(axis=-1, keepdims=True) * part + least)
    return y if weight is None else once(weight, shape, lambda w: mx.broadcast_to(w, shape)) * y


@lru_cache(maxsize=512)
def _numbers(rows: tuple[int, ...], width: int, eps: float) -> tuple[mx.array, mx.array]:
    """1 / width and eps, [.., 1]."""
    made = tuple(mx.full((*rows, 1), number, mx.float32) for number in (1 / width, eps))
    mx.eval(made)
    return made
