"""The gated delta rule in plain MLX: step by step, and the chunked twin.

Knows the recurrence. Knows no projections, no convolution and no cache.
Per head, with the state S [Dv, Dk] in float32 and S = 0 before the first token:

    S = decay_t * S;   S = S + beta_t * (v_t - S k_t) k_t^T;   o_t = S q_t
"""

from __future__ import annotations

import mlx.core as mx

Result = tuple[mx.array, mx.array]


def gated_delta_steps(
    q: mx.array, k: mx.array, v: mx.array, decay: mx.array, beta: mx.array, state: mx.array
) -> Result:
    """One token after the other: the definition.

    q, k: [B, T, Hk, Dk]; v: [B, T, Hv, Dv]; decay in (0, 1], beta: [B, T, Hv]; state: [B, Hv, Dv, Dk] float32.
    Value head h reads key head h // (Hv // Hk). Returns (o [B, T, Hv, Dv], state after the last token), float32.
    """
    q, k = _per_value_head(q, v), _per_value_head(k, v)  # [B, T, Hv, Dk]
    outputs = []
    for t in range(q.shape[1]):
        query, key = q[:, t, :, None, :], k[:, t, :, None, :]  # [B, Hv, 1, Dk]
        state = state * decay[:, t, :, None, None]
        error = (v[:, t] - (state * key).sum(-1)) * beta[:, t, :, None]  # [B, Hv, Dv]
        state = state + error[..., None] * key
        outputs.append((state * query).sum(-1))
    return mx.stack(outputs, axis=1), state


def gated_delta_chunks(
    q: mx.array, k: mx.array, v: mx.array, decay: mx.array, beta: mx.array, state: mx.array, *, chunk: int = 64
) -> Result:
    """The same in chunks: matrix products inside a chunk, one state update per chunk. Arguments as above.

    Inside a chunk let G_t be the product of its decays up to t. The errors u_t = beta_t (v_t - S k_t) obey a lower
    triangular system, u_t + beta_t sum_{s<t} (G_t/G_s) (k_t . k_s) u_s = beta_t (v_t - G_t S_0 k_t); then
    o_t = G_t S_0 q_t + sum_{s<=t} (G_t/G_s) (q_t . k_s) u_s.
    """
    length = q.shape[1]
    outputs = []
    for start in range(0, length, chunk):
        part = slice(start, min(start + chunk, length))
        output, state = _one_chunk(q[:, part], k[:, part], v[:, part], decay[:, part], beta[:, part], state)
        outputs.append(output)
    return mx.concatenate(outputs, axis=1), state


def _one_chunk(q: mx.array, k: mx.array, v: mx.array, decay: mx.array, beta: mx.array, state: mx.array) -> Result:
    q, k = (_per_value_head(a, v).swapaxes(1, 2) for a in (q, k))  # [B, Hv, C, Dk]
    v, beta = v.swapaxes(1, 2), beta.swapaxes(1, 2)[..., None]  # [B, Hv, C, Dv], [B, Hv, C, 1]
    size = q.shape[2]
    # A decay may underflow to 0: the floor keeps its logarithm finite, and exp() of the sums is 0 again.
    logs = mx.cumsum(mx.log(mx.maximum(decay, 1e-37)).swapaxes(1, 2), axis=-1)  # [B, Hv, C]: log G_t
    lower = mx.tril(mx.ones((size, size), mx.bool_))
    # G_t / G_s for s <= t, 0 elsewhere; masked before exp, which would overflow above the diagonal.
    ratio = mx.exp(mx.where(lower, logs[..., :, None] - logs[..., None, :], -mx.inf))  # [B, Hv, C, C]
    reach = mx.exp(logs)[..., None]  # [B, Hv, C, 1]: G_t

    k_t, state_t = k.swapaxes(-1, -2), state.swapaxes(-1, -2)  # [B, Hv, Dk, C], [B, Hv, Dk, Dv]
    couple = beta * ratio * (k @ k_t)
    couple = couple * mx.tril(mx.ones((size, size)), -1)
    errors = _solve_unit_lower(couple, beta * (v - reach * (k @ state_t)))  # [B, Hv, C, Dv]

    output = reach * (q @ state_t) + (ratio * (q @ k_t)) @ errors
    last = mx.exp(logs[..., -1:] - logs)[..., None]  # [B, Hv, C, 1]: G_C / G_t
    state = state * reach[..., -1:, :] + (last * errors).swapaxes(-1, -2) @ k
    return output.swapaxes(1, 2), state


def _solve_unit_lower(lower: mx.array, right: mx.array) -> mx.array:
    """x of (I + lower) x = right, for strictly lower triangular [.., C, C] and right [.., C, D].

    (I + L)^-1 = (I - L)(I + L^2)(I + L^4)..., and L^C = 0: log2(C) products instead of C steps.
    """
    power, size = -lower, lower.shape[-1]
    x = right + power @ right
    reached = 2
    while reached < size:
        power = power @ power
        x = x + power @ x
        reached *= 2
    return x


def _per_value_head(x: mx.array, v: mx.array) -> mx.array:
    """[B, T, Hk, Dk] -> [B, T, Hv, Dk]: each key head serves Hv // Hk consecutive value heads."""
    return mx.repeat(x, v.shape[2] // x.shape[2], axis=2)
