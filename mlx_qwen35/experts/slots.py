"""Memory for some experts of one layer: stacked arrays that are computed with, and the bytes behind them to read into.

Knows how an expert's tensors lie in arrays. Knows neither who is in which slot nor who reads.

An array is made once and written only through its buffer: `array[slot] = x` would copy the whole stack where anything
still waits to compute with it, or move it away from under the views (MLX's arrays are values). What is written while
something waits is seen by it: whoever fills a slot has to know that nothing does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import mlx.core as mx
import numpy as np

from ..config import QuantSpec
from .cast import converter
from .layout import LayerLayout
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
        self._bytes: list[tuple[memoryview, int]] = []  # of each tensor: all slots, and bytes of one
        self._converters = []
        arrays: dict[str, dict[str, mx.array]] = {}
        for tensor in layout.tensors:
            to = mx.float32 if tensor.exact else _PACKED.get(tensor.dtype, dtype)
            store = mx.zeros((count, *tensor.shape), _BITS[to.size])
            array = store.view(to)
            mx.eval(store, array)
            self._bytes.append((_buffer(store, array), math.prod(tensor.shape) * to.size))
            same = tensor.dtype in _PACKED and tensor.step is None
            self._converters.append(None if same else converter(tensor.dtype, _name(to), tensor.step))
            projection, kind = tensor.name.rsplit(".", 1)
            arrays.setdefault(projection, {})[kind] = array
        for fixed in layout.fixed:
            projection, kind = fixed.name.rsplit(".", 1)
            own = _PACKED.get(fixed.dtype, dtype)
            arrays.setdefault(projection, {})[kind] = mx.full((count, *fixed.shape), fixed.value, own)
        self.experts = Experts(*(_linear(arrays[p], specs.get(p)) for p in ("gate_proj", "up_proj", "down_proj")))
        self.experts.eval()

    def targets(self, slot: int) -> list[Target]:
        """Where the tensors of one expert are read to, in the order of the layout."""
        pairs = zip(self._bytes, self._converters, strict=True)
        return [Target(view[slot * size : (slot + 1) * size], convert) for (view, size), convert in pairs]


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
