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
from typing import NamedTuple

import mlx.core as mx

from mlx_qwen35.kernels.ragged_attention.pieces import Arrays, Piece, Pieces, Plan, planned

from .cache import Cache
from .layers import DeltaState, KVCache, StretchedKVCache

TAIL = 64  # slots: so many steps go by before the rows' own caches are written


class RowsKV:
    """Keys and values of one attention layer. `rows` has each row's own cache of it; on a GPU the newest positions of
    all rows are in a tail beside these, one slot a step, until a row's own cache is wanted whole or the tail is full:

        own    row 0 | ..............   row 1 | ....   row 2 | .........
        tail   row 0 | . . . . x        row 1 | . . . . x        row 2 |     . . x           [B, Hkv, TAIL, D]
                                                                             it joined later

    So a step writes once for all rows, and joining and leaving moves no other row's positions.
    """

    def __init__(self, rows: Sequence[KVCache | StretchedKVCache]) -> None:
        self.rows = list(rows)
        self._tail: Arrays | None = None
        self._end = 0  # slots of it that are taken
        # Of each row the position that stands in the first slot of the tail, or would, had the row been there: what it
        # has of the tail begins where its own cache ends.
        self._firsts: list[int] = []
        self._own: _Own | None = None

    def arrays(self) -> list[mx.array]:
        own = [array for row in self.rows for array in row.arrays()]
        return own if self._tail is None else [*own, *self._tail]

    def take(self, keys: mx.array, values: mx.array) -> Taken | None:
        """Put one position of each row, keys and values [B, Hkv, 1, D], into the tail; -> all that rows have.

        -> None, and nothing done, where rows cannot be read together: a single one, packed keys, too many stretches.
        """
        if len(self.rows) < 2:
            return None
        if self._end == TAIL:
            self.settle(range(len(self.rows)))
        offsets = [row.offset for row in self.rows]
        if not self._end:
            self._firsts = offsets
        if self._own is None or self._own.offsets != offsets:
            self._own = _Own.of(self.rows, offsets)
        own, end = self._own, self._end + 1
        if own.pieces is None or own.dtypes - {keys.dtype}:
            return None
        batch, heads, _, dim = keys.shape
        tail = len(own.arrays)
        starts = [offset - first for offset, first in zip(offsets, self._firsts, strict=True)]
        pieces = tuple(
            (*held, Piece(tail, row, start, end - start))
            for row, (held, start) in enumerate(zip(own.pieces, starts, strict=True))
        )
        plan = planned(pieces, (*own.capacities, TAIL), heads)
        if plan is None:
            return None
        if self._tail is None:
            self._tail = tuple(mx.zeros((batch, heads, TAIL, dim), keys.dtype) for _ in range(2))
        for array, new in zip(self._tail, (keys, values), strict=True):
            array[:, :, self._end : end] = new
        self._end = end
        return Taken([*own.arrays, self._tail], pieces, plan)

    def settle(self, rows: Iterable[int]) -> None:
        """The own caches of these rows have all of their positions."""
        for row in rows:
            own = self.rows[row]
            start = own.offset - self._firsts[row] if self._end else 0
            if start < self._end:
                own.update(*(array[row : row + 1, :, start : self._end] for array in self._tail))
        self._own = None
        if all(own.offset - first >= self._end for own, first in zip(self.rows, self._firsts, strict=False)):
            self._end = 0

    def alone(self) -> Sequence[KVCache | StretchedKVCache]:
        """The rows' own caches, with all of their positions, for rows that go on each by itself."""
        if self._tail is not None:
            self.settle(range(len(self.rows)))
            self._tail = None
        return self.rows

    def offsets(self) -> list[int]:
        """How many positions each row holds."""
        if self._end:
            return [first + self._end for first in self._firsts]
        return [row.offset for row in self.rows]

    def go_back(self, offsets: Sequence[int]) -> None:
        """Each row holds so many positions again."""
        self._own = None
        for own, offset in zip(self.rows, offsets, strict=True):
            if own.offset > offset:
                own.rewind(offset)
        if self._end:
            self._end = max(0, min(self._end, offsets[0] - self._firsts[0]))  # the same for every row

    def stay(self, rows: Sequence[int], taken: mx.array) -> None:
        """Only these rows are left; taken: the same as an array. The others have been settled."""
        self.rows = [self.rows[row] for row in rows]
        self._firsts = [self._firsts[row] for row in rows] if self._firsts else []
        self._own = None
        if not self._end or not rows:
            self._tail, self._end = None, 0
        else:
            self._tail = tuple(array[taken] for array in self._tail)

    def join(self, rows: Sequence[KVCache | StretchedKVCache]) -> None:
        """These rows go on behind those that are here."""
        self.rows += rows
        self._own = None
        if not self._end:
            self._tail = None
        else:
            self._firsts += [row.offset - self._end for row in rows]
            room = (len(rows), *self._tail[0].shape[1:])
            self._tail = tuple(mx.concatenate([array, mx.zeros(room, array.dtype)]) for array in self._tail)


