"""What attention makes of its projections before it attends: one launch on a GPU.

Knows how the work is laid out. What is computed: reference.py, the order of sums: body.metal.
"""

from __future__ import annotations

import mlx.core as mx

from ..backend import Kernel, on_gpu
from . import reference

_SIMDS = 4  # SIMD groups a threadgroup

_KERNEL = Kernel(
    "attention_inputs",
    ["queries", "keys", "q_norm", "k_norm", "cos", "sin", "eps"],
    ["turned_queries", "turned_keys", "gates"],
    "attention_inputs/body.metal",
)


def attention_inputs(
    queries: mx.array,
    keys: mx.array,
    q_norm: mx.array,
    k_norm: mx.array,
    cos: mx.array,
    sin: mx.array,
    *,
    heads: int,
    kv_heads: int,
    eps: float,
    keys_at: int = 0,
    differentiable: bool = False,
) -> tuple[mx.array, mx.array, mx.array]:
    """Arguments and results as in reference.py.

    Both arrays may have more columns: queries behind their own, and keys begin at column `keys_at`. So both may be one
    array, the product of projections that were joined.
    differentiable: gradients will be asked for, which kernels do not give.
    """
    batch, length, width = queries.shape
    dim, half = q_norm.shape[0], cos.shape[-1]
    if differentiable or not on_gpu():
        own = queries[..., : heads * 2 * dim], keys[..., keys_at : keys_at + kv_heads * dim]
        how = {"heads": heads, "kv_heads": kv_heads, "eps": eps}
        return reference.attention_inputs(*own, q_norm, k_norm, cos, sin, **how)
    constants = {
        "T": queries.dtype, "QNORM": q_norm.dtype, "KNORM": k_norm.dtype,
        "QUERIES": width, "KEYS": keys.shape[-1], "FIRST": keys_at, "SIMDS": _SIMDS,
        "HQ": heads, "HKV": kv_heads, "D": dim, "HALF": half, "SAME": cos.shape[0] == 1,
    }  # fmt: skip
    q, k, gates = _KERNEL(
        [queries, keys, q_norm, k_norm, cos, sin, mx.array([eps], mx.float32)],
        [
            ((batch, heads, length, dim), queries.dtype),
            ((batch, kv_heads, length, dim), queries.dtype),
            ((batch, length, heads * dim), queries.dtype),
        ],
        constants,
        groups=(-(-batch * length * (heads + kv_heads) // _SIMDS), 1, 1),
        threads=(32 * _SIMDS, 1, 1),
    )
    return q, k, gates
