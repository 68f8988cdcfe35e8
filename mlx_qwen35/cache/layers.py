"""What each layer remembers between calls: keys and values, in one piece or in stretches, or a delta state.

Knows arrays, lengths, how to go back and how to branch. Knows no layers and no whole cache. All have the methods of
mlx-lm's caches: `state`, `size`, `empty`, `nbytes`, and `merge`, from which on they batch with caches of their own
(listed.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from .kv import KVFormat, Stretch, grown


class _Layer:
    """What mlx-lm asks of a cache of any kind."""

    def arrays(self) -> list[mx.array]:
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in self.arrays())

    def empty(self) -> bool:
        return not self.arrays()

    def is_trimmable(self) -> bool:
        """Never: one layer alone cannot go back. `Cache.restore` does."""
        return False

    @property
    def to_quantized(self) -> Any:
        """mlx-lm looks for this where its kv_bits is given, and only there; a cache without it would go on as it is."""
        raise ValueError("mlx-lm's kv_bits does not quantize this package's caches: leave kv_bits out")


class KVCache(_Layer):
    """Keys and values [B, Hkv, capacity, D] of one attention layer; the first `offset` positions are held."""

    def __init__(self) -> None:
        self.keys: mx.array | None = None
        self.values: mx.array | None = None
        self.offset = 0
        self.reserved = 0  # positions to make room for, when room is made

    def update(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append keys and values [B, Hkv, T, D]; returns all that are held, [B, Hkv, offset, D] each."""
        start, stop = self.offset, self.offset + keys.shape[2]
        if self.keys is None or stop > self.keys.shape[2]:
            # In one assignment: an interrupt between two would leave buffers of unequal length.
            self.keys, self.values = (
                grown(self.keys, keys, start, stop, self.reserved),
                grown(self.values, values, start, stop, self.reserved),
            )
        self.keys[..., start:stop, :] = keys
        self.values[..., start:stop, :] = values
        self.offset = stop
        return self.keys[..., :stop, :], self.values[..., :stop, :]

    def rewind(self, offset: int) -> None:
        """Forget all positions from `offset` on."""
        self.offset = offset

    def branched(self) -> tuple[StretchedKVCache, StretchedKVCache]:
        """Two caches with what is held here, which both share; this one is not to be used any more."""
        stretch = Stretch()
        if self.keys is not None:
            stretch.keys, stretch.values, stretch.length = (self.keys,), (self.values,), self.offset
        return StretchedKVCache(stretches=[stretch] if self.offset else []).branched()

    def arrays(self) -> list[mx.array]:
        return [] if self.keys is None else [self.keys, self.values]

    @property
    def state(self) -> tuple[mx.array | None, mx.array | None, int]:
        return self.keys, self.values, self.offset

    def size(self) -> int:
        return self.offset

    @staticmethod
    def merge(caches: Sequence[KVCache]) -> Any:
        """mlx-lm's cache of a batch, with a row from each."""
        from mlx_lm.models.cache import BatchKVCache

        return BatchKVCache.merge(caches)


