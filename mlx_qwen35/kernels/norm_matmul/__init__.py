"""A residual connection, the norm behind it and the product that meets that norm: one launch on a GPU.

Knows how the work is laid out. What is computed: reference.py, the order of sums: body.metal. The product's threads
read all of a row in any case, so each finds the norm's factor on the way, and multiplies by it at the end.
"""

from __future__ import annotations

from functools import lru_cache

import mlx.core as mx

from ..backend import Kernel
from ..weights import Kind, Weights
from . import reference as reference

MOST_ROWS = 8  # in one launch, for which a weight is read once; more go through MLX's products
_EACH, _SIMDS = 4, 2  # outputs of a SIMD group, SIMD groups of a threadgroup

_MATRICES = ("gate", "up")
_KERNEL = Kernel(
    "norm_matmul",
    ["x", "added", "weight", "eps", *(f"{m}{part}" for m in _MATRICES for part in ("", "_scales", "_biases"))],
    ["total", "normed", "made"],
    "norm_matmul/body.metal",
    ["weights.metal"],
)


def norm_matmul(
    x: mx.array, added: mx.array | None, weight: mx.array, gate: Weights, up: Weights | None = None, *, eps: float
) -> tuple[mx.array, mx.array, mx.array]:
    """Arguments as in reference.py, where `backend.on_gpu()`, results in the dtype of x; right for any rows."""
    rows, width = x.shape
    outputs, many = gate.kind.rows, 1 if rows == 1 else MOST_ROWS
    second = gate if up is None else up  # which is not read where there is none
    constants = _constants(x.dtype, weight.dtype, many, added is not None, up is not None, gate.kind, second.kind)
    total, normed, made = _KERNEL(
        [x, x if added is None else added, weight, mx.array([eps], mx.float32), *gate.arrays, *second.arrays],
        [((rows, width), x.dtype), ((rows, width), x.dtype), ((rows, outputs), x.dtype)],
        constants,
        groups=(-(-outputs // (_EACH * _SIMDS)), -(-rows // many), 1),
        threads=(32 * _SIMDS, 1, 1),
    )
    return total, normed, made


@lru_cache
def _constants(
    dtype: mx.Dtype, weight: mx.Dtype, many: int, added: bool, gated: bool, gate: Kind, up: Kind
) -> dict[str, int | mx.Dtype]:
    constants = {"T": dtype, "NORM": weight, "H": gate.width, "MANY": many, "ADDED": int(added), "GATED": int(gated)}
    return constants | gate.constants("gate") | up.constants("up")
