"""The gated delta rule: MLX's own kernel where this MLX has it, the plain form where not, chosen at import.

Knows which form to run. Knows neither layers nor caches.
On CPU, MLX's own form goes token by token: the chunked twin is 2 to 4 times as fast there from 16 tokens on and slower
below. It stays the choice, because it gives the same bits however a prompt is cut.
"""

from __future__ import annotations

import mlx.core as mx

from .reference import gated_delta_chunks, gated_delta_steps

_CHUNKS_FROM = 16  # tokens; the plain forms break even about there


def gated_delta(
    q: mx.array, k: mx.array, v: mx.array, decay: mx.array, beta: mx.array, state: mx.array | None = None
) -> tuple[mx.array, mx.array]:
    """Run the recurrence over T tokens from `state` (None: zeros); reference.py defines it and is its twin.

    q, k: [B, T, Hk, Dk]; v: [B, T, Hv, Dv]; decay in (0, 1], beta: [B, T, Hv]; state: [B, Hv, Dv, Dk]. All float32, and
    that matters: MLX's kernel takes the decay in the dtype of q, and in bfloat16 a decay of 0.999 is 1.
    Returns (o [B, T, Hv, Dv], state after the last token), float32.
    """
    if state is None:
        state = mx.zeros((q.shape[0], v.shape[2], v.shape[3], k.shape[3]), mx.float32)
    output, state = _run(q, k, v, decay, beta, state)
    return output, state


def plain_gated_delta(
    q: mx.array, k: mx.array, v: mx.array, decay: mx.array, beta: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    """gated_delta without MLX's own kernel."""
    form = gated_delta_steps if q.shape[1] < _CHUNKS_FROM else gated_delta_chunks
    return form(q, k, v, decay, beta, state)


_run = getattr(mx.fast, "gated_delta_update", plain_gated_delta)
