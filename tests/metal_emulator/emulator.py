"""A backend for kernels that runs them on the CPU: MLX's text, in three orders of threads, on poisoned outputs.

Knows arrays. Knows nothing of what a kernel should compute; check.py compares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_qwen35.kernels.backend import Backend

from .program import KernelFault, Program
from .translation import Translated, check_forbidden, translate

ORDERS = (0, 1, 2)  # ascending, descending, shuffled


@dataclass
class Launch:
    """A kernel that was called, and with what: for the sanitizers, and for looking at its text."""

    name: str
    translated: Translated
    program: Program
    buffers: list[np.ndarray]
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]


@dataclass
class Emulator:
    """Make one, use its `backend`, look at its `launches`. orders: of threads, all of which must give the same bits."""

    orders: Sequence[int] = ORDERS
    launches: list[Launch] = field(default_factory=list)

    @property
    def backend(self) -> Backend:
        return Backend("emulator", self._make)

    def _make(self, **parts: Any) -> _Emulated:
        return _Emulated(self, **parts)


# By the text that MLX generates: what was compiled for one test serves the next.
_programs: dict[tuple[str, str], tuple[Translated, Program]] = {}


class _Emulated:
    """Called like what mx.fast.metal_kernel returns."""

    def __init__(self, emulator: Emulator, *, input_names: list[str], output_names: list[str], **parts: Any):
        check_forbidden(parts["header"] + parts["source"])
        self._emulator = emulator
        self._inputs, self._outputs = input_names, output_names
        self._kernel = mx.fast.metal_kernel(input_names=input_names, output_names=output_names, **parts)

    def __call__(self, *, inputs: list[mx.array], **call: Any) -> list[mx.array]:
        name, text = recorded(self._kernel, inputs, **call)
        if (name, text) not in _programs:
            translated = translate(name, text)
            _programs[name, text] = translated, Program(translated)
        translated, program = _programs[name, text]
        grid, threadgroup = call["grid"], call["threadgroup"]
        given = {}
        for each, array in zip(self._inputs, inputs, strict=True):
            array = mx.contiguous(array)
            given[each] = _aligned(_bits(array))
            given[f"{each}_shape"] = np.array(array.shape, np.int32)
            given[f"{each}_strides"] = np.array([s // given[each].itemsize for s in given[each].strides], np.int64)
            given[f"{each}_ndim"] = np.array([array.ndim], np.int32)
        before = {each: given[each].tobytes() for each in self._inputs}
        results = []
        for order in self._emulator.orders:
            outputs = [_poisoned(*of) for of in zip(call["output_shapes"], call["output_dtypes"], strict=True)]
            given |= {each: _bits(array) for each, array in zip(self._outputs, outputs, strict=True)}
            buffers = [given[each] for each in translated.buffers]
            if not results:
                launch = Launch(name, translated, program, [b.copy() for b in buffers], grid, threadgroup)
                self._emulator.launches.append(launch)
            program.run([b.ctypes.data for b in buffers], grid, threadgroup, order)
            results.append(outputs)
        if any(given[each].tobytes() != bits for each, bits in before.items()):
            raise KernelFault("an input was written to")
        for number, each in enumerate(self._outputs):
            if len({_bits(outputs[number]).tobytes() for outputs in results}) > 1:
                raise KernelFault(f"the output '{each}' depends on the order of threads: a barrier is missing")
        return results[0]


def recorded(kernel: Any, inputs: list[mx.array], **call: Any) -> tuple[str, str]:
    """Name and text of the kernel that MLX generates for this call: what mx.export_function says of its operations.

    It is the only way to the text on a machine without Metal.
    """
    events: list[dict[str, Any]] = []
    mx.export_function(events.append, lambda *arrays: tuple(kernel(inputs=list(arrays), **call)), *inputs)
    (operation,) = (event for event in events if event.get("name") == "CustomKernel")
    name, text, *_ = operation["arguments"]
    return name, text


def _bits(array: mx.array) -> np.ndarray:
    """The buffer of an array, as it lies in memory."""
    mx.eval(array)
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array, copy=False)


def _aligned(buffer: np.ndarray) -> np.ndarray:
    """The same, where a vector of 16 bytes may be read: MLX begins arrays of a CPU 8 bytes off, those of a Mac not."""
    if buffer.ctypes.data % 16 == 0:
        return buffer
    room = np.empty(buffer.nbytes + 16, np.uint8)
    start = -room.ctypes.data % 16
    aligned = room[start : start + buffer.nbytes].view(buffer.dtype).reshape(buffer.shape)
    aligned[...] = buffer
    return aligned


def _poisoned(shape: Sequence[int], dtype: mx.Dtype) -> mx.array:
    """All bits set: NaN, or the largest or least integer, wherever the kernel does not write."""
    count = int(np.prod(shape)) * dtype.size
    return mx.contiguous(mx.full((count,), 0xFF, mx.uint8).view(dtype).reshape(shape))
