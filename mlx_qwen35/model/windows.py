"""A few tokens on their way through layers whose experts are streamed, several layers at a time.

Knows how a layer is begun again, and how caches go back. Which experts are where is experts/'s business, and how many
layers go together that of experts/chances.py. What comes out has the bits of going layer by layer: a layer that lacked
an expert computes its feed-forward block again, from the same input, and those behind it begin anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

import mlx.core as mx

from mlx_qwen35.cache import DeltaState, KVCache, StretchedKVCache
from mlx_qwen35.cache.rows import RowsKV
from mlx_qwen35.experts.pool import ExpertPool
from mlx_qwen35.layers.around import Around
from mlx_qwen35.layers.taps import Taps

from .decoder import DecoderLayer

MOST_ROWS = 6  # whose experts every bank computes pair by pair, on any device

_GOES_BACK = (KVCache, StretchedKVCache, DeltaState, RowsKV, type(None))


def suit(states: Sequence[Any], rows: int) -> bool:
    """Whether so many tokens may go through layers with these caches in windows."""
    return rows <= MOST_ROWS and all(isinstance(state, _GOES_BACK) for state in states)


def through(
    layers: Sequence[DecoderLayer],
    states: Sequence[Any],
    pool: ExpertPool,
    x: mx.array,
    around: Around,
    taps: Taps | None = None,
) -> tuple[mx.array, mx.array | None]:
    """Within a turn: arguments as DecoderLayer has them, taps as in `Model.hidden` -> two parts of a sum."""
    start, waited = perf_counter(), pool.wait_seconds
    numbers, added, first, computed = range(len(layers)), None, 0, 0
    while first < len(layers):
        count = pool.chances.length(numbers[first:])
        computed += count
        if count == 1:
            x, added = layers[first](x, around, states[first], added)
            if taps is not None:
                taps.met(first, x, added)
            first += 1
            continue
        window = list(zip(layers[first : first + count], states[first : first + count], strict=True))
        backs = [_back(state) for _, state in window]
        met, banks = [], []
        pool.hoped = []
        for number, (layer, state) in enumerate(window, first):
            met.append(layer.met(x, around, state, added))
            x, added = layer.fed(met[-1])
            if taps is not None:
                taps.met(number, x, added)
            banks.append(getattr(layer.mlp, "experts", None))
        lacking = pool.look(x, added)
        if lacking is None:
            first += count
            continue
        place = banks.index(lacking)
        for back in backs[place + 1 :]:
            back()
        x, added = layers[first + place].fed(met[place])
        if taps is not None:
            taps.met(first + place, x, added)
        first += place + 1
    pool.chances.took(perf_counter() - start - (pool.wait_seconds - waited), computed)
    return x, added


def _back(state: Any) -> Callable[[], None]:
    """What puts a layer's cache back to what it is now."""
    if isinstance(state, DeltaState):
        conv, matrix, places = state.conv, state.matrix, state.places
        steps = None if state.steps is None else len(state.steps)

        def back() -> None:
            state.update(conv, matrix)
            state.places = places
            if steps is not None:
                del state.steps[steps:]

        return back
    if isinstance(state, RowsKV):
        offsets = state.offsets()
        return lambda: state.go_back(offsets)
    if state is None:
        return lambda: None
    offset = state.offset
    return lambda: state.rewind(offset)
