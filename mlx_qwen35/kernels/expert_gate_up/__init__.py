"""Gate, up and SwiGLU of a row's chosen experts and of the shared one: one launch on a GPU.

Knows matrices and where an expert's begin. Knows neither who chose nor whether the stack is all experts or slots.
"""

from __future__ import annotations

import mlx.core as mx

from ..backend import Kernel, on_gpu
from ..weights import Weights
from . import reference

_MATRICES = ("gate", "up", "shared_gate", "shared_up")
_KERNEL = Kernel(
    "expert_gate_up",
    ["x", "ids", *(f"{m}{part}" for m in _MATRICES for part in ("", "_scales", "_biases"))],
    ["hidden", "shared_hidden"],
    "expert_gate_up/body.metal",
    ["weights.metal"],
)
_ROWS, _SIMDS = 4, 2  # outputs of a SIMD group, SIMD groups of a threadgroup


def gate_up(
    x: mx.array, expert_ids: mx.array, gate: Weights, up: Weights, shared_gate: Weights, shared_up: Weights
) -> tuple[mx.array, mx.array]:
    """silu(gate x) * (up x), in the dtype of x (the reference in float32).

    x [N, H], expert_ids [N, K] uint32: which matrices of the stacks gate and up [E, I, H]; shared_gate, shared_up
    [J, H]. -> (hidden [N, K, I], of the shared expert [N, J]). body.metal says in which order sums are taken.
    """
    if not on_gpu():
        return reference.gate_up(x, expert_ids, gate, up, shared_gate, shared_up)
    matrices = dict(zip(_MATRICES, (gate, up, shared_gate, shared_up), strict=True))
    (rows, width), slots = x.shape, expert_ids.shape[1]
    size, shared_size = gate.rows, shared_gate.rows
    constants: dict[str, int | mx.Dtype] = {"T": x.dtype, "H": width, "K": slots, "I": size, "J": shared_size}
    for name, each in matrices.items():
        constants |= each.constants(name)
    groups = -(-max(size, shared_size) // (_ROWS * _SIMDS))
    hidden, shared = _KERNEL(
        [x, expert_ids, *(array for each in matrices.values() for array in each.arrays)],
        [((rows, slots, size), x.dtype), ((rows, shared_size), x.dtype)],
        constants,
        groups=(groups, slots + 1, rows),
        threads=(32 * _SIMDS, 1, 1),
    )
    return hidden, shared