class Taken(NamedTuple):
    """What kernels/ragged_attention wants to know of the rows of a layer."""

    arrays: list[Arrays]
    pieces: tuple[Pieces, ...]
    plan: Plan


@dataclass(frozen=True)
class _Own:
    """What the rows' own caches hold, at these offsets: arrays that several rows share are there once.

    pieces: of each row; None where some are packed.
    """

    offsets: list[int]
    arrays: list[Arrays]
    capacities: tuple[int, ...]
    dtypes: set[mx.Dtype]
    pieces: tuple[Pieces, ...] | None

    @classmethod
    def of(cls, rows: Sequence[KVCache | StretchedKVCache], offsets: list[int]) -> _Own:
        arrays: dict[tuple[int, int], Arrays] = {}
        pieces = []
        for row in rows:
            parts = [((row.keys,), (row.values,), row.offset)] if isinstance(row, KVCache) else _plain(row)
            if parts is None:
                return cls(offsets, [], (), set(), None)
            held = []
            for (keys,), (values,), length in parts:
                if length:
                    arrays.setdefault((id(keys), id(values)), (keys, values))
                    number = list(arrays).index((id(keys), id(values)))
                    held.append(Piece(number, 0, 0, length))
            pieces.append(tuple(held))
        pairs = list(arrays.values())
        dtypes = {array.dtype for pair in pairs for array in pair}
        return cls(offsets, pairs, tuple(keys.shape[2] for keys, _ in pairs), dtypes, tuple(pieces))


def _plain(row: StretchedKVCache) -> list[tuple[tuple[mx.array, ...], tuple[mx.array, ...], int]] | None:
    """Keys, values and lengths of its stretches; None where they are packed, or will be."""
    if row.form is not None or any(stretch.form is not None for stretch in row.stretches):
        return None
    return [(stretch.keys, stretch.values, stretch.length) for stretch in row.stretches]


@dataclass(frozen=True)
class RowsMark:
    """A point to go back to: how much each row held, and the stacked states of that time."""

    offsets: tuple[int, ...]
    states: tuple[tuple[mx.array, mx.array] | None, ...]


class RowsCache:
    """Caches of one model that go on together. Each stands for one sequence, and holds one token or more.

    Their delta states, and on a GPU their newest keys and values, are here until `settle` or `leave` puts them back.
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
        starts = [cache.offset + cache.rope_delta for cache in self.rows]
        return mx.array([[start + at for at in range(length)] for start in starts])

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
                layer.go_back(mark.offsets)
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
            else:
                layer.settle(rows)
        mx.eval([array for row in rows for array in self.rows[row].arrays()])

    def leave(self, rows: Collection[int]) -> None:
        """These rows go on alone, with whole caches; the others stay."""
        self.settle(rows)
        stay = [row for row in range(len(self.rows)) if row not in rows]
        self.rows = [self.rows[row] for row in stay]
        taken = mx.array(stay, mx.int32)
        for layer in self.layers:
            if isinstance(layer, RowsKV):
                layer.stay(stay, taken)
            elif stay:
                layer.update(layer.conv[taken], layer.matrix[taken])

    def join(self, caches: Sequence[Cache]) -> None:
        """These caches go on with the rows that are here, behind them."""
        self.rows += caches
        for number, layer in enumerate(self.layers):
            theirs = [cache.layers[number] for cache in caches]
            if isinstance(layer, RowsKV):
                layer.join(theirs)
            else:
                both = _stacked([layer, *theirs])
                layer.update(both.conv, both.matrix)


def _stacked(states: Sequence[DeltaState]) -> DeltaState:
    """One with the rows of all."""
    made = DeltaState()
    made.update(mx.concatenate([state.conv for state in states]), mx.concatenate([state.matrix for state in states]))
    return made
