"""What a model remembers between calls: of each layer its keys and values or its delta state, and how far it is.

Knows how to go back and how to branch, and the face of what follows a cache: a drafter has it
(speculative/drafters.py). Knows no tokens and no sampling.

    Cache.layers   one KVCache, StretchedKVCache or DeltaState per layer, in the order of the layers
    Cache.offset   positions seen so far, padding included: the same for all rows of a batch

A Cache is also a sequence of its layers, and these have the methods of mlx-lm's caches, so that mlx-lm's tools can use
it (layers.py).
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from .layers import AnyLayer, DeltaState, State


class Follower(Protocol):
    """What is computed beside a cache and goes back with it."""

    cache: Cache  # the one that it follows
    taps: Sequence[int]  # the layers of the model whose outputs it reads; none: it reads the model's own

    def mark(self) -> Any:
        """Its present state, at no cost."""
        ...

    def go_back(self, mark: Any, offset: int) -> None:
        """To a mark of a time when the cache held `offset` tokens or more, as it was when it held `offset`."""
        ...

    def branched(self, cache: Cache) -> Follower:
        """One that follows `cache`, a branch of its own, from the same past; marks are good for both."""
        ...

    def copied(self, cache: Cache, mark: Any, offset: int) -> Follower:
        """One that follows `cache`, with what this one had at `mark`, gone back to `offset` as in `go_back`, in arrays
        of its own; this one is not touched."""
        ...

    def as_copied(self, mark: Any) -> Any:
        """A mark of an earlier time, as one that was `copied` has it."""
        ...

    def shrink(self, shared: Container[int]) -> None:
        """Leave no room behind what is held; shared: ids of arrays that others hold too, which stay."""
        ...

    def arrays(self) -> list[mx.array]: ...

    def marked(self, mark: Any) -> list[mx.array]:
        """What a mark keeps alive beside `arrays`."""
        ...

    def detach(self) -> None:
        """As `Cache.detach`."""
        ...


class _LateStates:
    """Delta states of a snapshot which are computed, once more, when they are asked for."""

    def __init__(self, layers: Sequence[AnyLayer], count: int) -> None:
        self._again = [layer.again if isinstance(layer, DeltaState) else None for layer in layers]
        self._count = count
        self._made: tuple[State | None, ...] | None = None

    def __iter__(self) -> Iterator[State | None]:
        if self._made is None:
            self._made = tuple(None if again is None else again(self._count) for again in self._again)
        return iter(self._made)

    def __getitem__(self, layer: int) -> State | None:
        return [*self][layer]


@dataclass(frozen=True)
class Snapshot:
    """A point in a Cache's past to go back to. Holds the delta states; keys and values stay where they are."""

    offset: int
    rope_delta: int | Sequence[int]
    delta: tuple[State | None, ...] | _LateStates
    rewinds: int  # how often the cache had gone back when this was taken
    draft: tuple[Follower, Any] | None = None  # what followed the cache, and where that was
    parts: bool = False  # whether the states are parts of arrays with those after other tokens
    point: Any = None  # as in Cache

    def arrays(self) -> list[mx.array]:
        """What it keeps alive beside the cache, and beside what follows that."""
        states = [array for pair in self.delta if pair for array in pair if array is not None]
        return states if self.draft is None else states + self.draft[0].marked(self.draft[1])

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays())

    def detached(self) -> Snapshot:
        """The same with states that keep nothing else alive."""
        if not self.parts:
            return self
        # mx.contiguous copies a part of a larger array, but for a few KB.
        delta = tuple(pair and tuple(a if a is None else mx.contiguous(a) for a in pair) for pair in self.delta)
        mx.eval(delta)
        return replace(self, delta=delta, parts=False)


