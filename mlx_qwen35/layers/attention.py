"""Gated softmax attention with normalised queries and keys.

Knows heads, masks and how to keep the scores small. Knows neither where positions come from nor other layers.
"""

from __future__ import annotations

from itertools import pairwise

import mlx.core as mx
import mlx.nn as nn

from mlx_qwen35.cache.ragged import RaggedKV
from mlx_qwen35.cache.rows import RowsKV

from ..cache import KVCache, StretchedKVCache
from ..config import TextConfig
from ..kernels.activation import gated
from ..kernels.attention_inputs import attention_inputs
from ..kernels.backend import METAL, current
from .joined import JoinedInputs, columns
from .linear import Linear
from .norm import RMSNorm
from .rows import RowsAttention
from .stretches import few_alone, stretched_attention
from .summed import Summed

# Scores of one layer that may exist at once. MLX materialises them for head_dim 256 when more than 8 rows ask.
MOST_SCORES = 2**26
ON_THE_WAY = 4  # tiles that the CPU backend allocates for while it works on one
_FUSED_ROWS = 8
_FUSED_QUERIES = 32  # of a head of keys, that MLX's kernel for few queries takes on Metal; those of one position are
_LEAST_QUERIES = 6  # so many or more where how many positions there are changes no bit
# Numbers of keys from which on that kernel adds up in another order (scaled_dot_product_attention.cpp of MLX: from
# where on it takes two passes, and in how many blocks on which chip).
_ORDERS = (1024, 1025, 4096, 8193, 16384, 32769, 65536, 65537)


