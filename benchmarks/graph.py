"""What MLX would launch on Metal for a piece of Python, read from the traced graph, on a machine without Metal.

    with PretendedMetal():                # before the import of what is to be traced
        launches = trace(function, {"x": x})

Knows MLX's primitives: which of them only look at memory in another way, and what the others read and write. Knows no
model. Nothing is computed, so that arrays of any size can be traced: they are shapes.

The rule. An operation that puts work on the GPU counts one, however many kernels Metal runs for it: so a concatenation
of three arrays counts one, and so does an operation that first copies a strided input. Nothing is counted for views:
broadcasts, transposes, slices, splits, and reshapes that MLX does without a copy (one that has to copy counts one).
Three things are not in a graph that is traced on a CPU as Metal would see them, and are put there:

- An operation of mx.fast, and mx.dequantize, which the CPU unfolds into their parts, are one node, as on Metal.
- What mx.compile makes of a function is asked of mx.compile itself, which fuses in the same way for every device: as
  many as it leaves.
- Code that asks whether Metal is there hears that it is, and kernels of mx.fast.metal_kernel count one each.

Tracing merges an operation that is written twice on the same arrays: it counts one, for everybody.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

_ALIASES = {"StopGradient", "Depends", "Copy", "CustomTransforms", "NumberOfElements"}
_RESHAPES = {"Reshape", "Flatten", "Unflatten", "Squeeze", "ExpandDims"}
_VIEWS = _ALIASES | _RESHAPES | {"Broadcast", "BroadcastAxes", "Transpose", "Slice", "Split", "AsStrided", "View"}
_LOOKUPS = {"Gather", "GatherAxis"}  # of the first input they read what comes out
_STAND_IN = re.compile(r"standin(\d+)_")
_METAL_KERNEL = mx.fast.metal_kernel

_tracing: _Tracing | None = None


@dataclass(frozen=True)
class Launch:
    """One operation that puts work on the GPU; bytes are what it must move at least.

    layer: 0 before the first mark, n after n marks, by what the operation depends on; what depends on none and is
    used by the operations of one layer only belongs to it. inputs: names of the traced arguments that it reads.
    """

    name: str
    count: int
    shape: tuple[int, ...]
    read: int
    written: int
    layer: int
    inputs: tuple[str, ...]


def shape_only(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """An array that takes no memory: to trace with, not to compute with."""
    return mx.broadcast_to(mx.array(0, dtype), shape)


class PretendedMetal:
    """Within it, code that is imported and built believes in a GPU. Computing is not possible."""

    def __enter__(self) -> PretendedMetal:
        self._before = [(place, name, getattr(place, name)) for place, name in _places()]
        device, compiler = mx.Device(mx.gpu), mx.compile
        mx.default_device = lambda: device
        mx.metal.is_available = lambda: True
        # Without shapeless=True, which fuses the same but has no shape for a kernel's outputs.
        mx.compile = lambda fun, **how: _Piece(fun, compiler(fun, **how | {"shapeless": False}))
        mx.fast.metal_kernel = _named_kernel
        mx.contiguous = _Fast("Contiguous", mx.contiguous)  # which cannot be exported under its own name
        mx.dequantize = _Fast("dequantize", mx.dequantize)
        for name in _fast():
            setattr(mx.fast, name, _Fast(f"fast.{name}", getattr(mx.fast, name)))
        return self

    def __exit__(self, *_: object) -> None:
        for place, name, value in self._before:
            setattr(place, name, value)


def _fast() -> list[str]:
    return [n for n in dir(mx.fast) if not n.startswith("_") and not n.endswith("_kernel")]


def _places() -> list[tuple[Any, str]]:
    own = [(mx, "default_device"), (mx.metal, "is_available"), (mx, "compile"), (mx.fast, "metal_kernel")]
    own += [(mx, "contiguous"), (mx, "dequantize")]
    return own + [(mx.fast, name) for name in _fast()]


def mark(arrays: Any) -> Any:
    """The same arrays, after a border between layers. In a traced function only."""
    number = _tracing.border()
    return _mapped(lambda a: _tracing.stand_in(f"|{number}", 0, [a], [a])[0], arrays)


@contextmanager
def at_load() -> Iterator[None]:
    """In a traced function only: what is concatenated within is laid out once, with the weights, and counts nothing."""

    def laid_out(arrays: list[mx.array], axis: int = 0) -> mx.array:
        like = concatenate([_ghost(a) for a in arrays], axis)
        return _tracing.stand_in("laid out", 0, list(arrays), [like])[0]

    concatenate, evaluate = mx.concatenate, mx.eval
    mx.concatenate, mx.eval = laid_out, lambda *_: None
    try:
        yield
    finally:
        mx.concatenate, mx.eval = concatenate, evaluate


def trace(
    function: Callable[..., Any], arguments: Mapping[str, mx.array], *, touched: Mapping[str, float] | None = None
) -> list[Launch]:
    """The launches of function(**arguments), whose outputs are all needed.

    touched: of some arguments, the part that an operation which reads them needs to read (chosen experts).
    """
    global _tracing
    names, events = list(arguments), []
    _tracing = _Tracing()
    try:
        mx.export_function(
            events.append,
            lambda *arrays: _arrays(function(**dict(zip(names, arrays, strict=True)))),
            *arguments.values(),
        )
        return _Reading(names, events, _tracing.stands, touched or {}).launches()
    finally:
        _tracing = None


class _Tracing:
    """The stand-ins of one trace: nodes that carry what a CPU's graph cannot."""

    def __init__(self) -> None:
        self.stands: list[tuple[str, int]] = []  # label, launches
        self.inside_piece = False
        self._borders = 0

    def border(self) -> int:
        self._borders += 1
        return self._borders

    def stand_in(self, label: str, count: int, inputs: list[mx.array], like: list[mx.array]) -> list[mx.array]:
        """One node from inputs to arrays like those."""
        kernel = _METAL_KERNEL(
            name=f"standin{len(self.stands)}",
            input_names=[f"i{n}" for n in range(len(inputs))],
            output_names=[f"o{n}" for n in range(len(like))],
            source=";",
        )
        self.stands.append((label, count))
        return kernel(
            inputs=inputs,
            grid=(1, 1, 1),
            threadgroup=(1, 1, 1),
            output_shapes=[a.shape for a in like],
            output_dtypes=[a.dtype for a in like],
        )


