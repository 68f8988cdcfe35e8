"""Attention of several rows with one token each, whose pasts are of unequal length.

Knows whose keys are whose. A row's bits are those that it has alone: each attends by itself, over its own cache.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from ..cache import KVCache, StretchedKVCache
from ..cache_rows import RowsKV

Attend = Callable[[mx.array, mx.array, mx.array, KVCache | StretchedKVCache], mx.array]


def attention_of_rows(queries: mx.array, keys: mx.array, values: mx.array, cache: RowsKV, attend: Attend) -> mx.array:
    """queries [B, Hq, 1, D], keys and values [B, Hkv, 1, D] of the present tokens -> [B, Hq, 1, D].

    attend: the same of one row with its own cache, which takes its keys and values in.
    """
    made = []
    for number, held in enumerate(cache.rows):
        row = slice(number, number + 1)
        made.append(attend(queries[row], keys[row], values[row], held))
    return mx.concatenate(made)
