"""The mixture of experts: a router, routed experts and one shared expert.

Knows who is chosen and how much each counts. Where the experts' weights are is the bank's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn

from ..config import MoE
from ..kernels.activation import fused
from .linear import Linear
from .mlp import MLP


class ExpertBank(Protocol):
    """Computes routed experts, wherever their weights are."""

    def __call__(
        self, x: mx.array, expert_ids: mx.array, weights: mx.array, beside: Sequence[mx.array] = ()
    ) -> mx.array:
        """x [N, H], expert_ids [N, K] int, weights [N, K] -> sum over K of weight * expert(x), [N, H].

        beside: arrays that may be computed while the bank waits for weights.
        """
        ...


class SparseMoE(nn.Module):
    """The chosen experts' weighted sum plus sigmoid(shared_expert_gate(x)) * shared_expert(x)."""

    def __init__(self, hidden_size: int, moe: MoE, experts: ExpertBank):
        super().__init__()
        self.experts_per_token = moe.experts_per_token
        self.gate = Linear(hidden_size, moe.num_experts, bias=False)
        self.experts = experts
        self.shared_expert = MLP(hidden_size, moe.shared_intermediate_size)
        self.shared_expert_gate = Linear(hidden_size, 1, bias=False)

    def choose(self, rows: mx.array) -> tuple[mx.array, mx.array]:
        """rows [N, H], normed -> (expert ids [N, K], weights [N, K])."""
        return route(self.gate(rows), self.experts_per_token)

    def __call__(self, x: mx.array) -> mx.array:
        """x [B, T, H] -> [B, T, H]."""
        rows = x.reshape(-1, x.shape[-1])  # [N, H]
        expert_ids, weights = self.choose(rows)
        shared, gate = self.shared_expert(rows), self.shared_expert_gate(rows)
        routed = self.experts(rows, expert_ids, weights, beside=(shared, gate))
        return _with_shared(routed, shared, gate).reshape(x.shape)


@fused
def _with_shared(routed: mx.array, shared: mx.array, gate: mx.array) -> mx.array:
    """routed, shared [N, H], gate [N, 1] -> [N, H]."""
    return routed + mx.sigmoid(gate) * shared


def route(logits: mx.array, experts_per_token: int) -> tuple[mx.array, mx.array]:
    """Router logits [N, E] -> (expert ids [N, K], weights [N, K] that add up to 1, in the dtype of logits)."""
    probabilities = mx.softmax(logits.astype(mx.float32), axis=-1)
    ranked = mx.stop_gradient(mx.argpartition(-probabilities, experts_per_token - 1, axis=-1))
    expert_ids = ranked[:, :experts_per_token]
    weights = mx.take_along_axis(probabilities, expert_ids, axis=-1)
    weights = weights / weights.sum(axis=-1, keepdims=True)
    return expert_ids, weights.astype(logits.dtype)