_kernel_names: set[str] = set()


def _named_kernel(name: str, *args: Any, **kwargs: Any) -> Any:
    """mx.fast.metal_kernel; the name is kept, because the graph has it with types behind it."""
    _kernel_names.add(name)
    return _METAL_KERNEL(name, *args, **kwargs)


class _Fast:
    """An operation of mx.fast as one node."""

    def __init__(self, label: str, real: Callable[..., Any]):
        self._label, self._real = label, real

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if _tracing is None:
            return self._real(*args, **kwargs)
        like = self._real(*_mapped(_ghost, args), **_mapped(_ghost, kwargs))
        return _replaced(like, self._label, 1, (args, kwargs))


class _Piece:
    """What mx.compile returned: in a trace one node that counts what mx.compile leaves."""

    def __init__(self, plain: Callable[..., Any], compiled: Callable[..., Any]):
        self._plain, self._compiled = plain, compiled
        self.__name__ = getattr(plain, "__name__", "compiled")
        self.__doc__ = plain.__doc__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if _tracing is None or _tracing.inside_piece:
            return self._compiled(*args, **kwargs)
        _tracing.inside_piece = True
        try:
            like = self._compiled(*_mapped(_ghost, args), **_mapped(_ghost, kwargs))
        finally:
            _tracing.inside_piece = False
        names = _primitives(_arrays(like))
        return _replaced(like, f"compiled {self.__name__}", len(names), (args, kwargs))

    def __get__(self, instance: Any, owner: type) -> Any:
        return self if instance is None else lambda *args, **kwargs: self(instance, *args, **kwargs)


def _primitives(outputs: list[mx.array]) -> list[str]:
    """The operations that launch, in an unevaluated graph."""
    dot = io.StringIO()
    mx.export_to_dot(dot, *outputs)
    return [name for name in re.findall(r'label ="(\w+)"', dot.getvalue()) if name not in _VIEWS]


