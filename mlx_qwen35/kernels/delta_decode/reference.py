"""A delta net between its projections, for a few tokens, in plain MLX: what the kernel has to equal.

Knows convolution, unit length, decay, write strength, recurrence and gated norm. Knows no projections and no cache.
"""

from __future__ import annotations

import mlx.core as mx

from ..gated_delta import gated_delta_states


def delta_decode(
    mixed: mx.array,
    gates: mx.array,
    window: mx.array,
    taps: mx.array,
    A_log: mx.array,
    dt_bias: mx.array,
    norm: mx.array,
    state: mx.array,
    *,
    key_heads: int,
    eps: float,
) -> tuple[mx.array, mx.array, mx.array]:
    """mixed [B, T, C + Hv Dv]: q, k, v before the convolution, then z; gates [B, T, 2 Hv]: b, then a; window
    [B, K-1, C]; taps [C, K]; A_log, dt_bias [Hv]; norm [Dv]; state [B, Hv, Dv, Dk] float32; C = 2 Hk Dk + Hv Dv.

    Returns (y [B, T, Hv Dv], windows [B, T, K-1, C], states [B, T, Hv, Dv, Dk]): what goes into out_proj, and what to
    go on from after each token.
    """
    batch, length, _ = mixed.shape
    _, heads, value_dim, key_dim = state.shape
    keys, channels, count = key_heads * key_dim, taps.shape[0], taps.shape[1]
    stream = mx.concatenate([window, mixed[..., :channels]], axis=1)  # [B, K-1+T, C]
    windows = mx.stack([stream[:, t + 1 : t + count] for t in range(length)], axis=1)
    u = sum(stream[:, k : k + length] * taps[:, k] for k in range(count)).astype(mx.float32)
    q, k, v = mx.split(u * mx.sigmoid(u), [keys, 2 * keys], axis=-1)
    q, k = (a.reshape(batch, length, key_heads, key_dim) for a in (q, k))
    q, k = (a * mx.rsqrt((a * a).sum(-1, keepdims=True) + 1e-6) for a in (q, k))
    b, a = mx.split(gates.astype(mx.float32), 2, axis=-1)
    decay = mx.exp(-mx.exp(A_log.astype(mx.float32)) * mx.logaddexp(a + dt_bias, 0))
    v = v.reshape(batch, length, heads, value_dim)
    out, states = gated_delta_states(q * key_dim**-0.5, k, v, decay, mx.sigmoid(b), state, plain=True)
    z = mixed[..., channels:].astype(mx.float32).reshape(out.shape)
    y = mx.fast.rms_norm(out, norm.astype(mx.float32), eps) * z * mx.sigmoid(z)
    return y.reshape(batch, length, -1).astype(mixed.dtype), windows, states
