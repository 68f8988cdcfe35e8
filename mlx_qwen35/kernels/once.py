"""What is made of weights once and not at every token: parts of them for a lane, the taps of some channels.

Knows arrays by who they are, not what they hold: an array that takes another's place (an adapter fused, an update) is
asked about anew, and what was made of the other goes when it goes. Writing into an array is not noticed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import mlx.core as mx

Made = TypeVar("Made")

_MADE: dict[int, tuple[weakref.ref[mx.array], dict[Hashable, Any]]] = {}  # by id of a living array


def once(array: mx.array, key: Hashable, make: Callable[[mx.array], Made]) -> Made:
    """make(array), an array or several, remembered under `key` as long as the array lives; evaluated, so that any
    thread may use it.

    Inside a transformation whose argument the array is, make(array) and no more.
    """
    found = _MADE.get(id(array))
    if found is None or found[0]() is not array:
        number = id(array)
        found = _MADE[number] = weakref.ref(array, lambda gone: _forget(number, gone)), {}
    made = found[1].get(key)
    if made is None:
        made = make(array)
        try:
            mx.eval(made)
        except (RuntimeError, ValueError):  # a tracer of mx.compile or mx.vmap
            return made
        found[1][key] = made
    return made


def _forget(number: int, gone: weakref.ref[mx.array]) -> None:
    if number in _MADE and _MADE[number][0] is gone:  # and not an array that has its place already
        del _MADE[number]


def cut(array: mx.array, taken: slice, axis: int = 0) -> mx.array:
    """array[taken] along an axis: a view, which takes no memory."""
    if taken.start == 0 and taken.stop == array.shape[axis]:
        return array
    where = (slice(None),) * axis + (taken,)
    return once(array, (axis, taken.start, taken.stop), lambda whole: whole[where])
