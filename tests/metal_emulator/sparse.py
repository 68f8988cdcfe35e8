"""Arrays far larger than memory, of which only the end is touched: for indices that 32 bits do not hold.

Knows address space, and the last threadgroups of a launch. Knows no operation. The system gives memory to a page when
it is written to, so that a buffer of gigabytes takes some kilobytes.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35.kernels.backend import Backend, using

from . import toolchain
from .emulator import recorded
from .program import Program
from .translation import translate

_BEFORE = 2**31  # elements in front: an index that has overflowed is found by its result, and ends nothing
_TYPES = {mx.float16: np.float16, mx.float32: np.float32, mx.uint32: np.uint32, mx.uint8: np.uint8}


class Sparse:
    """An array of zeros. array: stands for it in calls; values: its elements, to be written to and looked at."""

    def __init__(self, shape: Sequence[int], dtype: mx.Dtype):
        self.array = mx.broadcast_to(mx.array(0, dtype), shape)
        count = math.prod(shape)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        try:
            memory = mmap.mmap(-1, (_BEFORE + count) * dtype.size, flags=flags)
        except (OSError, ValueError) as error:
            pytest.skip(f"this system gives no address space for {count * dtype.size:,} bytes ({error})")
        self.values = np.frombuffer(memory, _TYPES[dtype], count, _BEFORE * dtype.size).reshape(shape)


def last_groups(
    operation: Callable[..., Any], arrays: Sequence[Sparse | mx.array], count: int
) -> list[np.ndarray]:
    """The outputs of operation(*arrays), one kernel, of which only the last `count` threadgroups run."""
    try:
        toolchain.clang(), toolchain.metal_headers()
    except toolchain.Missing as missing:
        pytest.skip(f"kernels cannot be emulated: {missing}")
    sparse = {id(each.array): each.values for each in arrays if isinstance(each, Sparse)}
    found: list[np.ndarray] = []

    def make(*, input_names: list[str], output_names: list[str], **parts: Any) -> Callable[..., list[mx.array]]:
        kernel = mx.fast.metal_kernel(input_names=input_names, output_names=output_names, **parts)

        def call(*, inputs: list[mx.array], **how: Any) -> list[mx.array]:
            translated = translate(*recorded(kernel, inputs, **how))
            given = {}
            for name, array in zip(input_names, inputs, strict=True):
                given[name] = sparse[id(array)] if id(array) in sparse else np.array(array)
                given[f"{name}_shape"] = np.array(array.shape, np.int32)
            outputs = [Sparse(*of) for of in zip(how["output_shapes"], how["output_dtypes"], strict=True)]
            given |= {name: each.values for name, each in zip(output_names, outputs, strict=True)}
            total = math.prod(-(-g // t) for g, t in zip(how["grid"], how["threadgroup"], strict=True))
            addresses = [given[name].ctypes.data for name in translated.buffers]
            Program(translated).run(addresses, how["grid"], how["threadgroup"], 0, total - count)
            found.extend(each.values for each in outputs)
            return [each.array for each in outputs]

        return call

    with using(Backend("sparse", make)):
        operation(*(each.array if isinstance(each, Sparse) else each for each in arrays))
    made = [*found]
    sparse.clear(), found.clear()  # kernels are kept for the next call: not with the address space of this one
    return made