class GatedAttention(JoinedInputs, nn.Module):
    """softmax(q k^T) v * sigmoid(gate), projected; grouped key/value heads."""

    unfused = False  # MLX's operations take the kernel's place: it was found wrong here, or is not wanted
    _one_by_one = False

    def __init__(self, config: TextConfig):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.q_proj = Linear(hidden, self.heads * self.head_dim * 2, bias=False)  # per head: query rows, gate rows
        self.k_proj = Linear(hidden, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = Linear(hidden, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = Linear(self.heads * self.head_dim, hidden, bias=False)
        self.q_norm = RMSNorm(self.head_dim, eps)
        self.k_norm = RMSNorm(self.head_dim, eps)
        self.rows = RowsAttention()

    def __call__(
        self,
        x: mx.array | Summed,
        rope: tuple[mx.array, mx.array],
        cache: KVCache | StretchedKVCache | RowsKV | RaggedKV | None = None,
        readable: mx.array | None = None,
    ) -> mx.array:
        """x [B, T, H], or what is to be its norm -> [B, T, H]. rope: cos, sin of these T positions. cache: of
        this layer, or None.

        readable [B, S]: which of all S positions are tokens and not padding; None where all are.
        """
        batch, length, _ = x.shape
        made = self._joined(x, self.joinable())
        values = columns(made[2:], [self.kv_heads * self.head_dim])[0]
        values = values.reshape(batch, length, self.kv_heads, self.head_dim).swapaxes(1, 2)
        queries, keys, gate = attention_inputs(
            made[0][0],
            made[1][0],
            self.q_norm.weight,
            self.k_norm.weight,
            *rope,
            heads=self.heads,
            kv_heads=self.kv_heads,
            eps=self.q_norm.eps,
            keys_at=made[1][1],
            differentiable=self.training or self.unfused,
        )
        if isinstance(cache, RowsKV):
            out = self.rows(queries, keys, values, cache, cached_attention)
        elif isinstance(cache, RaggedKV):
            made = []
            for own, part in cache.parts:
                made.append(cached_attention(queries[:, :, part], keys[:, :, part], values[:, :, part], own))
            out = mx.concatenate(made, axis=2)
        else:
            out = cached_attention(queries, keys, values, cache, readable, one_by_one=self._one_by_one)
        out = out.swapaxes(1, 2).reshape(batch, length, -1)
        return self.o_proj(gated(out, gate))

    def be_exact(self) -> None:
        """From now on a few positions attend one by one, whatever MLX's source says of its kernel."""
        self._one_by_one = True

    def joinable(self) -> list[nn.Module]:
        return [self.q_proj, self.k_proj, self.v_proj]


def cached_attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: KVCache | StretchedKVCache | None,
    readable: mx.array | None = None,
    *,
    one_by_one: bool = False,
) -> mx.array:
    """Attention of T tokens: queries [B, Hq, T, D], keys and values [B, Hkv, T, D] -> [B, Hq, T, D].

    cache: what came before, which takes the keys and values in; None: nothing did. `readable` as above. one_by_one: a
    few positions are never asked for together.
    """
    if isinstance(cache, StretchedKVCache):
        return stretched_attention(queries, cache.update(keys, values), readable)
    if cache is not None:
        keys, values = cache.update(keys, values)
    return causal_attention(queries, keys, values, readable, one_by_one=one_by_one)


def causal_attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    readable: mx.array | None = None,
    *,
    most_scores: int = MOST_SCORES,
    one_by_one: bool = False,
) -> mx.array:
    """Attention of the last T of S positions: queries [B, Hq, T, D], keys and values [B, Hkv, S, D] -> [B, Hq, T, D].

    Query t reads keys up to its own; `readable` as above. Computed in tiles of queries so that at most about
    `most_scores` scores exist at once, and each tile reads only the keys before its end. A few positions have the bits
    that each has alone; one_by_one as above.
    """
    batch, heads, length, dim = queries.shape
    past = keys.shape[2] - length
    if mx.default_device().type == mx.cpu:
        most_scores //= ON_THE_WAY
    rows = max(_FUSED_ROWS, most_scores // (batch * heads * keys.shape[2]))
    few = length <= few_alone()
    if few:
        together = current() is METAL and readable is None and not one_by_one
        ends = alike(past, length, heads // keys.shape[1]) if together else list(range(1, length + 1))
    else:
        ends = [*range(rows, length, rows), length]
    tiles = []
    for start, stop in pairwise([0, *ends]):
        asking = queries[:, :, start:stop]
        if tiles and not few:  # one after the other: MLX would begin twenty at once, each with its scores
            (asking,) = mx.depends([asking], [tiles[-1]])
        mask = "causal" if stop - start > 1 else None
        if readable is not None:
            mask = _mask(readable[:, : past + stop], past + start)
        tiles.append(
            mx.fast.scaled_dot_product_attention(
                asking,
                keys[:, :, : past + stop],
                values[:, :, : past + stop],
                scale=dim**-0.5,
                mask=mask,
            )
        )
    return tiles[0] if len(tiles) == 1 else mx.concatenate(tiles, axis=2)


def alike(past: int, length: int, each: int) -> list[int]:
    """Where a few positions behind `past` are to be parted, so that MLX's kernel for few queries adds up for each as it
    does for that one alone: the ends of the parts, of `length` positions. each: queries of a head of keys a position.

    A query goes over the keys before it in an order that depends on how many keys the call has, by steps, and on
    nothing else where there are enough queries; what lies behind it is left out.
    """
    most = _FUSED_QUERIES // each if each >= _LEAST_QUERIES else 1
    ends, start = [], 0
    for stop in range(1, length + 1):
        last = stop == length
        if last or stop + 1 - start > most or past + stop + 1 in _ORDERS:
            ends.append(stop)
            start = stop
    return ends


def _mask(readable: mx.array, first: int) -> mx.array:
    """Which keys [B, S] the queries at positions first .. S-1 may read: bool [B, 1, S - first, S].

    A padding position reads itself, because a row without any key would be NaN and poison the values it stores:

        padding 2, first 0:   1 . . .        first 3:   . . 1 1
                              . 1 . .
                              . . 1 .
                              . . 1 1
    """
    keys = mx.arange(readable.shape[1])
    queries = mx.arange(first, readable.shape[1])[:, None]
    return ((keys <= queries) & readable[:, None, None, :]) | (keys == queries)
