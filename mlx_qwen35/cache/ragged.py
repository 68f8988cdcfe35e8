"""The caches of several sequences in one call with a piece of each, of unequal lengths and at unequal offsets.

Knows arrays, lengths, and which token is whose. Knows no layers, no weights and not who asks.

The pieces lie one behind the other as if they were one sequence, so that what looks at each token by itself computes
nothing but tokens. What mixes tokens takes the rows apart: attention one by one, each over its own cache; a delta layer
in blocks of rows of similar length. A shorter one has zeros before its window, which leave its state as it is:

    call         a a a a a b b b c c        [1, N, .]
    attention    a a a a a | b b b | c c    each with its own keys and values
    block        w w a a a a a              [rows, K-1 + T, .]; w: the last inputs before the piece
                 . . w w b b b
                 . . . w w c c
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import mlx.core as mx
import numpy as np

from .cache import Cache
from .layers import DeltaState, KVCache, StretchedKVCache

_FILLED = 0.25  # of a block that may be zeros
_FEW = 64  # zeros that are never worth another block


class Block:
    """Rows that a delta layer takes together. rows: their numbers in the call; lengths, starts: of their pieces."""

    def __init__(self, rows: Sequence[int], lengths: Sequence[int], starts: Sequence[int]) -> None:
        self.rows, self.lengths, self.length = list(rows), list(lengths), max(lengths)
        place, behind = np.arange(self.length), self.length - np.array(lengths)[:, None]
        self._starts, present = starts, place >= behind
        # Which token stands in each place [B, T]; where none does, one that exists.
        self.tokens = mx.array(np.where(present, place - behind + np.array(starts)[:, None], 0).astype(np.int32))
        self.present = None if present.all() else mx.array(present)  # [B, T]; None: every place has a token
        self._places: dict[tuple[int, int], mx.array] = {}

    def windowed(self, x: mx.array, windows: Sequence[mx.array | None], before: int) -> mx.array:
        """x [1, N, C] of the call and the window [1, before, C] of each row (None: zeros) -> [B, before + T, C]."""
        zeros = mx.zeros((1, before + 1, x.shape[-1]), x.dtype)
        held = [zeros[:, 1:] if window is None else window for window in windows]
        source = mx.concatenate([x, *held, zeros[:, :1]], axis=1)[0]
        key = x.shape[1], before
        if key not in self._places:
            self._places[key] = self._of_source(*key)
        return source[self._places[key]]

    def _of_source(self, tokens: int, before: int) -> mx.array:
        """Where the values of `windowed` stand: the tokens of the call, then the windows, then zeros."""
        found = np.full((len(self.rows), before + self.length), tokens + before * len(self.rows), np.int32)
        for row, (length, start) in enumerate(zip(self.lengths, self._starts, strict=True)):
            first = self.length - length
            found[row, first : first + before] = tokens + row * before + np.arange(before)
            found[row, first + before :] = start + np.arange(length)
        return mx.array(found)


class RaggedKV:
    """Keys and values of one attention layer: `parts` has each row's own cache, and which tokens of the call are its
    piece."""

    def __init__(self, rows: Sequence[KVCache | StretchedKVCache], spans: Sequence[slice]) -> None:
        self.parts = list(zip(rows, spans, strict=True))


class RaggedDelta:
    """States of one delta layer, which each row's own cache has before the call and after it."""

    def __init__(self, rows: Sequence[DeltaState], blocks: Sequence[Block], order: mx.array | None) -> None:
        self._rows, self.blocks, self._order = rows, blocks, order

    def of(self, block: Block) -> DeltaState:
        """The states of its rows as those of a batch: `matrix` [B, Hv, Dv, Dk], and `steps` and `places` for all of
        them where one keeps steps. The windows are for `windows`."""
        rows = [self._rows[number] for number in block.rows]
        made, shown = DeltaState(), next((row.matrix for row in rows if row.matrix is not None), None)
        if shown is not None:
            matrices = [mx.zeros_like(shown) if row.matrix is None else row.matrix for row in rows]
            made.matrix = matrices[0] if len(rows) == 1 else mx.concatenate(matrices)
        places = {
            block.length - length + place
            for row, length in zip(rows, block.lengths, strict=True)
            if row.steps is not None
            for place in row.ends(length)
        }
        if places - {block.length}:
            made.steps, made.places = [], sorted(places - {block.length})
        return made

    def windows(self, block: Block) -> list[mx.array | None]:
        """The last inputs of the convolution of each of its rows."""
        return [self._rows[number].conv for number in block.rows]

    def take(self, block: Block, windowed: mx.array, matrix: mx.array, ends: Sequence[int]) -> None:
        """Its rows have what came of the call: `windowed` [B, K-1 + T, C], matrix [B, Hv, Dv, Dk] or, with more than
        the last of `ends`, [B, ends, Hv, Dv, Dk]."""
        matrices = [matrix] if len(ends) == 1 else [matrix[:, n] for n in range(len(ends))]
        before = windowed.shape[1] - block.length

        def states(row: int, end: int) -> tuple[mx.array, mx.array]:
            one = slice(row, row + 1)
            return windowed[one, end : end + before], matrices[ends.index(end)][one]

        for row, (number, length) in enumerate(zip(block.rows, block.lengths, strict=True)):
            own = self._rows[number]
            if own.steps is None:
                own.update(*map(mx.contiguous, states(row, block.length)))  # a slice would keep all rows alive
                continue
            found = [states(row, block.length - length + end) for end in own.ends(length)]
            convs, own_matrices = zip(*found, strict=True)
            own.update_each([mx.contiguous(conv) for conv in convs], own_matrices, length)

    def in_order(self, made: Sequence[mx.array]) -> mx.array:
        """What came of each block, [B, T, C] each -> the tokens of the call [1, N, C]."""
        flat = [one.reshape(-1, one.shape[-1]) for one in made]
        joined = flat[0] if len(flat) == 1 else mx.concatenate(flat)
        return (joined if self._order is None else joined[self._order])[None]


