"""Attention of several rows with one token each, whose pasts are of unequal length and lie where they lie.

Knows how the work is laid out on a GPU: a launch where every row has few positions, two where one has many, whatever
the number of rows. What is computed: reference.py, the order of sums: body.metal and sum.metal.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from ..backend import Kernel, on_gpu
from . import reference
from .pieces import MOST_ARRAYS, SPAN, Arrays, Piece, Pieces, Plan, planned

__all__ = ["SPAN", "Arrays", "Piece", "Pieces", "Plan", "planned", "ragged_attention", "readable"]

SIMDS = (8, 4)  # SIMD groups a threadgroup, about: fewer for a GPU that does not give so many threads so many registers
MOST_DIM = 256
_HEADS = 4  # of queries, for which a SIMD group reads keys once
_BLOCK = 2  # positions that a SIMD group takes at a time
_MOST_SIMDS = 16

_KERNEL = Kernel(
    "ragged_attention",
    ["queries", "table", *(f"{kind}{n}" for kind in "kv" for n in range(MOST_ARRAYS))],
    ["made", "ends"],
    "ragged_attention/body.metal",
    ["ragged_attention/columns.metal"],
)
_SUM = Kernel("ragged_sum", ["made", "ends", "first"], ["out"], "ragged_attention/sum.metal")


def readable(heads: int, kv_heads: int, dim: int) -> bool:
    """Whether the kernels take heads of queries and of keys of this size."""
    return dim <= MOST_DIM and heads % kv_heads == 0 and heads // kv_heads <= _HEADS * _MOST_SIMDS


def ragged_attention(
    queries: mx.array,
    arrays: Sequence[Arrays],
    pieces: Sequence[Pieces],
    plan: Plan,
    *,
    most_simds: int = SIMDS[0],
) -> mx.array:
    """softmax(q k^T / sqrt(D)) v of each row over all its positions: queries [B, Hq, D] -> [B, Hq, D].

    arrays: pairs of keys and values [N, Hkv, capacity, D], all of the queries' dtype. pieces: of each row, which parts
    of them are its positions. plan: `planned` of the pieces. most_simds: one of SIMDS. A row's bits depend on its own
    positions only: not on where they lie, not on other rows.
    """
    if not on_gpu():
        return reference.ragged_attention(queries, arrays, pieces).astype(queries.dtype)
    made, ends = of_spans(queries, arrays, plan, most_simds=most_simds)
    return made if plan.whole else summed(made, ends, plan, queries.dtype)


def of_spans(
    queries: mx.array, arrays: Sequence[Arrays], plan: Plan, *, most_simds: int = SIMDS[0]
) -> tuple[mx.array, mx.array]:
    """The first kernel alone: (made [items, Hq, D], ends [items, Hq, 2] float32). Where the plan is whole, items are
    rows and made is what is asked for; else it is float32, to be put together by `summed`."""
    _, heads, dim = queries.shape
    keys = arrays[0][0]
    kv_heads, columns = keys.shape[1], -(-dim // 32)
    group = heads // kv_heads
    parts = -(-group // _HEADS)
    splits = max(1, most_simds // parts)
    out = queries.dtype if plan.whole else mx.float32
    constants = {
        "T": queries.dtype, "OUT": out, "WHOLE": plan.whole, "HQ": heads, "HKV": kv_heads, "D": dim, "GROUP": group,
        "HEADS": -(-group // parts), "PARTS": parts, "SPLITS": splits, "BLOCK": _BLOCK, "COLUMNS": columns,
        "WIDE": dim == 32 * columns and columns * queries.itemsize % 16 == 0, "SPAN": plan.span,
    }  # fmt: skip
    found = []
    for launch in plan.launches:
        pairs = [arrays[number] for number in launch.arrays]
        pairs += pairs[:1] * (MOST_ARRAYS - len(pairs))
        found.append(
            _KERNEL(
                [queries, launch.table, *(pair[0] for pair in pairs), *(pair[1] for pair in pairs)],
                [((launch.items, heads, dim), out), ((launch.items, heads, 2), mx.float32)],
                constants,
                groups=(kv_heads, launch.items, 1),
                threads=(32 * parts * splits, 1, 1),
            )
        )
    if len(found) == 1:
        return found[0][0], found[0][1]
    made, ends = (mx.concatenate(of) for of in zip(*found, strict=True))
    return made, ends


def summed(made: mx.array, ends: mx.array, plan: Plan, dtype: mx.Dtype) -> mx.array:
    """The second kernel: what the first has of spans, put together: [B, Hq, D]."""
    _, heads, dim = made.shape
    rows, threads = len(plan.firsts) - 1, 32 * -(-min(dim, MOST_DIM) // 32)
    (out,) = _SUM(
        [made, ends, plan.first],
        [((rows, heads, dim), dtype)],
        {"T": dtype, "HQ": heads, "D": dim, "THREADS": threads},
        groups=(heads, rows, 1),
        threads=(threads, 1, 1),
    )
    return out
