"""What a cache held at a point of its past, as a cache of its own; and caches in no more memory than they need.

Knows arrays, lengths and who may share them. Knows no tokens and not who asks. The cache that is copied from is never
touched: it may be in use, and has the same arrays, attention and bits afterwards.

    keys and values     copied into one buffer, or shared where they lie in stretches that nobody writes to any more
    delta states        shared: they are never written to
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import mlx.core as mx

from .cache import Cache, Snapshot
from .kv import STEP, KVFormat, Stretch
from .layers import DeltaState, Elsewhere, KVCache, StretchedKVCache

if TYPE_CHECKING:
    from .layers import AnyLayer

AnyKV = KVCache | StretchedKVCache


def cache_at(
    source: Cache, at: Snapshot, snapshots: Iterable[Snapshot] = (), *, room: int = 0, share: bool = False
) -> tuple[Cache, list[Snapshot]]:
    """A cache as `source` was at `at`, of which `source` still has the keys; and `snapshots`, none of which is later,
    as that cache has them. All is computed on return.

    room: make room for so many positions. share: long stretches that nobody writes to are shared, and what is copied
    becomes one that the next to come can share; otherwise everything is in one buffer, as it is in a cache that
    computed it alone. What follows the source is copied with it.
    """
    made = Cache([_layer_at(layer, at, number, room, share) for number, layer in enumerate(source.layers)])
    made.offset, made.rope_delta, made.point = at.offset, at.rope_delta, at.point
    own, mark = at.draft or (None, None)
    if own is not None and own.cache is source:
        made.draft = own.copied(made, mark, at.offset)

    def as_theirs(snapshot: Snapshot) -> Snapshot:
        follower, point = snapshot.draft or (None, None)
        draft = (made.draft, made.draft.as_copied(point)) if follower is own and made.draft is not None else None
        return replace(snapshot, rewinds=0, draft=draft)

    theirs = [as_theirs(snapshot) for snapshot in snapshots]
    mx.eval(made.arrays())
    return made, theirs


def _layer_at(layer: AnyLayer, at: Snapshot, number: int, room: int, share: bool) -> AnyLayer:
    if isinstance(layer, Elsewhere):
        return layer
    if not isinstance(layer, DeltaState):
        return copied(layer, at.offset, room=room, share=share)
    state = DeltaState()
    state.update(*at.detached().delta[number])
    return state


def copied(layer: AnyKV, length: int, *, room: int = 0, share: bool = False) -> AnyKV:
    """The first `length` positions of a layer; room, share: as in `cache_at`."""
    stretches, form = _stretches(layer, length), layer.form if isinstance(layer, StretchedKVCache) else None
    if share and length:
        return StretchedKVCache(form, _shared(stretches))
    if form is None:
        made = KVCache()
        if stretches:
            keys, values = _joined(stretches, room, rounded=True)
            (made.keys,), (made.values,), made.offset = keys, values, length
        return made
    return StretchedKVCache(form, _merged(stretches, form, room))


def _stretches(layer: AnyKV, length: int) -> list[Stretch]:
    """The first `length` positions in stretches that share the layer's arrays; frozen are those that were."""
    if isinstance(layer, KVCache):
        whole = Stretch()
        if layer.keys is not None:
            whole.keys, whole.values, whole.length = (layer.keys,), (layer.values,), layer.offset
        stretches = [whole]
    else:
        stretches = layer.stretches
    found, start = [], 0
    for stretch in stretches:
        own = min(stretch.length, length - start)
        if own > 0:
            part = stretch if own == stretch.length else stretch.cut(own)
            if part is not stretch:
                part.frozen = stretch.frozen
            found.append(part)
        start += stretch.length
    return found


