"""A residual connection, its norm and the product that meets it, in plain MLX: what the kernel has to equal."""

from __future__ import annotations

import mlx.core as mx

from ..activation import swiglu
from ..add_norm.reference import add_norm
from ..weights import Weights


def norm_matmul(
    x: mx.array, added: mx.array | None, weight: mx.array, gate: Weights, up: Weights | None = None, *, eps: float
) -> tuple[mx.array, mx.array, mx.array]:
    """x, added (None: nothing) [N, H], weight [H], gate and up [O, H] -> (x + added, its RMS norm times weight, that
    through gate, or silu(gate norm) * (up norm) [N, O])."""
    total, normed = add_norm(x, mx.zeros_like(x) if added is None else added, weight, eps=eps)
    products = [normed.astype(mx.float32) @ matrix.values().T for matrix in (gate, up) if matrix is not None]
    return total, normed, products[0] if up is None else swiglu(*products)
