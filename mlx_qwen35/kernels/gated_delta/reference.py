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
    q: mx.array, k: mx.array, v: mx.array, decay: mx.array, beta: mx.array, state: mx.array, *, chunk: int = 16
) -> Result:
    """The same in chunks of C tokens: what is inside a chunk at once for all N chunks, the state from one to the next.

    Arguments as above. Inside a chunk let G_t be the product of its decays up to t, and u_t = beta_t (v_t - S k_t) what
    token t writes. The u_t solve a lower triangular system, and linearly in the state S that enters the chunk:

        (I + L) u = beta v - beta G S k,     L[t, s] = beta_t (G_t / G_s) (k_t . k_s)  for s < t
        o_t = G_t S q_t + sum over s <= t of (G_t / G_s) (q_t . k_s) u_s
    """
    length = q.shape[1]
    q, k = (_chunked(_per_value_head(a, v), chunk, 0) for a in (q, k))  # [B, Hv, N, C, Dk]
    v, beta = _chunked(v, chunk, 0), _chunked(beta[..., None], chunk, 0)  # [B, Hv, N, C, Dv], [B, Hv, N, C, 1]
    # A decay may underflow to 0: the floor keeps its logarithm finite, and the exp() of it is as good as 0.
    logs = mx.log(mx.maximum(_chunked(decay[..., None], chunk, 1), 1e-37))  # [B, Hv, N, C, 1]
    lower = mx.tril(mx.ones((chunk, chunk), mx.bool_))
    # G_t / G_s: a sum of the logs from s + 1 to t, not a difference of two long ones, which would lose digits.
    #     logs below the diagonal    . . .        sums down the columns    0    . .     s = 0, 1, 2 across
    #                                b . .                                 b    0 .     t = 0, 1, 2 down
    #                                c c .                                 b+c  c 0
    between = mx.cumsum(mx.tril(mx.broadcast_to(logs, (*logs.shape[:-1], chunk)), -1), axis=-2)
    ratio = mx.where(lower, mx.exp(between), 0)  # [B, Hv, N, C, C]
    reach, left = mx.exp(mx.cumsum(logs, axis=-2)), ratio[..., -1, :, None]  # [B, Hv, N, C, 1]: G_t, G_C / G_t

    k_t = k.swapaxes(-1, -2)
    solve = _inverse_unit_lower(beta * ratio * (k @ k_t))  # (I + L)^-1; the diagonal is not read
    written, erased = solve @ (beta * v), solve @ (beta * reach * k)  # u = written - erased S^T
    within, q, keep = ratio * (q @ k_t), reach * q, left * k

    outputs = []
    for n in range(v.shape[2]):
        state_t = state.swapaxes(-1, -2)  # [B, Hv, Dk, Dv]
        u = written[:, :, n] - erased[:, :, n] @ state_t  # [B, Hv, C, Dv]
        outputs.append(q[:, :, n] @ state_t + within[:, :, n] @ u)
        state = state * reach[:, :, n, -1:] + u.swapaxes(-1, -2) @ keep[:, :, n]
    return mx.concatenate(outputs, axis=2)[:, :, :length].swapaxes(1, 2), state


def _chunked(x: mx.array, chunk: int, fill: float) -> mx.array:
    """[B, T, Hv, D] -> [B, Hv, N, C, D], filled up with tokens that change nothing (k = v = beta = 0, decay = 1)."""
    x = mx.pad(x, [(0, 0), (0, -x.shape[1] % chunk), (0, 0), (0, 0)], constant_values=fill)
    return x.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], -1, chunk, x.shape[3])


def _inverse_unit_lower(x: mx.array) -> mx.array:
    """(I + L)^-1 for L the part of x [.., C, C] below the diagonal, row by row.

    Substitution and not the faster product (I - L)(I + L^2)(I + L^4)...: its terms cancel and lose every digit when the
    keys of a chunk are alike, as in a run of one token.
    """
    unit = mx.eye(x.shape[-1])
    rows = [mx.broadcast_to(unit[:1], (*x.shape[:-2], 1, x.shape[-1]))]
    for t in range(1, x.shape[-1]):
        rows.append(unit[t] - x[..., t : t + 1, :t] @ mx.concatenate(rows, axis=-2))
    return mx.concatenate(rows, axis=-2)


def _per_value_head(x: mx.array, v: mx.array) -> mx.array:
    """[B, T, Hk, Dk] -> [B, T, Hv, Dk]: each key head serves Hv // Hk consecutive value heads."""
    return mx.repeat(x, v.shape[2] // x.shape[2], axis=2)
