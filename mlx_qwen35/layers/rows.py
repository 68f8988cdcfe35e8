"""Attention of several rows with one token each, whose pasts are of unequal length.

Knows whose keys are whose. On a GPU all rows go together, in a launch or two; elsewhere, and where each is to have the
bits that it has alone, each attends by itself, over its own cache.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from mlx_qwen35.cache.rows import RowsKV

from ..cache import KVCache, StretchedKVCache
from ..kernels.backend import on_gpu
from ..kernels.ragged_attention import SIMDS, ragged_attention, readable

Attend = Callable[[mx.array, mx.array, mx.array, KVCache | StretchedKVCache], mx.array]


class RowsAttention(nn.Module):
    """softmax(q k^T) v of each row. Holds no weights."""

    unfused = False  # each row by itself: the kernel was found wrong here, or is not wanted
    most_simds = SIMDS[0]
    _apart = False

    def be_exact(self) -> None:
        """From now on each row attends by itself, by the call that it makes alone."""
        self._apart = True

    def __call__(
        self, queries: mx.array, keys: mx.array, values: mx.array, cache: RowsKV, attend: Attend
    ) -> mx.array:
        """queries [B, Hq, 1, D], keys and values [B, Hkv, 1, D] of the present tokens -> [B, Hq, 1, D].

        attend: the same of one row with its own cache, which takes its keys and values in.
        """
        apart = self._apart or self.unfused or self.training or not on_gpu()
        if not apart and readable(queries.shape[1], keys.shape[1], queries.shape[3]):
            taken = cache.take(keys, values)
            if taken is not None:
                made = ragged_attention(queries[:, :, 0], *taken, most_simds=self.most_simds)
                return made[:, :, None]
        made = []
        for number, held in enumerate(cache.alone()):
            row = slice(number, number + 1)
            made.append(attend(queries[row], keys[row], values[row], held))
        return mx.concatenate(made)
