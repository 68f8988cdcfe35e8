"""Choosing experts in plain MLX. Knows logits; knows no experts."""

from __future__ import annotations

import mlx.core as mx


def route(logits: mx.array, experts_per_token: int) -> tuple[mx.array, mx.array]:
    """Router logits [N, E] -> (expert ids [N, K], weights [N, K] that add up to 1, in the dtype of logits)."""
    probabilities = mx.softmax(logits.astype(mx.float32), axis=-1)
    ranked = mx.stop_gradient(mx.argpartition(-probabilities, experts_per_token - 1, axis=-1))
    expert_ids = ranked[:, :experts_per_token]
    weights = mx.take_along_axis(probabilities, expert_ids, axis=-1)
    weights = weights / weights.sum(axis=-1, keepdims=True)
    return expert_ids, weights.astype(logits.dtype)


def route_with_shared(
    logits: mx.array, experts_per_token: int, x: mx.array, shared_gate: mx.array
) -> tuple[mx.array, mx.array]:
    """The same, and behind the weights sigmoid(x shared_gate^T): x [N, H], shared_gate [1, H] -> weights [N, K + 1]."""
    expert_ids, weights = route(logits.astype(mx.float32), experts_per_token)
    return expert_ids, mx.concatenate([weights, mx.sigmoid(x.astype(mx.float32) @ shared_gate.T)], axis=-1)
