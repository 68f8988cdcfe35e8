"""Gate, up and SwiGLU of chosen experts in plain MLX, float32. Knows matrices; knows no router."""

from __future__ import annotations

import mlx.core as mx

from ..activation import swiglu
from ..weights import Weights


def gate_up(
    x: mx.array, expert_ids: mx.array, gate: Weights, up: Weights, shared_gate: Weights, shared_up: Weights
) -> tuple[mx.array, mx.array]:
    """x [N, H], expert_ids [N, K], stacks [E, I, H], shared [J, H] -> (hidden [N, K, I], shared hidden [N, J])."""
    x = x.astype(mx.float32)
    rows = x[:, None, None, :]
    gates, ups = (mx.gather_mm(rows, w.values().swapaxes(-1, -2), rhs_indices=expert_ids) for w in (gate, up))
    hidden = swiglu(gates, ups).squeeze(-2)
    return hidden, swiglu(x @ shared_gate.values().T, x @ shared_up.values().T)
