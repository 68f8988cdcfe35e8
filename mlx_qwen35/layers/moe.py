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
from ..kernels.backend import on_gpu
from ..kernels.router import route
from ..kernels.weights import Projections, weights_of
from .linear import Linear
from .mlp import MLP
from .summed import Summed, array_of

# Rows up to which a GPU takes each with its experts in one launch; more are sorted by expert, which is then read once.
MIX_UP_TO = 8


class ExpertBank(Protocol):
    """Computes routed experts, wherever their weights are."""

    def __call__(
        self, x: mx.array, expert_ids: mx.array, weights: mx.array, beside: Sequence[mx.array] = ()
    ) -> mx.array:
        """x [N, H], expert_ids [N, K] int, weights [N, K] -> sum over K of weight * expert(x), [N, H].

        beside: arrays that may be computed while the bank waits for weights.
        """
        ...

    def projections(self) -> Projections | None:
        """Stacks of experts as kernels read them; None where they cannot."""
        ...

    def mixed(self, x: mx.array, expert_ids: mx.array, weights: mx.array, shared: Projections) -> mx.array:
        """The same with the shared expert, by kernels: weights [N, K + 1], the last that of the shared one."""
        ...


class SparseMoE(nn.Module):
    """The chosen experts' weighted sum plus sigmoid(shared_expert_gate(x)) * shared_expert(x)."""

    unfused = False  # MLX's operations take the kernels' place: one was found wrong here, or none is wanted

    def __init__(self, hidden_size: int, moe: MoE, experts: ExpertBank):
        super().__init__()
        self.experts_per_token = moe.experts_per_token
        self.gate = Linear(hidden_size, moe.num_experts, bias=False)
        self.experts = experts
        self.shared_expert = MLP(hidden_size, moe.shared_intermediate_size)
        self.shared_expert_gate = Linear(hidden_size, 1, bias=False)

    def choose(self, rows: mx.array, logits: mx.array | None = None) -> tuple[mx.array, mx.array]:
        """rows [N, H], normed, and what the router makes of them, if that is known -> (expert ids [N, K], weights
        [N, K])."""
        logits = self.gate(rows) if logits is None else logits
        return route(logits, self.experts_per_token, differentiable=self.training or self.unfused)

    def __call__(self, x: mx.array | Summed) -> mx.array:
        """x [B, T, H], or what is to be its norm -> [B, T, H]."""
        logits = x.through(weights_of(self.gate)) if isinstance(x, Summed) else None
        x = array_of(x)
        rows = x.reshape(-1, x.shape[-1])  # [N, H]
        if logits is not None:
            logits = logits.reshape(len(rows), -1)
        if on_gpu() and len(rows) <= MIX_UP_TO and not (self.training or self.unfused):
            shared, shared_gate = self.shared_expert.projections(), weights_of(self.shared_expert_gate)
            if shared is not None and shared_gate is not None and self.experts.projections() is not None:
                logits = self.gate(rows) if logits is None else logits
                expert_ids, weights = route(logits, self.experts_per_token, rows, shared_gate)
                return self.experts.mixed(rows, expert_ids, weights, shared).reshape(x.shape)
        expert_ids, weights = self.choose(rows, logits)
        shared, gate = self.shared_expert(rows), self.shared_expert_gate(rows)
        routed = self.experts(rows, expert_ids, weights, beside=(shared, gate))
        return _with_shared(routed, shared, gate).reshape(x.shape)


@fused
def _with_shared(routed: mx.array, shared: mx.array, gate: mx.array) -> mx.array:
    """routed, shared [N, H], gate [N, 1] -> [N, H]."""
    return routed + mx.sigmoid(gate) * shared