class RaggedCache:
    """Caches of one model that take a piece each in one call; lengths: of the pieces, in their order. Good for that
    call. Each stands for one sequence without padding."""

    rope_delta = 0
    left_padding = None

    def __init__(self, caches: Sequence[Cache], lengths: Sequence[int]) -> None:
        self.rows, self.lengths = list(caches), list(lengths)
        ends = [*accumulate(lengths, initial=0)]
        self.spans = [slice(start, end) for start, end in pairwise(ends)]
        blocks = [Block(rows, [lengths[n] for n in rows], [ends[n] for n in rows]) for rows in grouped(lengths)]
        order = _order(blocks, ends)
        self.layers: list[RaggedKV | RaggedDelta] = [
            RaggedDelta(kind, blocks, order) if isinstance(kind[0], DeltaState) else RaggedKV(kind, self.spans)
            for kind in zip(*(cache.layers for cache in caches), strict=True)
        ]

    def masks(self, length: int) -> tuple[None, None]:
        """As `Cache.masks`: there is no padding."""
        return None, None

    def positions(self, length: int) -> mx.array:
        """As `Cache.positions`: [1, length]."""
        starts = (cache.offset + cache.rope_delta for cache in self.rows)
        each = [np.arange(start, start + own) for start, own in zip(starts, self.lengths, strict=True)]
        return mx.array(np.concatenate(each).astype(np.int32))[None]

    def advance(self, length: int) -> None:
        """The layers have taken the pieces."""
        for cache, own in zip(self.rows, self.lengths, strict=True):
            cache.offset += own


def grouped(lengths: Sequence[int]) -> list[list[int]]:
    """Numbers of rows of these lengths, in groups that are worth filling up to the longest of each."""
    groups: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if groups:
            together = [*groups[-1], row]
            all_ = lengths[together[0]] * len(together)
            zeros = all_ - sum(lengths[number] for number in together)
            if zeros <= max(_FEW, _FILLED * all_):
                groups[-1] = together
                continue
        groups.append([row])
    return groups


def _order(blocks: Sequence[Block], ends: Sequence[int]) -> mx.array | None:
    """Where each token of the call stands in the places of all blocks; None: in their order."""
    order, first = np.empty(ends[-1], np.int32), 0
    for block in blocks:
        for row, (number, length) in enumerate(zip(block.rows, block.lengths, strict=True)):
            place = first + (row + 1) * block.length
            order[ends[number] : ends[number + 1]] = np.arange(place - length, place)
        first += len(block.rows) * block.length
    return None if len(order) == first and (order == np.arange(first)).all() else mx.array(order)
