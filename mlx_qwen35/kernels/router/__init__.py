"""Softmax over the router's logits, the K largest, and their weights: one launch on a GPU.

Knows logits. Knows neither experts nor the router's own product: one threadgroup, which choosing takes, would read its
weights too slowly.
"""

from __future__ import annotations

import mlx.core as mx

from ..backend import Kernel, on_gpu
from ..weights import Weights
from . import reference

_KERNEL = Kernel(
    "router",
    ["logits", "x", "gate", "gate_scales", "gate_biases"],
    ["ids", "weights"],
    "router/body.metal",
    ["weights.metal"],
)
_MOST = 1024  # experts: a thread keeps one bit of a word for each of its 32nd part
_SIMD = 32


def route(
    logits: mx.array,
    experts_per_token: int,
    x: mx.array | None = None,
    shared_gate: Weights | None = None,
    *,
    differentiable: bool = False,
) -> tuple[mx.array, mx.array]:
    """Router logits [N, E] -> (expert ids [N, K], weights [N, K] that add up to 1, in the dtype of logits).

    With x [N, H] and shared_gate [1, H] a further column of weights: sigmoid(x shared_gate^T), for the shared expert;
    weights are float32 then. On a GPU ids come by weight, of equal ones the lower id first; the reference has the same
    set (of equal ones any) in any order. differentiable: gradients will be asked for, which the kernel has none of.
    """
    rows, num_experts = logits.shape
    if not on_gpu() or differentiable or num_experts > _MOST or experts_per_token > _SIMD:
        if shared_gate is None:
            return reference.route(logits, experts_per_token)
        return reference.route_with_shared(logits, experts_per_token, x, shared_gate.values())
    if shared_gate is None:  # nothing is read of them
        x, gate = logits, Weights(0, 16, logits, logits, logits)
    else:
        gate = shared_gate
    shared = int(shared_gate is not None)
    to = mx.float32 if shared else logits.dtype
    constants: dict[str, int | mx.Dtype] = {
        "TO": to,
        "T": x.dtype,
        "L": logits.dtype,
        "E": num_experts,
        "K": experts_per_token,
    }
    constants |= {"SHARED": shared, "WIDTH": x.shape[1]} | gate.constants("gate")
    ids, weights = _KERNEL(
        [logits, x, *gate.arrays],
        [((rows, experts_per_token), mx.uint32), ((rows, experts_per_token + shared), to)],
        constants,
        groups=(rows, 1, 1),
        threads=(_SIMD * (1 + shared), 1, 1),
    )
    return ids, weights