def _replaced(like: Any, label: str, count: int, given: Any) -> Any:
    """The arrays of `like`, as outputs of one node that reads the arrays in `given`."""
    made = iter(_tracing.stand_in(label, count, _arrays(given), _arrays(like)))
    return _mapped(lambda _: next(made), like)


def _ghost(array: mx.array) -> mx.array:
    return shape_only(array.shape, array.dtype)


def _mapped(function: Callable[[mx.array], mx.array], tree: Any) -> Any:
    if isinstance(tree, mx.array):
        return function(tree)
    if isinstance(tree, dict):
        return {key: _mapped(function, value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(_mapped(function, value) for value in tree)
    return tree


def _arrays(tree: Any) -> list[mx.array]:
    found: list[mx.array] = []
    _mapped(lambda a: found.append(a) or a, tree)
    return found


class _Reading:
    """The events of an exported function, turned into launches.

    Strides are followed through views, by NumPy on an array of the same shape and strides that has no data: whether a
    reshape copies and how many bytes of a broadcast array exist hangs on them.
    """

    def __init__(
        self, names: list[str], events: list[dict], stands: list[tuple[str, int]], touched: Mapping[str, float]
    ):
        self._stands, self._touched = stands, touched
        self._form: dict[str, np.ndarray] = {}  # of each array: its shape and strides in elements
        self._width: dict[str, int] = {}  # bytes of an element
        self._root: dict[str, str] = {}  # whose memory it is
        self._layer: dict[str, int] = {}
        self._argument: dict[str, str] = {}
        by_type = {event["type"]: event for event in events if event["type"] != "primitive"}
        self._nodes = [event for event in events if event["type"] == "primitive"]
        for name, given in zip(names, by_type["inputs"]["inputs"], strict=True):
            self._argument[given[0]] = name
            self._new(*given)
        for key, array in by_type["constants"]["constants"]:
            self._new(key, array.shape, array.dtype)
        self._uses: dict[str, int] = {}
        for node in self._nodes:
            for key in {given[0] for given in node["inputs"]}:
                self._uses[key] = self._uses.get(key, 0) + 1

    def launches(self) -> list[Launch]:
        found: list[tuple[dict, Launch]] = []
        for node in self._nodes:
            layer = max((self._layer[key] for key, *_ in node["inputs"]), default=0)
            label, count = self._label(node)
            if label.startswith("|"):
                layer, count = int(label[1:]), 0
                self._alias(node, self._form[node["inputs"][0][0]])
            elif not self._is_view(node, label):
                for given in node["outputs"]:
                    self._new(*given)
                if count:
                    found.append((node, self._launch(node, label, count, layer)))
            for key, *_ in node["outputs"]:
                self._layer[key] = layer
        return self._settled(found)

    def _new(self, key: str, shape: tuple[int, ...], dtype: mx.Dtype) -> None:
        strides, step = [], 1
        for size in reversed(shape):
            strides.append(step)
            step *= size
        self._form[key] = _form(tuple(shape), tuple(reversed(strides)))
        self._width[key], self._root[key], self._layer[key] = dtype.size, key, 0

    def _alias(self, node: dict, *forms: np.ndarray) -> None:
        source = node["inputs"][0][0]
        for (key, *_), form in zip(node["outputs"], forms, strict=True):
            self._form[key], self._width[key], self._root[key] = form, self._width[source], self._root[source]

    def _is_view(self, node: dict, name: str) -> bool:
        """Whether an operation gives its input's memory another form; if so, its outputs are known afterwards."""
        how = node["arguments"]
        if name not in _VIEWS and name != "Contiguous":
            return False
        source, shape = node["inputs"][0][0], tuple(node["outputs"][0][1])
        form = self._form[source]
        if name in ("Broadcast", "BroadcastAxes"):
            self._alias(node, np.broadcast_to(form, shape))
        elif name == "Transpose":
            self._alias(node, form.transpose(how[0]))
        elif name == "Slice":
            self._alias(node, form[tuple(slice(*cut) for cut in zip(*how, strict=True))])
        elif name == "Split":
            self._alias(node, *np.split(form, list(how[0]), axis=how[1]))
        elif name in _RESHAPES:
            try:
                self._alias(node, np.reshape(form, shape, copy=False))
            except ValueError:
                return False  # MLX copies, too
        elif name == "Contiguous":
            whole = math.prod(self._form[self._root[source]].shape) * self._width[source]
            kept = math.prod(shape) * self._width[source] + 16384  # of a larger buffer MLX does not keep a part
            if not _is_row_contiguous(form) or whole > kept:
                return False
            self._alias(node, form)
        elif name == "View" and node["outputs"][0][2].size == self._width[source]:  # the same bits by another name
            self._alias(node, form)
        elif name in _ALIASES:
            self._alias(node, *(self._form[given[0]] for given in node["inputs"][: len(node["outputs"])]))
        else:
            raise NotImplementedError(f"the counting rule does not know the view {name}")
        return True

    def _label(self, node: dict) -> tuple[str, int]:
        if node["name"] != "CustomKernel":
            return node["name"], 1
        generated = node["arguments"][0].removeprefix("custom_kernel_")
        stand = _STAND_IN.match(generated)
        if stand:
            return self._stands[int(stand[1])]
        names = [name for name in _kernel_names if generated.startswith(name)]
        return f"kernel {max(names, key=len, default=generated)}", 1

    def _launch(self, node: dict, label: str, count: int, layer: int) -> Launch:
        inputs = list(dict.fromkeys(key for key, *_ in node["inputs"]))
        outputs = [key for key, *_ in node["outputs"]]
        written = sum(self._bytes(key) for key in outputs)
        if node["name"] == "SliceUpdate":
            target, inputs = inputs[0], inputs[1:]
            read = written_part = sum(self._bytes(key) for key in inputs)
            if self._uses[target] > 1:  # somebody still needs the old values: MLX copies the whole first
                count, read, written_part = count + 1, read + self._bytes(target), written_part + written
            written = written_part
        elif node["name"] in _LOOKUPS:
            read = written + sum(self._bytes(key) for key in inputs[1:])
        else:
            read = sum(self._bytes(key) for key in inputs)
        named = [self._argument[root] for key in inputs if (root := self._root[key]) in self._argument]
        shape = tuple(node["outputs"][0][1])
        return Launch(label, count, shape, read, written, layer, tuple(named))

    def _bytes(self, key: str) -> int:
        form = self._form[key]
        elements = math.prod(n for n, stride in zip(form.shape, form.strides, strict=True) if stride)
        part = self._touched.get(self._argument.get(self._root[key], ""), 1.0)
        return round(elements * self._width[key] * part)

    def _settled(self, found: list[tuple[dict, Launch]]) -> list[Launch]:
        """Launches before the first mark that feed one layer only go to it."""
        users: dict[str, set[int]] = {}
        settled: list[Launch] = []
        numbers = {id(node): launch for node, launch in found}
        for node in reversed(self._nodes):
            launch = numbers.get(id(node))
            outputs = [key for key, *_ in node["outputs"]]
            layer = max(self._layer[key] for key in outputs)
            if layer == 0:
                wanted = set().union(*(users.get(key, set()) for key in outputs))
                layer = wanted.pop() if len(wanted) == 1 else 0
            before = layer - 1 if self._label(node)[0].startswith("|") else layer
            for key, *_ in node["inputs"]:
                users.setdefault(key, set()).add(before)
            if launch is not None:
                settled.append(Launch(**{**launch.__dict__, "layer": layer}))
        return settled[::-1]


def _form(shape: tuple[int, ...], strides: tuple[int, ...]) -> np.ndarray:
    return np.lib.stride_tricks.as_strided(np.empty(1, np.int8), shape, strides, writeable=False)


def _is_row_contiguous(form: np.ndarray) -> bool:
    step = 1
    for size, stride in zip(reversed(form.shape), reversed(form.strides), strict=True):
        if size > 1 and stride != step:
            return False
        step *= size
    return True
