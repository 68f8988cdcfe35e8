"""Cosines and sines of rotary positions: one launch on a GPU.

Knows how the work is laid out. What is computed: reference.py.
"""

from __future__ import annotations

import math

import mlx.core as mx

from ..backend import Kernel, on_gpu
from . import reference

_THREADS = 64  # of a threadgroup

_KERNEL = Kernel("angles", ["positions", "rates", "axes", "factor"], ["cos", "sin"], "angles/body.metal")


def angles(
    positions: mx.array, rates: mx.array, axes: mx.array, factor: float = 1.0, *, plain: bool = False
) -> tuple[mx.array, mx.array]:
    """positions int [B, T], or [3, B, T] for (t, h, w); rates float32 [half]: radians a position; axes int32 [half]:
    which of the three turns a pair of values, where there are three; factor: of all results. plain: by MLX's own.

    Returns cos, sin [B, 1, T, half], float32.
    """
    if plain or not on_gpu():
        return reference.angles(positions, rates, axes, factor)
    batch, length, half = *positions.shape[-2:], rates.shape[0]
    cos, sin = _KERNEL(
        [positions, rates, axes, mx.array([factor], mx.float32)],
        [((batch, 1, length, half), mx.float32)] * 2,
        {"P": positions.dtype, "HALF": half, "SEVERAL": positions.ndim == 3},
        groups=(-(-math.prod((batch, length, half)) // _THREADS), 1, 1),
        threads=(_THREADS, 1, 1),
    )
    return cos, sin
