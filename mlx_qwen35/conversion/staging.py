"""Memory that a thread reads into and that MLX computes on: no copy lies between, and the next piece takes it again.

Knows memory. Knows neither files nor tensors. New memory for every piece would cost its first touch, and handing it to
MLX a copy under Python's lock: together a twelfth of a conversion to 4 bits (docs/SPEED.md).
"""

from __future__ import annotations

import math
import threading

import mlx.core as mx
import numpy as np
from numpy.typing import DTypeLike

_ALIGN = 64  # bytes: no processor's wide loads cross a line


class Staging:
    """The memory of one piece at a time. Whoever takes it for the next piece is done with all of the one before."""

    def __init__(self, nbytes: int):
        self._memory = mx.zeros((nbytes,), mx.uint8, stream=mx.cpu)
        mx.eval(self._memory)
        self._bytes = np.array(self._memory, copy=False)
        self._taken: list[tuple[np.ndarray, int]] = []
        self._end = 0

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
        """As np.empty; it is of this memory as long as there is room."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if not size or self._end + size > len(self._bytes):
            return np.empty(shape, dtype)
        begin, self._end = self._end, _aligned(self._end + size)
        array = self._bytes[begin : begin + size].view(dtype).reshape(shape)
        self._taken.append((array, begin))
        return array

    def as_mlx(self, array: np.ndarray) -> mx.array:
        """What empty() gave, as MLX has it: the same memory where it is of this one, a copy if not."""
        for taken, begin in self._taken:
            if taken is array:
                flat = self._memory[begin : begin + array.nbytes]
                return flat.view(getattr(mx, array.dtype.name)).reshape(array.shape)
        return mx.array(array)


_THREADS = threading.local()


def staging(*nbytes: int) -> Staging:
    """This thread's memory, with room for arrays of so many bytes. What was in it is lost."""
    wanted = sum(_aligned(count) for count in nbytes)
    found: Staging | None = getattr(_THREADS, "staging", None)
    if found is None or len(found._bytes) < wanted:
        found = _THREADS.staging = Staging(wanted)
    found._taken.clear()
    found._end = 0
    return found


def _aligned(count: int) -> int:
    return count + -count % _ALIGN


def as_numpy(array: mx.array) -> np.ndarray:
    """The same memory, evaluated; bfloat16 as uint16, which NumPy lacks."""
    array = mx.contiguous(array)
    if array.dtype == mx.bfloat16:
        array = array.view(mx.uint16)
    mx.eval(array)
    return np.array(array, copy=False)
