"""A residual connection and the norm behind it: one launch on a GPU.

Knows how the work is laid out. What is computed: reference.py, the order of sums: body.metal.
"""

from __future__ import annotations

import math

import mlx.core as mx

from ..backend import Kernel, on_gpu
from . import reference

_MOST_SIMDS = 16  # SIMD groups a row

_KERNEL = Kernel("add_norm", ["x", "added", "weight", "eps"], ["total", "normed"], "add_norm/body.metal")


def add_norm(
    x: mx.array, added: mx.array, weight: mx.array, *, eps: float, differentiable: bool = False
) -> tuple[mx.array, mx.array]:
    """x, added [.., H], weight [H] -> (x + added, its RMS norm times weight), both in the dtype of x.

    differentiable: gradients will be asked for, which kernels do not give.
    """
    if differentiable or not on_gpu():
        return reference.add_norm(x, added, weight, eps=eps)
    width = x.shape[-1]
    simds = max(1, min(_MOST_SIMDS, -(-width // 128)))
    constants = {"T": x.dtype, "WEIGHT": weight.dtype, "H": width, "SIMDS": simds, "PER": -(-width // (32 * simds))}
    total, normed = _KERNEL(
        [x, added, weight, mx.array([eps], mx.float32)],
        [(x.shape, x.dtype), (x.shape, x.dtype)],
        constants,
        groups=(math.prod(x.shape[:-1]), 1, 1),
        threads=(32 * simds, 1, 1),
    )
    return total, normed
