"""The down projections of a row's chosen experts and of the shared one, weighed and added: one launch on a GPU.

Knows matrices and where an expert's begin. Knows neither who weighed nor whether the stack is all experts or slots.
"""

from __future__ import annotations

import mlx.core as mx

from ..backend import Kernel, on_gpu
from ..weights import Weights
from . import reference

_MATRICES = ("down", "shared_down")
_KERNEL = Kernel(
    "expert_down",
    ["hidden", "shared_hidden", "ids", "weights"] + [f"{m}{p}" for m in _MATRICES for p in ("", "_scales", "_biases")],
    ["out"],
    "expert_down/body.metal",
    ["weights.metal"],
)
_ROWS, _SIMDS = 4, 2  # outputs of a SIMD group, SIMD groups of a threadgroup


def down(
    hidden: mx.array,
    shared_hidden: mx.array,
    expert_ids: mx.array,
    weights: mx.array,
    matrix: Weights,
    shared_matrix: Weights,
) -> mx.array:
    """The sum over K of weight * (matrix of the expert) hidden, plus the last weight * shared_matrix shared_hidden.

    hidden [N, K, I], shared_hidden [N, J], expert_ids [N, K] uint32, weights [N, K + 1] float32, matrix [E, H, I],
    shared_matrix [H, J] -> [N, H] in the dtype of hidden (the reference in float32). body.metal says in which order
    sums are taken: that of expert_ids counts.
    """
    if not on_gpu():
        return reference.down(hidden, shared_hidden, expert_ids, weights, matrix, shared_matrix)
    (rows, slots, size), width = hidden.shape, matrix.rows
    constants: dict[str, int | mx.Dtype] = {"T": hidden.dtype, "H": width, "K": slots, "I": size}
    constants |= {"J": shared_hidden.shape[1]} | matrix.constants("down") | shared_matrix.constants("shared_down")
    (out,) = _KERNEL(
        [hidden, shared_hidden, expert_ids, weights, *matrix.arrays, *shared_matrix.arrays],
        [((rows, width), hidden.dtype)],
        constants,
        groups=(-(-width // (_ROWS * _SIMDS)), rows, 1),
        threads=(32 * _SIMDS, 1, 1),
    )
    return out
