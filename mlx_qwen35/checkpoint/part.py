"""One of our tensors, and how it is made from published ones: stacked, halved, transposed, shifted.

Knows the bytes of files and our shapes. Knows neither which tensors a model needs nor whether what it makes is right:
source.py holds it against the configuration.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import mlx.core as mx
import numpy as np

from mlx_qwen35.checkpoint import files
from mlx_qwen35.checkpoint.files import Empty, Entry
from mlx_qwen35.checkpoint.inventory import Shape
from mlx_qwen35.checkpoint.names import Layout
from mlx_qwen35.experts.cast import Step

FLOATS = ("F32", "F16", "BF16")
DTYPES = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16, "U32": mx.uint32, "U8": mx.uint8}


@dataclass(frozen=True)
class Passing:
    """How an expert's tensor is read without its part: its bytes and a step; or it is this number everywhere, which is
    read nowhere. exact: floats that are not cast."""

    step: Step | None = None
    fixed: int | None = None
    exact: bool = False


class AnyPart(Protocol):
    """One of our tensors, and how it is made: the face of plain ones (Part) and of those of forms/.

    ours: its name. entries: the published tensors that it is made of, for errors and for the order of reading. shape:
    ours. dtype: as safetensors calls it: of packed words and their scales, else what the values had before they became
    codes. nbytes: in the files. rows: the length of axis 0, along which it is read in pieces. stacked: whether
    entries[e] is of expert e. computed: whether its floats are made of codes: then finish() gives float32 where it is
    asked for no dtype, and a conversion packs from that. cuts: whether rows can be read apart; if not, fetch() reads
    the whole for any. growth: bytes that finish() makes of one in the file, at most. passing: how the bytes of one
    expert are read past the part, straight into memory; None: they are not.
    """

    @property
    def ours(self) -> str: ...
    @property
    def entries(self) -> tuple[Entry, ...]: ...
    @property
    def shape(self) -> Shape: ...
    @property
    def dtype(self) -> str: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def rows(self) -> int: ...
    @property
    def stacked(self) -> bool: ...
    @property
    def computed(self) -> bool: ...
    @property
    def cuts(self) -> bool: ...
    @property
    def growth(self) -> int: ...
    @property
    def passing(self) -> Passing | None: ...

    def fetch(self, start: int = 0, stop: int | None = None) -> Any:
        """Rows start..stop as they lie in the files, for finish(): no MLX, so any thread may do it."""

    def finish(self, raw: Any, dtype: mx.Dtype | None) -> mx.array:
        """What fetch() gave, as our tensor, evaluated. dtype: of floats; None: as the files have them."""


class OfEntries:
    """What parts have in common that take all of some published tensors, and are read along the first axis of ours."""

    entries: tuple[Entry, ...]
    shape: Shape

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries)

    @property
    def rows(self) -> int:
        return self.shape[0]


@dataclass(frozen=True)
class Part:
    """A tensor that the files hold as floats, or as MLX packs it. shape: ours, [E, M, H] for stacked or halved experts.
    """

    computed: ClassVar[bool] = False
    cuts: ClassVar[bool] = True
    growth: ClassVar[int] = 1
    passing: ClassVar[Passing] = Passing()

    ours: str
    entries: tuple[Entry, ...]
    shape: Shape
    half: int | None = None
    stacked: bool = False
    axes: tuple[int, ...] | None = None
    shifted: bool = False

    @property
    def dtype(self) -> str:
        return self.entries[0].dtype

    @property
    def nbytes(self) -> int:
        return sum(e.nbytes for e in self.entries) // (1 if self.half is None else 2)

    @property
    def rows(self) -> int:
        """The length of axis 0, along which a part can be read in pieces; 1 for a scalar."""
        return self.shape[0] if self.shape else 1

    def fetch(self, start: int = 0, stop: int | None = None, empty: Empty = np.empty) -> np.ndarray:
        """The raw rows start..stop as they lie in the file: no MLX, so any thread may do it."""
        if self.stacked:
            return files.read_stacked(self.entries[start:stop], empty=empty)
        return files.read(self.entries[0], start, stop, self.half, empty=empty)

    def finish(self, raw: np.ndarray | mx.array, dtype: mx.Dtype | None) -> mx.array:
        """What fetch() gave, as our tensor; dtype None keeps the file's. The norms' shift is added in float32.

        What MLX has already is not copied where nothing changes it.
        """
        own = DTYPES[self.dtype]
        x = as_array(raw, self.dtype)
        if self.axes:
            x = mx.contiguous(x.transpose(self.axes))
        if self.shifted:
            x = x.astype(mx.float32) + 1
        x = x.astype(dtype or own)
        mx.eval(x)
        return x


def make_part(ours: str, entries: dict[str, Entry], layout: Layout, experts: int = 0) -> Part | str:
    """How to make one of our tensors from published ones, or the name of the first that is missing."""
    # A damaged count of experts must not grow a list of names that no file could hold.
    origin = layout.source(ours, min(experts, len(entries) + 1))
    for name in origin.names:
        if name not in entries:
            return name
    chosen = tuple(entries[name] for name in origin.names)
    shape = chosen[0].shape
    axes = layout.axes(ours, shape)
    if origin.half is not None and len(shape) > 1:
        shape = (shape[0], shape[1] // 2, *shape[2:])
    if origin.stacked:
        shape = (len(chosen), *shape)
    if axes and len(axes) == len(shape):
        shape = tuple(shape[axis] for axis in axes)
    return Part(ours, chosen, shape, origin.half, origin.stacked, axes, layout.is_shifted(ours))


def as_array(raw: np.ndarray | mx.array, dtype: str) -> mx.array:
    """What files.read() gave, as MLX has it; dtype: as safetensors calls it."""
    x = raw if isinstance(raw, mx.array) else mx.array(raw)
    return x.view(mx.bfloat16) if dtype == "BF16" else x
