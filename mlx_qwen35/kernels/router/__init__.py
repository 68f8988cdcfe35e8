"""Softmax over the router's logits, the K largest, and their weights: one launch on a GPU.

Knows logits. Knows neither experts nor the router's own product: one threadgroup, which choosing takes, would read its
weights too slowly.
"""

from __future__ import annotations

from functools import lru_cache

import mlx.core as mx

from ..backend import Kernel, on_gpu
from ..weights import Kind, Weights
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
_NOTHING = Kind(0, 16, 1, 16, mx.float32, mx.float32)


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
    shared = shared_gate is not None
    if shared:
        arrays, kind, to = shared_gate.arrays, shared_gate.kind, mx.float32
    else:  # they are not read
        x, arrays, kind, to = logits, (logits,) * 3, _NOTHING, logits.dtype
    ids, weights = _KERNEL(
        [logits, x, *arrays],
        [((rows, experts_per_token), mx.uint32), ((rows, experts_per_token + shared), to)],
        _constants(to, x.dtype, logits.dtype, num_experts, experts_per_token, shared, kind),
        groups=(rows, 1, 1),
        threads=(_SIMD * (1 + shared), 1, 1),
    )
    return ids, weights


@lru_cache
def _constants(
    to: mx.Dtype, x: mx.Dtype, logits: mx.Dtype, num_experts: int, experts_per_token: int, shared: bool, gate: Kind
) -> dict[str, int | mx.Dtype]:
    sizes = {"E": num_experts, "K": experts_per_token, "SHARED": int(shared), "WIDTH": gate.width}
    return {"TO": to, "T": x, "L": logits} | sizes | gate.constants("gate")
