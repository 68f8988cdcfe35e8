"""The gated delta rule: takes MLX's own kernel where this MLX has it, the chunked plain form where not.

Knows which form to run. Knows neither layers nor caches.
"""

from __future__ import annotations

import mlx.core as mx

from .reference import gated_delta_chunks

_fast = getattr(mx.fast, "gated_delta_update", None)


def gated_delta(
    q: mx.array, k: mx.array, v: mx.array, decay: mx.array, beta: mx.array, state: mx.array | None = None
) -> tuple[mx.array, mx.array]:
    """Run the recurrence over T tokens from `state` (None: zeros); reference.py defines it and is its twin.

    q, k: [B, T, Hk, Dk]; v: [B, T, Hv, Dv]; decay in (0, 1], beta: [B, T, Hv]; state: [B, Hv, Dv, Dk]; all float32.
    Returns (o [B, T, Hv, Dv], state after the last token), float32.
    """
    if state is None:
        state = mx.zeros((q.shape[0], v.shape[2], v.shape[3], k.shape[3]), mx.float32)
    if _fast is not None:
        output, state = _fast(q, k, v, decay, beta, state)
        return output, state
    return gated_delta_chunks(q, k, v, decay, beta, state)
