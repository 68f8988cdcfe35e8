"""Stretches of keys and values, and the form in which they are kept: as they are, or in 4 or 8 bits.

Knows arrays and lengths. Knows no layers, no tokens, and not who shares a stretch with whom.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_qwen35.errors import ArgumentError

STEP = 256  # positions by which a stretch grows
BITS, GROUP_SIZES = (4, 8), (32, 64, 128)


@dataclass(frozen=True)
class KVFormat:
    """Keys and values in `bits` bits, with a scale and an offset for each `group_size` values of a head.

    start: positions before it are kept as they are. Which form a position has is a matter of the position alone, so
    that a prompt gives the same cache in whatever pieces it is read. Raises ArgumentError for sizes that MLX lacks.
    """

    bits: int
    group_size: int = 64
    start: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or self.bits not in BITS:
            raise ArgumentError(f"kv_bits is {self.bits!r}; keys and values take 4 or 8 bits, or None: as they are")
        if not isinstance(self.group_size, int) or self.group_size not in GROUP_SIZES:
            raise ArgumentError(f"kv_group_size is {self.group_size!r}; MLX has 32, 64 and 128")
        if isinstance(self.start, bool) or not isinstance(self.start, int) or self.start < 0:
            raise ArgumentError(f"quantized_kv_start is {self.start!r}; give 0 or more positions")


class Stretch:
    """Keys and values [B, Hkv, length, D] of positions that follow one another.

    keys, values: one array [B, Hkv, capacity, D] each; with a format three, as mx.quantize gives them.
    frozen: others have it too, and it is not written to any more.
    """

    def __init__(self, form: KVFormat | None = None) -> None:
        self.form = form
        self.keys: tuple[mx.array, ...] = ()
        self.values: tuple[mx.array, ...] = ()
        self.length = 0
        self.frozen = False

    def append(self, keys: mx.array, values: mx.array, reserve: int = 0) -> None:
        """keys, values [B, Hkv, T, D]; reserve: make room for so many positions in all, if room has to be made."""
        start, stop = self.length, self.length + keys.shape[2]
        keys, values = _formed(keys, self.form), _formed(values, self.form)
        self.keys = _extended(self.keys, keys, start, stop, reserve)
        self.values = _extended(self.values, values, start, stop, reserve)
        self.length = stop

    def cut(self, length: int) -> Stretch:
        """The first `length` positions: a frozen stretch that shares the arrays of this one."""
        cut = Stretch(self.form)
        cut.keys, cut.values, cut.length, cut.frozen = self.keys, self.values, length, True
        return cut

    def block(self, start: int, stop: int) -> tuple[tuple[mx.array, ...], tuple[mx.array, ...]]:
        """Keys and values of some positions, in the form in which they are kept."""
        return (
            tuple(array[..., start:stop, :] for array in self.keys),
            tuple(array[..., start:stop, :] for array in self.values),
        )

    def arrays(self) -> list[mx.array]:
        return [*self.keys, *self.values]


def grown(held: mx.array | None, new: mx.array, start: int, stop: int, reserve: int = 0) -> mx.array:
    """An array for at least `stop` positions, and `reserve`, whose first `start` are those of `held`."""
    batch, heads, _, dim = new.shape
    capacity = -(-max(stop, reserve) // STEP) * STEP
    space = mx.zeros((batch, heads, capacity - start, dim), new.dtype)
    return space if start == 0 else mx.concatenate([held[..., :start, :], space], axis=2)


def _formed(x: mx.array, form: KVFormat | None) -> tuple[mx.array, ...]:
    return (x,) if form is None else mx.quantize(x, form.group_size, form.bits)


def _extended(
    held: Sequence[mx.array], new: Sequence[mx.array], start: int, stop: int, reserve: int
) -> tuple[mx.array, ...]:
    """`new` written after the first `start` positions of `held`, or of larger arrays if those end before `stop`."""
    made = []
    for number, part in enumerate(new):
        array = held[number] if held else None
        if array is None or stop > array.shape[2]:
            array = grown(array, part, start, stop, reserve)
        array[..., start:stop, :] = part
        made.append(array)
    return tuple(made)
