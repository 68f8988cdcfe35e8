"""Keys and values of the context, as far as one layer of a drafter looks back.

Knows arrays and positions. Arrays are never written to where another window has them too, so that a copy of a window
costs nothing until one of both goes on.
"""

from __future__ import annotations

import mlx.core as mx

_STEP = 256  # positions by which room grows
_SPARE = 64  # positions before what is read, that are kept for going back a little


class Window:
    """most: positions that are read, the last ones; None: all. start: the first position that will come.

    What is held are positions `start` to `stop`; going back to before them leaves nothing.
    """

    def __init__(self, most: int | None, start: int = 0) -> None:
        self.most, self.start, self.stop = most, start, start
        self.keys: mx.array | None = None  # [1, heads, capacity, D]
        self.values: mx.array | None = None

    def rewind(self, stop: int) -> None:
        """Forget all positions from `stop` on."""
        self.stop = min(self.stop, stop)
        self.start = min(self.start, self.stop)

    def append(self, keys: mx.array, values: mx.array, skipped: int = 0) -> None:
        """keys, values [1, heads, T, D] of the next positions. skipped: positions before those, which nobody will read:
        what was held before them is forgotten."""
        if skipped:
            self.start = self.stop = self.stop + skipped
        length, held = keys.shape[2], self.stop - self.start
        capacity = 0 if self.keys is None else self.keys.shape[2]
        if held + length > capacity:
            kept = held if self.most is None else min(held, max(self.most + _SPARE - length, 0))
            room = -(kept + length) % _STEP or _STEP
            self.keys, self.values = (
                _moved(old, new, held - kept, held, room) for old, new in ((self.keys, keys), (self.values, values))
            )
            self.start = self.stop - kept
        else:
            place = mx.array([held])
            self.keys, self.values = (
                mx.slice_update(old, new, place, axes=[2]) for old, new in ((self.keys, keys), (self.values, values))
            )
        self.stop += length

    def read(self) -> tuple[mx.array, mx.array] | None:
        """What is held of the last `most` positions, [1, heads, S, D] each; None: nothing."""
        held = self.stop - self.start
        first = 0 if self.most is None else max(held - self.most, 0)
        return (self.keys[:, :, first:held], self.values[:, :, first:held]) if held else None

    def copied(self) -> Window:
        """Another window with the same past; each goes on by itself."""
        other = Window(self.most)
        other.start, other.stop, other.keys, other.values = self.start, self.stop, self.keys, self.values
        return other

    def shrink(self) -> None:
        """Leave no room behind what is held."""
        if self.keys is None or self.keys.shape[2] - (self.stop - self.start) <= _STEP:
            return
        held = self.stop - self.start
        if not held:
            self.keys = self.values = None
            return
        self.keys, self.values = (_moved(old, None, 0, held, 1) for old in (self.keys, self.values))

    def arrays(self) -> list[mx.array]:
        return [] if self.keys is None else [self.keys, self.values]


def _moved(old: mx.array | None, new: mx.array | None, first: int, last: int, room: int) -> mx.array:
    """Positions first .. last of what was there, those that come, and room behind them, in an array of its own."""
    parts = [] if old is None or first == last else [old[:, :, first:last]]
    parts += [] if new is None else [new]
    batch, heads, _, width = parts[0].shape
    return mx.concatenate([*parts, mx.zeros((batch, heads, room, width), parts[0].dtype)], axis=2)
