"""What caches hold before a decode step that is traced: of one sequence, and of several of unequal length.

Knows arrays of both projects' caches and how they are put in. Knows no model; nothing is computed, arrays are shapes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from benchmarks.graph import shape_only

CACHE_STEP = 256  # positions by which both projects' caches grow
IN_TAIL = 32  # of the newest positions of rows that go on together: half of what there is room for


@dataclass(frozen=True)
class Held:
    """One sequence of `context` tokens, in a cache of either project."""

    text: dict[str, Any]  # of config.json
    context: int
    batch: int = 1

    def lengths(self) -> list[int]:
        """Tokens of each row: up to `context`, in equal steps."""
        return [self.context * (row + 1) // self.batch for row in range(self.batch)]

    def states(self, kind: str) -> dict[str, mx.array]:
        """Arrays of a layer of a kind, by name."""
        return self._keys(1, self.context) if kind == "full_attention" else self._delta()

    def touched(self, kind: str) -> dict[str, float]:
        """The part of some arrays that holds something, where an operation has no view of that part alone."""
        return {}

    def least(self, name: str, array: mx.array) -> float:
        """Bytes of such an array that a step cannot do without: all positions up to the new one, which is written
        before, and states twice."""
        if name in ("conv", "matrix"):
            return 2 * array.nbytes
        return array.nbytes / (array.shape[0] * array.shape[2]) * sum(length + 2 for length in self.lengths())

    def fill(self, cache: Any, kind: str, arrays: list[mx.array]) -> None:
        """Put a layer's arrays into its cache."""
        if kind == "full_attention":
            (cache.keys, cache.values), cache.offset = arrays, self.context
        elif hasattr(cache, "matrix"):
            cache.conv, cache.matrix = arrays
        else:
            cache[0], cache[1] = arrays

    def after(self, cache: Any, kind: str) -> list[mx.array]:
        """What a layer's cache holds after the step."""
        if kind == "full_attention":
            return [cache.keys, cache.values]
        return [cache.conv, cache.matrix] if hasattr(cache, "matrix") else [cache[0], cache[1]]

    def _keys(self, rows: int, length: int) -> dict[str, mx.array]:
        capacity = (length // CACHE_STEP + 1) * CACHE_STEP
        shape = (rows, self.text["num_key_value_heads"], capacity, self.text["head_dim"])
        return {"keys": shape_only(shape, mx.bfloat16), "values": shape_only(shape, mx.bfloat16)}

    def _delta(self) -> dict[str, mx.array]:
        text = self.text
        heads, keys, values = (
            text["linear_num_value_heads"],
            text["linear_key_head_dim"],
            text["linear_value_head_dim"],
        )
        channels = 2 * text["linear_num_key_heads"] * keys + heads * values
        window = (self.batch, text["linear_conv_kernel_dim"] - 1, channels)
        matrix = (self.batch, heads, values, keys)
        return {"conv": shape_only(window, mx.bfloat16), "matrix": shape_only(matrix, mx.float32)}


@dataclass(frozen=True)
class OurRows(Held):
    """A RowsCache: keys and values of each row by themselves, the newest in the tail."""

    def make(self, model: Any) -> Any:
        """The cache, with states that `fill` replaces."""
        from mlx_qwen35.cache import DeltaState
        from mlx_qwen35.cache.rows import RowsCache

        caches = [model.make_cache() for _ in range(self.batch)]
        nothing = shape_only((1, 1), mx.float32)
        for cache, length in zip(caches, self.lengths(), strict=True):
            cache.offset = length
            for layer in cache.layers:
                if isinstance(layer, DeltaState):
                    layer.update(nothing, nothing)
        return RowsCache(caches)

    def states(self, kind: str) -> dict[str, mx.array]:
        if kind != "full_attention":
            return self._delta()
        from mlx_qwen35.cache.rows import TAIL

        rows = [self._keys(1, length - IN_TAIL) for length in self.lengths()]
        made = {f"{name}.{row}": array for row, held in enumerate(rows) for name, array in held.items()}
        shape = (self.batch, self.text["num_key_value_heads"], TAIL, self.text["head_dim"])
        return made | {"tail.keys": shape_only(shape, mx.bfloat16), "tail.values": shape_only(shape, mx.bfloat16)}

    def touched(self, kind: str) -> dict[str, float]:
        held = {name: array for name, array in self.states(kind).items() if name.startswith(("keys.", "values."))}
        own = [length - IN_TAIL for length in self.lengths()]
        return {name: own[int(name.rpartition(".")[2])] / array.shape[2] for name, array in held.items()}

    def least(self, name: str, array: mx.array) -> float:
        if name in ("conv", "matrix"):
            return super().least(name, array)
        position = array.nbytes / (array.shape[0] * array.shape[2])
        if name.startswith("tail."):
            return position * self.batch * (IN_TAIL + 2)
        return position * (self.lengths()[int(name.rpartition(".")[2])] - IN_TAIL)

    def fill(self, cache: Any, kind: str, arrays: list[mx.array]) -> None:
        if kind != "full_attention":
            cache.update(*arrays)
            return
        *own, keys, values = arrays
        for number, (row, length) in enumerate(zip(cache.rows, self.lengths(), strict=True)):
            row.keys, row.values = own[2 * number : 2 * number + 2]
            row.offset = length - IN_TAIL
        cache._firsts, cache._end, cache._tail = [row.offset for row in cache.rows], IN_TAIL, (keys, values)

    def after(self, cache: Any, kind: str) -> list[mx.array]:
        return cache.arrays()


@dataclass(frozen=True)
class OurRowsApart(OurRows):
    """The same where each row attends by itself: nothing is in a tail, and each row has a view of what it holds."""

    def states(self, kind: str) -> dict[str, mx.array]:
        if kind != "full_attention":
            return self._delta()
        rows = [self._keys(1, length) for length in self.lengths()]
        return {f"{name}.{row}": array for row, held in enumerate(rows) for name, array in held.items()}

    def touched(self, kind: str) -> dict[str, float]:
        return {}

    def least(self, name: str, array: mx.array) -> float:
        if name in ("conv", "matrix"):
            return super().least(name, array)
        return array.nbytes / array.shape[2] * (self.lengths()[int(name.rpartition(".")[2])] + 2)

    def fill(self, cache: Any, kind: str, arrays: list[mx.array]) -> None:
        if kind != "full_attention":
            cache.update(*arrays)
            return
        for number, (row, length) in enumerate(zip(cache.rows, self.lengths(), strict=True)):
            row.keys, row.values = arrays[2 * number : 2 * number + 2]
            row.offset = length


@dataclass(frozen=True)
class PeerRows(Held):
    """mlx-lm's caches of a batch, rows padded on the left up to the longest, as they are once prompts are read."""

    def make(self, model: Any) -> list[Any]:
        """One cache a layer."""
        from mlx_lm.models.cache import ArraysCache, BatchKVCache

        padding = [self.context - length for length in self.lengths()]
        single = model.make_cache()
        return [each if isinstance(each, ArraysCache) else BatchKVCache(padding) for each in single]

    def states(self, kind: str) -> dict[str, mx.array]:
        return self._keys(self.batch, self.context) if kind == "full_attention" else self._delta()

    def fill(self, cache: Any, kind: str, arrays: list[mx.array]) -> None:
        if kind == "full_attention":
            cache.keys, cache.values = arrays
            cache.offset, cache._idx = mx.array(self.lengths()), self.context
        else:
            cache[0], cache[1] = arrays
