"""A rotation of what goes into a packed product, where a checkpoint's weights were trained behind one.

Knows signs and the Walsh-Hadamard transform. Knows no weights.

    rotated(x)   = H (x * signs)     before a product whose weights are W H^T: their product is that of W
    unrotated(x) = (H x) * signs     of rows of such weights: the rows of W

H is orthonormal and symmetric, in blocks of columns. Both are computed in float32, as the weights were trained.
"""

from __future__ import annotations

import math

import mlx.core as mx

from mlx_qwen35.kernels.activation import fused


def rotated(x: mx.array, signs: mx.array, block: int) -> mx.array:
    """x [.., in], signs [in] of -1 and 1 -> [.., in], in x's dtype."""
    return _transformed(_signed(x, signs), block).astype(x.dtype)


def unrotated(x: mx.array, signs: mx.array, block: int) -> mx.array:
    """What rotated() undoes: x [.., in] -> [.., in], in x's dtype."""
    return (_transformed(x.astype(mx.float32), block) * signs).astype(x.dtype)


@fused
def _signed(x: mx.array, signs: mx.array) -> mx.array:
    return x.astype(mx.float32) * signs


def _transformed(x: mx.array, block: int) -> mx.array:
    return mx.hadamard_transform(x.reshape(-1, block), scale=1 / math.sqrt(block)).reshape(x.shape)
