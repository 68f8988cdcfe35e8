"""x @ w.T with plain weights, in which a few rows have the bits that each has alone.

Knows which form to run. Knows no layers.
A BLAS adds up the products of a single row in another order than those of several: OpenBLAS on x86 differs from one row
to two, others do not. What verifies drafted tokens has to say of each what decoding says of it alone, so on the CPU a
few rows go one by one. (Quantized weights need nothing: MLX's CPU kernel takes them row by row anyway.) A GPU
joins rows unless exactness is asked for: kernels/one_row.
"""

from __future__ import annotations

import math

import mlx.core as mx

FEW_ROWS = 8  # below it, on the CPU, each row is a product of its own


def matmul(x: mx.array, weight: mx.array) -> mx.array:
    """x [.., in], weight [out, in] -> [.., out]."""
    rows = math.prod(x.shape[:-1])
    if not 1 < rows < FEW_ROWS or mx.default_device().type != mx.cpu:
        return x @ weight.T
    return each_alone(x, weight)


def each_alone(x: mx.array, weight: mx.array) -> mx.array:
    """matmul on the CPU, each row a product of its own."""
    rows = math.prod(x.shape[:-1])
    # A batch of products with one row each; MLX would join the rows if the weight had no batch axis.
    alone = x.reshape(rows, 1, -1) @ mx.broadcast_to(weight.T, (rows, *weight.shape[::-1]))
    return alone.reshape(*x.shape[:-1], -1)
