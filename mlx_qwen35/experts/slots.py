"""Memory for some experts of one layer: stacked arrays that are computed with, and the bytes behind them to read into.

Knows how an expert's tensors lie in arrays. Knows neither who is in which slot nor who reads.

An array is made once and written only through its buffer: `array[slot] = x` would copy the whole stack where anything
still waits to compute with it, or move it away from under the views (MLX's arrays are values). What is written while
something waits is seen by it: whoever fills a slot has to know that nothing does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..config import QuantSpec
from .cast import Convert, converter
from .layout import LayerLayout, Tensor
from .linear import ExpertLinear, QuantizedExpertLinear
from .reader import Target
from .resident import Experts

_PACKED = {"U32": mx.uint32, "U8": mx.uint8}
_BITS = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}  # what a buffer of items of so many bytes is made of


class Slots:
    """`count` slots for experts of a layer, zeros at first. experts: computes with them, by slot."""

    def __init__(self, layout: LayerLayout, specs: Mapping[str, QuantSpec], count: int, dtype: mx.Dtype):
        """specs: "gate_proj" .. -> its quantization, where it has one. dtype: of floats in memory."""
        self.count = count
        self._tensors = layout.tensors
        self._memory: list[list[_Array]] = []  # of each tensor, as many as it becomes
        arrays: dict[str, dict[str, mx.array]] = {}
        for tensor in layout.tensors:
            projection, kind = tensor.name.rsplit(".", 1)
            made = ((kind, tensor.dtype, tensor.shape),) if tensor.made is None else tensor.made.arrays
            self._memory.append([])
            for kind, tag, shape in made:
                to = mx.float32 if tensor.exact else _PACKED.get(tag, dtype)
                store = mx.zeros((count, *shape), _BITS[to.size])
                array = store.view(to)
                mx.eval(store, array)
                # What is made of a tensor comes as float32, whatever its numbers had been.
                tag = tag if tensor.made is None or tag in _PACKED else "F32"
                same = tag in _PACKED and tensor.step is None
                convert = None if same else converter(tag, _name(to), tensor.step)
                self._memory[-1].append(_Array(_buffer(store, array), math.prod(shape) * to.size, convert))
                arrays.setdefault(projection, {})[kind] = array
        for fixed in layout.fixed:
            projection, kind = fixed.name.rsplit(".", 1)
            own = _PACKED.get(fixed.dtype, dtype)
            arrays.setdefault(projection, {})[kind] = mx.full((count, *fixed.shape), fixed.value, own)
        self.experts = Experts(*(_linear(arrays[p], specs.get(p)) for p in ("gate_proj", "up_proj", "down_proj")))
        self.experts.eval()

    def targets(self, slot: int) -> list[Target]:
        """Where the tensors of one expert are read to, in the order of the layout."""
        found = []
        for tensor, memory in zip(self._tensors, self._memory, strict=True):
            if tensor.made is None:
                found.append(Target(memory[0].of(slot), memory[0].convert))
            else:
                found.append(Target(Spread(tensor, tuple(memory), slot), _unpack))
        return found


@dataclass(frozen=True)
class _Array:
    """All slots of an array. view: its bytes; size: bytes of a slot; convert: floats on their way into it."""

    view: memoryview
    size: int
    convert: Convert | None

    def of(self, slot: int) -> memoryview:
        return self.view[slot * self.size : (slot + 1) * self.size]


class Spread:
    """The memory of one expert's arrays that are made of one tensor: as long as it is in the file, and cut like it."""

    def __init__(self, tensor: Tensor, memory: tuple[_Array, ...], slot: int, start: int = 0, stop: int | None = None):
        self._tensor, self._memory, self._slot = tensor, memory, slot
        self._start, self._stop = start, tensor.nbytes if stop is None else stop

    @property
    def nbytes(self) -> int:
        return self._stop - self._start

    def __getitem__(self, part: slice) -> Spread:
        start, stop, _ = part.indices(self.nbytes)
        return Spread(self._tensor, self._memory, self._slot, self._start + start, self._start + stop)

    def fill(self, raw: memoryview) -> None:
        """Unpack the file's bytes of this stretch."""
        whole = self._tensor.nbytes
        for array, items in zip(self._memory, self._tensor.made.unpack(raw), strict=True):
            out = array.of(self._slot)[self._start * array.size // whole : self._stop * array.size // whole]
            data = memoryview(np.ascontiguousarray(items).reshape(-1).view(np.uint8))
            if array.convert is None:
                np.copyto(np.asarray(out), np.asarray(data))
            else:
                array.convert(data, out)


def _unpack(raw: memoryview, out: Spread) -> None:
    out.fill(raw)


def _buffer(store: mx.array, array: mx.array) -> memoryview:
    """The bytes of `array`, a view of `store`; raises RuntimeError if MLX has made a copy of it."""
    view = memoryview(store).cast("B")
    shared = np.array(array.view(store.dtype), copy=False)
    if view.readonly or shared.ctypes.data != np.frombuffer(view, np.uint8).ctypes.data:
        raise RuntimeError("this version of MLX does not let arrays be written in place: streaming needs 0.32")
    return view


def _linear(arrays: dict[str, mx.array], spec: QuantSpec | None) -> ExpertLinear | QuantizedExpertLinear:
    if spec is not None:
        return QuantizedExpertLinear(**arrays, group_size=spec.group_size, bits=spec.bits, mode=spec.mode)
    linear = ExpertLinear(1, 1, 1)
    linear.weight = arrays["weight"]
    return linear


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")
