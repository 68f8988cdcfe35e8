"""Products of a few rows in which each row takes the kernel that it would take alone: what exact=True stands on.

Knows which call of MLX gives every row that kernel. Knows no layers.
On a GPU MLX chooses a product's kernel by how many rows meet a matrix, and each kernel has its own order of sums
(docs/EXACTNESS.md). It joins the rows of a batch where all of them meet one matrix, but not in a gathered product:
there each entry of the index is a product of its own, here of one row. One row alone goes the same way, so that it is
the very same kernel, whatever else is in the call.
"""

from __future__ import annotations

import math
from functools import lru_cache

import mlx.core as mx

from ..matmul import matmul as joined_matmul
from ..quantized_matmul import quantized_matmul as joined_quantized_matmul
from ..quantized_matmul import rows_alone

ROWS = 8  # of a call that are computed each by itself: drafted tokens, or the rows of a batch


def matmul(x: mx.array, weight: mx.array) -> mx.array:
    """x [.., in], weight [out, in] -> [.., out]; of more than ROWS rows what kernels.matmul gives."""
    rows = math.prod(x.shape[:-1])
    if rows > ROWS or mx.default_device().type == mx.cpu:  # where the joined form has each alone anyway
        return joined_matmul(x, weight)
    lhs, rhs = _indices(rows)
    made = mx.gather_mm(x.reshape(rows, 1, -1), weight.T[None], lhs_indices=lhs, rhs_indices=rhs)
    return made.reshape(*x.shape[:-1], -1)


def quantized_matmul(
    x: mx.array,
    weight: mx.array,
    scales: mx.array,
    biases: mx.array | None,
    *,
    group_size: int,
    bits: int,
    mode: str,
) -> mx.array:
    """x [.., in], weight, scales, biases of mx.quantize for [out, in] -> [.., out]; of more than ROWS rows what
    kernels.quantized_matmul gives."""
    how = {"group_size": group_size, "bits": bits, "mode": mode}
    rows = math.prod(x.shape[:-1])
    if rows > ROWS:
        return joined_quantized_matmul(x, weight, scales, biases, **how)
    if mx.default_device().type == mx.cpu:  # whose kernel takes each row by itself, where weights are not unpacked
        few = rows_alone(bits, mode)
        flat = x.reshape(rows, -1)
        parts = [flat[start : start + few] for start in range(0, rows, few)]
        made = [joined_quantized_matmul(part, weight, scales, biases, **how) for part in parts]
        return (made[0] if len(made) == 1 else mx.concatenate(made)).reshape(*x.shape[:-1], -1)
    lhs, rhs = _indices(rows)
    made = mx.gather_qmm(
        x.reshape(rows, 1, -1),
        weight[None],
        scales[None],
        None if biases is None else biases[None],
        lhs_indices=lhs,
        rhs_indices=rhs,
        transpose=True,
        **how,
    )
    return made.reshape(*x.shape[:-1], -1)


@lru_cache(maxsize=ROWS)
def _indices(rows: int) -> tuple[mx.array, mx.array]:
    """Of each product its row, and its matrix, which is the only one."""
    return mx.array([*range(rows)], mx.uint32), mx.array([0] * rows, mx.uint32)