class Cache:
    """The memory of a batch of sequences in one model.

    left_padding: how many positions at the start of each row are padding, [B] int32, or None where no row has any.
    rope_delta: rotary position minus cache position (padding not counted) of the tokens to come, which images shift:
    one number for all rows, or one a row.
    draft: what a drafter remembers of these tokens (speculative/drafters.py), or None; it goes back with the cache.
    point: what other ranks call this past (parallel/points.py), or None. each: the offsets of `each_step`, [] for all,
    None outside of it; points: what they call those pasts.
    """

    def __init__(self, layers: Sequence[AnyLayer], *, left_padding: Sequence[int] | None = None) -> None:
        self.layers = list(layers)
        self.offset = 0
        self.rope_delta: int | Sequence[int] = 0
        self.longest_padding = max(left_padding, default=0) if left_padding is not None else 0
        self.left_padding = mx.array(list(left_padding), mx.int32) if self.longest_padding else None
        self.draft: Follower | None = None
        self.point: Any = None
        self.each: list[int] | None = None
        self.points: dict[int, Any] = {}
        self._rewinds: list[int] = []  # offsets that restore() went back to, in order
        self._parts = False  # as in Snapshot

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, layer: int) -> AnyLayer:
        return self.layers[layer]

    def __iter__(self) -> Iterator[AnyLayer]:
        return iter(self.layers)

    def __bool__(self) -> bool:
        """A cache, also where it holds nothing yet."""
        return True

    def masks(self, length: int) -> tuple[mx.array | None, mx.array | None]:
        """Which positions are tokens and not padding: of all up to the last of the next `length`, [B, S], and of those
        `length` alone, [B, length]. None where all are."""
        if self.left_padding is None:
            return None, None
        readable = mx.arange(self.offset + length) >= self.left_padding[:, None]
        return readable, readable[:, self.offset :] if self.offset < self.longest_padding else None

    def positions(self, length: int) -> mx.array:
        """Where the next `length` tokens stand if they are text: one position a token, [B or 1, length]."""
        return text_positions(self, length)

    def advance(self, length: int) -> None:
        """The layers have taken `length` more positions."""
        self.offset += length

    def reserve(self, positions: int) -> None:
        """Make room for so many positions in all when room is made next: without a copy at each step on the way."""
        for layer in self.layers:
            if not isinstance(layer, DeltaState):
                layer.reserved = positions

    def branch(self, snapshots: Iterable[Snapshot] = ()) -> tuple[Cache, list[Snapshot]]:
        """A second cache with the same past, keys and values of which both share from now on, and `snapshots` as it has
        them: they go back to the drafter that it had there. Without that, snapshots of one are good for the other.

        Each goes on by itself; attention over what is shared is computed in blocks (layers/stretches.py).
        """
        pairs = [layer.branched() for layer in self.layers]
        other = Cache([theirs for _, theirs in pairs])
        other.offset, other.rope_delta = self.offset, self.rope_delta
        other.longest_padding, other.left_padding = self.longest_padding, self.left_padding
        other._rewinds, other._parts, other.point = list(self._rewinds), self._parts, self._kept_point()
        self.layers = [own for own, _ in pairs]
        snapshots = list(snapshots)
        followers = {snapshot.draft[0] for snapshot in snapshots if snapshot.draft} | {self.draft}
        theirs = {own: own.branched(other) for own in followers if own is not None and own.cache is self}
        other.draft = theirs.get(self.draft)

        def as_theirs(snapshot: Snapshot) -> Snapshot:
            own, mark = snapshot.draft or (None, None)
            return replace(snapshot, draft=(theirs[own], mark) if own in theirs else None)

        return other, [as_theirs(snapshot) for snapshot in snapshots]

    def snapshot(self) -> Snapshot:
        """Remember this point; costs no memory but the delta states of this moment."""
        delta = tuple((c.conv, c.matrix) if isinstance(c, DeltaState) else None for c in self.layers)
        return Snapshot(
            self.offset, self.rope_delta, delta, len(self._rewinds), self.draft_mark(), self._parts, self._kept_point()
        )

    def _kept_point(self) -> Any:
        """The point, of which something else than this cache knows from now on."""
        if self.point is not None:
            self.point.kept = True
        return self.point

    def draft_mark(self) -> tuple[Follower, Any] | None:
        """What follows the cache, and where that is now."""
        return None if self.draft is None else (self.draft, self.draft.mark())

    @contextmanager
    def each_step(self, offsets: Sequence[int] | None = None, *, late: bool = False) -> Iterator[list[Snapshot]]:
        """Calls inside leave a snapshot of the cache after each of their tokens, in the list, when all is done; or only
        where the cache holds so many tokens (ascending, none of which it holds now; without padding).

        Going back to one of them costs nothing: the state after each token was on the way to that after the last. Each
        keeps all of them alive: `detach` where one is to stay. All have the rope_delta of the end.
        late: there is one call, and states after its tokens are not kept but what went into them: going back runs the
        recurrence once more, as far as that, with the same bits. A state of the 27B takes 147 MiB.
        """
        deltas = [layer for layer in self.layers if isinstance(layer, DeltaState)]
        start, snapshots = self.offset, []
        for layer in deltas:
            layer.steps, layer.late = [], late
            layer.places = None if offsets is None else [offset - start for offset in offsets]
        self._parts, self.each = True, [] if offsets is None else list(offsets)
        try:
            yield snapshots
            rewinds, draft = len(self._rewinds), self.draft_mark()
            held = range(start + 1, self.offset + 1)
            for number, offset in enumerate(held if offsets is None else (at for at in offsets if at in held)):
                if any(layer.again is not None for layer in deltas):
                    delta = _LateStates(self.layers, offset - start)
                else:
                    delta = tuple(c.steps[number] if isinstance(c, DeltaState) else None for c in self.layers)
                point = self.points.get(offset)
                snapshots.append(Snapshot(offset, self.rope_delta, delta, rewinds, draft, True, point))
        finally:
            self.points, self.each = {}, None
            for layer in deltas:
                layer.steps = layer.places = layer.again = None
                layer.late = False

    def step_again(self) -> None:
        """Inside `each_step`, after going back to where it began: what was left by then does not count."""
        for layer in self.layers:
            if isinstance(layer, DeltaState) and layer.steps is not None:
                layer.steps, layer.again = [], None
                layer.places = [offset - self.offset for offset in self.each] if self.each else None

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to `snapshot`, as if what came later had never been computed.

        Raises ValueError if the cache has since gone back to before that point: its keys may be overwritten.
        """
        furthest_back = min(self._rewinds[snapshot.rewinds :], default=self.offset)
        if furthest_back < snapshot.offset:
            raise ValueError(
                f"this snapshot of {snapshot.offset} positions is gone: the cache went back to {furthest_back}, "
                "and other keys were written since; take a new snapshot"
            )
        for layer, delta in zip(self.layers, snapshot.delta, strict=True):
            if isinstance(layer, DeltaState):
                layer.update(*delta)
            else:
                layer.rewind(snapshot.offset)
        self.offset, self.rope_delta, self._parts = snapshot.offset, snapshot.rope_delta, snapshot.parts
        self.point = snapshot.point
        self.draft, mark = snapshot.draft or (None, None)
        if self.draft is not None and self.draft.cache is self:
            self.draft.go_back(mark, snapshot.offset)
        else:  # it follows another cache, which this one is a branch of
            self.draft = None
        self._rewinds.append(snapshot.offset)

    def detach(self) -> None:
        """Keep no states alive but those of this moment, which calls inside `each_step` made beside others."""
        for layer, pair in zip(self.layers, self.snapshot().detached().delta, strict=True):
            if pair is not None:
                layer.update(*pair)
        self._parts = False
        if self.draft is not None:
            self.draft.detach()

    def arrays(self) -> list[mx.array]:
        """Every array held, for mx.eval."""
        own = [a for layer in self.layers for a in layer.arrays()]
        return own if self.draft is None else own + self.draft.arrays()

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in self.arrays())


def text_positions(cache: Any, length: int) -> mx.array:
    """`Cache.positions` of anything with offset, rope_delta and left_padding."""
    delta = cache.rope_delta
    starts = np.array([delta] if isinstance(delta, int) else delta)[:, None] + cache.offset
    positions = mx.array((starts + np.arange(length)).astype(np.int32))  # no launch and no operation of a step
    if cache.left_padding is not None:
        positions = mx.maximum(positions - cache.left_padding[:, None], 0)
    return positions
