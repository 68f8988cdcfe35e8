"""The gated delta rule for a few tokens on a CPU, one after the other, by matrix products.

Knows the recurrence of reference.py, in fewer operations. Knows no projections, no convolution and no cache.
The value heads that a key head serves stand below each other in one matrix [R, Dk], R their values together: what is
asked of it by a key or a query is then a matrix times a vector, and what a token writes a column times a row. Each is
a product of its own for every sequence and key head, so that no bit hangs on how many there are, nor on how many
tokens come in one call.
"""

from __future__ import annotations

import mlx.core as mx


def gated_delta_products(
    q: mx.array, k: mx.array, v: mx.array, decay: mx.array, beta: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    """Arguments and results as in reference.gated_delta_steps."""
    (batch, length, heads, dim), (key_heads, key_dim) = v.shape, k.shape[2:]
    shape = batch, length, key_heads, heads // key_heads * dim, 1

    def of_each_value(a: mx.array) -> list[mx.array]:
        """[B, T, Hv] or [B, T, Hv, Dv] -> T times [B, 1, Hk, R, 1]."""
        a = a if a.ndim == 4 else mx.broadcast_to(a[..., None], v.shape)
        return _tokens(a.reshape(shape))

    written, scales, decays = of_each_value(v * beta[..., None]), of_each_value(beta), of_each_value(decay)
    queries, keys = (_tokens(a[..., None]) for a in (q, k))  # T times [B, 1, Hk, Dk, 1]
    state = state.reshape(batch, 1, key_heads, -1, key_dim)
    outputs = []
    for query, key, wrote, scale, kept in zip(queries, keys, written, scales, decays, strict=True):
        state = state * kept
        state = mx.addmm(state, wrote - (state @ key) * scale, key.swapaxes(-1, -2))
        outputs.append(state @ query)
    output = outputs[0] if length == 1 else mx.concatenate(outputs, axis=1)
    return output.reshape(v.shape), state.reshape(batch, heads, dim, key_dim)


def _tokens(a: mx.array) -> list[mx.array]:
    """[B, T, ..] -> T times [B, 1, ..]."""
    return [a] if a.shape[1] == 1 else mx.split(a, a.shape[1], axis=1)
