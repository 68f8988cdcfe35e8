"""The caches of several sequences side by side, for calls with one token of each.

Knows arrays and lengths. Knows no layers, no tokens and not who asks.

Nothing is padded. The states of a delta layer have one size whatever a row has seen, so they are stacked while rows go
on together; keys and values are of unequal length, and stay each row's own:

    delta layer        conv [B, K-1, C], matrix [B, Hv, Dv, Dk]          one array for all rows
    attention layer    row 0 | ..............   row 1 | ....   row 2 | .........    each in its own cache
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from .cache import Cache, DeltaState, KVCache, StretchedKVCache


class RowsKV:
    """Keys and values of one attention layer: `rows` has each row's own cache of it."""

    def __init__(self, rows: Sequence[KVCache | StretchedKVCache]) -> None:
        self.rows = list(rows)

    def arrays(self) -> list[mx.array]:
        return [array for row in self.rows for array in row.arrays()]


@dataclass(frozen=True)
class RowsMark:
    """A point to go back to: how much each row held, and the stacked states of that time."""

    offsets: tuple[int, ...]
    states: tuple[tuple[mx.array, mx.array] | None, ...]


class RowsCache:
    """Caches of one model that go on together. Each stands for one sequence, and holds one token or more.

    The rows' own caches keep their keys and values up to date; their delta states are here until `settle` or `leave`
    puts them back.
    """

    rope_delta = 0
    left_padding = None

    def __init__(self, caches: Sequence[Cache]) -> None:
        self.rows = list(caches)
        kinds = zip(*(cache.layers for cache in caches), strict=True)
        self.layers: list[RowsKV | DeltaState] = [
            _stacked(kind) if isinstance(kind[0], DeltaState) else RowsKV(kind) for kind in kinds
        ]

    def __len__(self) -> int:
        return len(self.rows)

    def masks(self, length: int) -> tuple[None, None]:
        """As `Cache.masks`: there is no padding."""
        return None, None

    def positions(self, length: int) -> mx.array:
        """As `Cache.positions`: [B, length]."""
        starts = mx.array([cache.offset + cache.rope_delta for cache in self.rows])
        return starts[:, None] + mx.arange(length)

    def advance(self, length: int) -> None:
        """The layers have taken `length` more positions of each row."""
        for cache in self.rows:
            cache.offset += length

    def arrays(self) -> list[mx.array]:
        """Every array held, for mx.eval."""
        return [array for layer in self.layers for array in layer.arrays()]

    def mark(self) -> RowsMark:
        """The present point; costs nothing but the states of this moment."""
        states = tuple((c.conv, c.matrix) if isinstance(c, DeltaState) else None for c in self.layers)
        return RowsMark(tuple(cache.offset for cache in self.rows), states)

    def go_back(self, mark: RowsMark) -> None:
        """To a mark of the same rows, as if what came later had never been computed."""
        for layer, state in zip(self.layers, mark.states, strict=True):
            if state is not None:
                layer.update(*state)
            else:
                for row, offset in zip(layer.rows, mark.offsets, strict=True):
                    row.rewind(offset)
        for cache, offset in zip(self.rows, mark.offsets, strict=True):
            cache.offset = offset

    def settle(self, rows: Iterable[int]) -> None:
        """The caches of these rows are whole: they have their states, which keep no other row's alive."""
        rows = list(rows)
        for number, layer in enumerate(self.layers):
            if isinstance(layer, DeltaState):
                for row in rows:
                    own = (mx.contiguous(state[row : row + 1]) for state in (layer.conv, layer.matrix))
                    self.rows[row].layers[number].update(*own)
        mx.eval([array for row in rows for array in self.rows[row].arrays()])

    def leave(self, rows: Collection[int]) -> None:
        """These rows go on alone, with whole caches; the others stay."""
        self.settle(rows)
        stay = [row for row in range(len(self.rows)) if row not in rows]
        self.rows = [self.rows[row] for row in stay]
        taken = mx.array(stay, mx.int32)
        for layer in self.layers:
            if isinstance(layer, RowsKV):
                layer.rows = [layer.rows[row] for row in stay]
            elif stay:
                layer.update(layer.conv[taken], layer.matrix[taken])

    def join(self, caches: Sequence[Cache]) -> None:
        """These caches go on with the rows that are here, behind them."""
        self.rows += caches
        for number, layer in enumerate(self.layers):
            theirs = [cache.layers[number] for cache in caches]
            if isinstance(layer, RowsKV):
                layer.rows += theirs
            else:
                both = _stacked([layer, *theirs])
                layer.update(both.conv, both.matrix)


def _stacked(states: Sequence[DeltaState]) -> DeltaState:
    """One with the rows of all."""
    made = DeltaState()
    made.update(mx.concatenate([state.conv for state in states]), mx.concatenate([state.matrix for state in states]))
    return made
