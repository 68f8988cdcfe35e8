"""The down projections of chosen experts and of the shared one, weighed and added, in plain MLX, float32."""

from __future__ import annotations

import mlx.core as mx

from ..weights import Weights


def down(
    hidden: mx.array,
    shared_hidden: mx.array,
    expert_ids: mx.array,
    weights: mx.array,
    matrix: Weights,
    shared_matrix: Weights,
) -> mx.array:
    """hidden [N, K, I], shared_hidden [N, J], expert_ids [N, K], weights [N, K + 1], matrix [E, H, I], shared_matrix
    [H, J] -> [N, H]."""
    hidden, shared_hidden = hidden.astype(mx.float32), shared_hidden.astype(mx.float32)
    stack = matrix.values().swapaxes(-1, -2)
    parts = mx.gather_mm(hidden[:, :, None, :], stack, rhs_indices=expert_ids).squeeze(-2)  # [N, K, H]
    shared = shared_hidden @ shared_matrix.values().T
    return (parts * weights[:, :-1, None]).sum(axis=1) + weights[:, -1:] * shared