class StretchedKVCache(_Layer):
    """Keys and values of one attention layer in stretches: some that other caches share, and one of its own at the end.

    form: how positions from form.start on are kept; None: as they are.

        after a branch     | shared by both .......... | own, grows
        form.start = 5     | as they are, 5 | packed, grows
    """

    def __init__(self, form: KVFormat | None = None, stretches: Sequence[Stretch] = ()) -> None:
        self.form = form
        self.stretches = list(stretches)
        self.reserved = 0  # positions to make room for, when room is made

    @property
    def offset(self) -> int:
        return sum(stretch.length for stretch in self.stretches)

    def update(self, keys: mx.array, values: mx.array) -> list[Stretch]:
        """Append keys and values [B, Hkv, T, D]; returns all stretches, in their order."""
        plain = keys.shape[2] if self.form is None else min(max(self.form.start - self.offset, 0), keys.shape[2])
        for form, part in ((None, slice(0, plain)), (self.form, slice(plain, keys.shape[2]))):
            if part.start < part.stop:
                self._append(form, keys[..., part, :], values[..., part, :])
        return self.stretches

    def _append(self, form: KVFormat | None, keys: mx.array, values: mx.array) -> None:
        before = self.offset
        last = self.stretches[-1] if self.stretches else None
        if last is None or last.frozen or last.form != form:
            last = Stretch(form)
            self.stretches = [*self.stretches, last]
        else:
            before -= last.length
        reserved = self.reserved
        if form is None and self.form is not None:
            reserved = min(reserved, self.form.start)
        last.append(keys, values, reserved - before)

    def rewind(self, offset: int) -> None:
        """Forget all positions from `offset` on."""
        kept, start = [], 0
        for stretch in self.stretches:
            length = min(stretch.length, offset - start)
            if length <= 0:
                break
            if length < stretch.length and stretch.frozen:
                stretch = stretch.cut(length)
            stretch.length = length
            kept.append(stretch)
            start += length
        self.stretches = kept

    def branched(self) -> tuple[StretchedKVCache, StretchedKVCache]:
        """Two caches with what is held here, which both share; this one is not to be used any more."""
        for stretch in self.stretches:
            stretch.frozen = True
        return StretchedKVCache(self.form, self.stretches), StretchedKVCache(self.form, self.stretches)

    def arrays(self) -> list[mx.array]:
        return [array for stretch in self.stretches for array in stretch.arrays()]

    @property
    def state(self) -> list[mx.array]:
        return self.arrays()

    def size(self) -> int:
        return self.offset

    @staticmethod
    def merge(caches: Sequence[StretchedKVCache]) -> Any:
        raise ValueError(
            "keys and values that are kept in few bits or shared between sessions cannot join a batch of mlx-lm: load "
            "the model without kv_bits, and give mlx-lm caches of its own (model.make_cache())"
        )


State = tuple["mx.array | None", "mx.array | None"]  # conv and matrix of a DeltaState


class DeltaState(_Layer):
    """What one gated delta layer carries on; both are None before the first token.

    conv [B, K-1, C]: the last inputs of the convolution. matrix [B, Hv, Dv, Dk] float32: the recurrent state.
    steps: None, or a list to which each call adds both as they were after each of its tokens, or, where `places` are
    given, after so many tokens from now on (ascending). late: it need not, if it leaves `again`: what gives both after
    the first so many of its tokens, computed once more.
    """

    def __init__(self) -> None:
        self.conv: mx.array | None = None
        self.matrix: mx.array | None = None
        self.steps: list[State] | None = None
        self.places: list[int] | None = None
        self.late = False
        self.again: Callable[[int], State] | None = None

    def update(self, conv: mx.array, matrix: mx.array) -> None:
        self.conv, self.matrix = conv, matrix

    def ends(self, length: int) -> list[int]:
        """After how many of its `length` tokens a call is to give both to `update_each`, the last included."""
        if self.places is None:
            return list(range(1, length + 1))
        return [place for place in self.places if 0 < place < length] + [length]

    def update_each(self, convs: Sequence[mx.array], matrices: Sequence[mx.array], length: int) -> None:
        """`update` after a call of so many tokens with what it was at each of its `ends`; needs `steps`."""
        states = list(zip(convs, matrices, strict=True))
        self.steps += states if self.places is None or length in self.places else states[:-1]
        if self.places is not None:
            self.places = [place - length for place in self.places]
        self.update(convs[-1], matrices[-1])

    def branched(self) -> tuple[DeltaState, DeltaState]:
        """This one, and another with the same arrays: neither is ever written to."""
        other = DeltaState()
        other.update(self.conv, self.matrix)
        return self, other

    def arrays(self) -> list[mx.array]:
        return [a for a in (self.conv, self.matrix) if a is not None]

    @property
    def state(self) -> list[mx.array | None]:
        return [self.conv, self.matrix]

    def size(self) -> int:
        return 0  # in positions: it does not grow

    @staticmethod
    def merge(caches: Sequence[DeltaState]) -> Any:
        """mlx-lm's cache of a batch, with a row from each."""
        from mlx_lm.models.cache import ArraysCache

        rows = [ArraysCache(2) for _ in caches]
        for row, cache in zip(rows, caches, strict=True):
            row.cache = cache.state
        return ArraysCache.merge(rows)


class Elsewhere(_Layer):
    """The place of a layer whose past another rank holds."""

    form = None
    offset = reserved = 0
    stretches: Sequence[Stretch] = ()
    state = ()

    def rewind(self, offset: int) -> None:
        """There is nothing here to forget."""

    def branched(self) -> tuple[Elsewhere, Elsewhere]:
        return self, self

    def arrays(self) -> list[mx.array]:
        return []


AnyLayer = KVCache | StretchedKVCache | DeltaState | Elsewhere
