"""Gate, up and SwiGLU of a row's chosen experts and of the shared one: one launch on a GPU.

Knows matrices and where an expert's begin. Knows neither who chose nor whether the stack is all experts or slots.
"""

from __future__ import annotations

from functools import lru_cache

import mlx.core as mx

from ..backend import Kernel, on_gpu
from ..weights import Kind, Weights
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
    rows, slots = expert_ids.shape
    size, shared_size = gate.kind.rows, shared_gate.kind.rows
    constants = _constants(x.dtype, slots, (gate.kind, up.kind, shared_gate.kind, shared_up.kind))
    groups = -(-max(size, shared_size) // (_ROWS * _SIMDS))
    hidden, shared = _KERNEL(
        [x, expert_ids, *gate.arrays, *up.arrays, *shared_gate.arrays, *shared_up.arrays],
        [((rows, slots, size), x.dtype), ((rows, shared_size), x.dtype)],
        constants,
        groups=(groups, slots + 1, rows),
        threads=(32 * _SIMDS, 1, 1),
    )
    return hidden, shared


@lru_cache
def _constants(dtype: mx.Dtype, slots: int, kinds: tuple[Kind, ...]) -> dict[str, int | mx.Dtype]:
    gate, _, shared_gate, _ = kinds
    constants = {"T": dtype, "H": gate.width, "K": slots, "I": gate.rows, "J": shared_gate.rows}
    for name, kind in zip(_MATRICES, kinds, strict=True):
        constants |= kind.constants(name)
    return constants
