"""What attention makes of its projections before it attends, in plain MLX: what the kernel has to equal.

Knows the norms of queries and keys, and how the first values of a head turn. Knows neither positions nor a cache.
"""

from __future__ import annotations

import mlx.core as mx

from ..activation import fused
from ..rms_norm import rms_norm


def attention_inputs(
    queries: mx.array,
    keys: mx.array,
    q_norm: mx.array,
    k_norm: mx.array,
    cos: mx.array,
    sin: mx.array,
    *,
    heads: int,
    kv_heads: int,
    eps: float,
) -> tuple[mx.array, mx.array, mx.array]:
    """queries [B, T, Hq 2 D]: of each head D values, then D of its gate; keys [B, T, Hkv D]; q_norm, k_norm [D]; cos,
    sin [B or 1, 1, T, half] float32. Returns (queries [B, Hq, T, D], keys [B, Hkv, T, D], gates [B, T, Hq D]).
    """
    batch, length, _ = queries.shape
    dim = q_norm.shape[0]
    q, gate = mx.split(queries.reshape(batch, length, heads, 2 * dim), 2, axis=-1)
    k = keys.reshape(batch, length, kv_heads, dim)
    q, k = (
        rotate(rms_norm(x, weight, eps).astype(x.dtype).swapaxes(1, 2), cos, sin)
        for x, weight in ((q, q_norm), (k, k_norm))
    )
    return q, k, gate.reshape(batch, length, -1)


def rotate(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """Turn the first 2 * half of x [B, H, T, D] by cos, sin [B, 1, T, half]; the rest passes through.

    x   = [ a | b | rest ]      each of a, b: half wide
    out = [ a cos - b sin | b cos + a sin | rest ]
    """
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return mx.concatenate([*_turned(a, b, cos, sin), rest], axis=-1)


@fused
def _turned(a: mx.array, b: mx.array, cos: mx.array, sin: mx.array) -> tuple[mx.array, mx.array]:
    """a, b [B, H, T, half] in any dtype, cos, sin [B, 1, T, half] float32 -> both turned, in the dtype of a."""
    return (a * cos - b * sin).astype(a.dtype), (b * cos + a * sin).astype(a.dtype)
