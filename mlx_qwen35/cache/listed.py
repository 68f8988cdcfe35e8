"""mlx-lm's caches, one a layer in a list, as a model reads a Cache.

Knows the methods of mlx-lm's caches, which batches of mlx-lm and its prompt files hold. Knows no layers and no tokens.
What mlx-lm does to the list (rows that come and go, padding that is rolled to the other side) is its own business.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from .cache import text_positions


class CacheList:
    """A list of mlx-lm's caches for one call: has what Model takes from a Cache. Text only.

    Keys and values may be in a KVCache or BatchKVCache of mlx-lm, delta states in an ArraysCache.
    Raises ValueError for another kind.
    """

    rope_delta = 0

    def __init__(self, caches: Sequence[Any]) -> None:
        self._deltas = [_Delta(cache) for cache in caches if hasattr(cache, "cache")]
        deltas = iter(self._deltas)
        self.layers = [next(deltas) if hasattr(cache, "cache") else _Keys(cache) for cache in caches]
        keys = next((layer for layer in self.layers if isinstance(layer, _Keys)), None)
        self.offset = 0 if keys is None else keys.position
        self.left_padding = None if keys is None else keys.left_padding

    def masks(self, length: int) -> tuple[mx.array | None, mx.array | None]:
        """As `Cache.masks`."""
        readable = None
        if self.left_padding is not None:
            readable = mx.arange(self.offset + length) >= self.left_padding[:, None]
        return readable, self._deltas[0].mask(length) if self._deltas else None

    def positions(self, length: int) -> mx.array:
        """As `Cache.positions`."""
        return text_positions(self, length)

    def advance(self, length: int) -> None:
        self.offset += length
        for layer in self._deltas:
            layer.advance(length)


class _Keys:
    """mlx-lm's cache of one attention layer, as a KVCache."""

    def __init__(self, cache: Any) -> None:
        if not hasattr(cache, "update_and_fetch") or hasattr(cache, "bits") or hasattr(cache, "max_size"):
            raise ValueError(
                f"a {type(cache).__name__} cannot hold this model's keys and values; leave kv_bits and max_kv_size "
                "out, and let mlx-lm make the caches with model.make_cache()"
            )
        self._cache = cache
        self.left_padding: mx.array | None = getattr(cache, "left_padding", None)
        self.position: int = cache.offset if self.left_padding is None else cache._idx

    def update(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        return self._cache.update_and_fetch(keys, values)


class _Delta:
    """mlx-lm's cache of one delta layer, as a DeltaState."""

    steps, late = None, False  # it keeps its last state only

    def __init__(self, cache: Any) -> None:
        self._cache = cache
        self.conv, self.matrix = cache.cache

    def update(self, conv: mx.array, matrix: mx.array) -> None:
        self._cache.cache = [conv, matrix]

    def mask(self, length: int) -> mx.array | None:
        return self._cache.make_mask(length)

    def advance(self, length: int) -> None:
        self._cache.advance(length)