def _shared(stretches: Sequence[Stretch]) -> list[Stretch]:
    """The same, frozen: those that are stay, unless less than half of their arrays would be of use."""
    found = []
    for stretch in stretches:
        if not stretch.frozen or 2 * stretch.length < stretch.keys[0].shape[2]:
            own = Stretch(stretch.form)
            (own.keys, own.values), own.length = _joined([stretch]), stretch.length
            stretch = own
            stretch.frozen = True
        found.append(stretch)
    return found


def _merged(stretches: Sequence[Stretch], form: KVFormat, room: int) -> list[Stretch]:
    """One stretch of positions as they are, and one of packed ones, as a cache of its own has them."""
    found, start = [], 0
    for kind, most in ((None, min(room, form.start)), (form, room)):
        parts = [stretch for stretch in stretches if stretch.form == kind]
        if parts:
            made = Stretch(kind)
            made.keys, made.values = _joined(parts, most - start, rounded=True)
            made.length = sum(part.length for part in parts)
            found.append(made)
            start += made.length
    return found


def _joined(stretches: Sequence[Stretch], room: int = 0, *, rounded: bool = False) -> tuple[tuple[mx.array, ...], ...]:
    """(keys, values) of stretches of one form in new arrays. rounded: with room to grow, as caches have it."""
    length = sum(stretch.length for stretch in stretches)
    capacity = -(-max(length, room) // STEP) * STEP if rounded else length
    if len(stretches) == 1:  # of one part and no space MLX may make no copy, which keeps all of a larger buffer alive
        capacity = max(capacity, length + 1)
    blocks = [stretch.block(0, stretch.length) for stretch in stretches]
    made = []
    for kind in (0, 1):
        arrays = []
        for parts in zip(*(block[kind] for block in blocks), strict=True):
            batch, heads, _, width = parts[0].shape
            space = mx.zeros((batch, heads, capacity - length, width), parts[0].dtype)
            arrays.append(mx.concatenate([*parts, space], axis=2))
        mx.eval(arrays)  # one kind of one layer at a time takes memory twice
        made.append(tuple(arrays))
    return tuple(made)


def shrunk(layer: AnyKV, length: int, shared: Container[int] = ()) -> AnyKV:
    """The first `length` positions without room behind them; the layer itself where there is hardly any.

    shared: ids of arrays that others hold too, and that therefore stay as they are.
    """
    if isinstance(layer, KVCache):
        small = layer.keys is None or layer.keys.shape[2] <= -(-length // STEP) * STEP
        if small:
            layer.rewind(length)
        return layer if small else copied(layer, length)
    found = []
    for stretch in _stretches(layer, length):
        if stretch.keys[0].shape[2] > -(-stretch.length // STEP) * STEP and id(stretch.keys[0]) not in shared:
            own = Stretch(stretch.form)
            own.keys, own.values = _joined([stretch], rounded=not stretch.frozen)
            own.length, own.frozen = stretch.length, stretch.frozen
            stretch = own
        found.append(stretch)
    return StretchedKVCache(layer.form, found)


def shrink(cache: Cache, shared: Container[int] = ()) -> None:
    """Leave a cache no room behind what it holds. It is in nobody's use; snapshots of it stay good."""
    for number, layer in enumerate(cache.layers):
        if not isinstance(layer, (DeltaState, Elsewhere)):
            cache.layers[number] = shrunk(layer, cache.offset, shared)
    if cache.draft is not None:
        cache.draft.shrink(shared)


def freeze(cache: Cache) -> None:
    """Have keys and values of a cache, which is in nobody's use, in stretches that others can share."""
    for number, layer in enumerate(cache.layers):
        if not isinstance(layer, DeltaState):
            cache.layers[number], _ = layer.branched()


def slack(cache: Cache) -> int:
    """Bytes of the room behind what the layers of a cache hold."""
    free = 0
    for layer in cache.layers:
        for stretch in [] if isinstance(layer, DeltaState) else _stretches(layer, layer.offset):
            for array in stretch.arrays():
                free += array.nbytes // array.shape[2] * (array.shape[2] - stretch.length)
    return free
