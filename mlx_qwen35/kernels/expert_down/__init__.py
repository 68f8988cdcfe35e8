"""The down projections of a row's chosen experts and of the shared one, weighed and added: one launch on a GPU.

Knows matrices and where an expert's begin. Knows neither who weighed nor whether the stack is all experts or slots.
"""

from __future__ import annotations

from functools import lru_cache

import mlx.core as mx

from ..backend import Kernel, on_gpu
from ..weights import Kind, Weights
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
    (rows, slots), width = expert_ids.shape, matrix.kind.rows
    (out,) = _KERNEL(
        [hidden, shared_hidden, expert_ids, weights, *matrix.arrays, *shared_matrix.arrays],
        [((rows, width), hidden.dtype)],
        _constants(hidden.dtype, slots, matrix.kind, shared_matrix.kind),
        groups=(-(-width // (_ROWS * _SIMDS)), rows, 1),
        threads=(32 * _SIMDS, 1, 1),
    )
    return out


@lru_cache
def _constants(dtype: mx.Dtype, slots: int, kind: Kind, shared: Kind) -> dict[str, int | mx.Dtype]:
    sizes = {"T": dtype, "H": kind.rows, "K": slots, "I": kind.width, "J": shared.width}
    return sizes | kind.constants("down") | shared.constants("shared_down")
