"""Integers in groups, as several tools store them, as the affine quantization of MLX that they are.

Knows how such integers, their scales and zeros are packed by each tool, and what they are in MLX's terms. Knows no
config.json. Nothing is quantized again: value = scale * (q - zero) there, and scale * q + bias here.

    weight   [.., out, in * bits / 32] uint32, q in a stream of bits, the first in the lowest
    scales   [.., out, in / group]
    biases   [.., out, in / group] = -zero * scale

A zero that is a power of two has a bias with as few digits as its scale. Others take up to eight digits more: their
scales and biases are float32, in which scale * q + bias is exact as long as the files' scales have 16 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx
import numpy as np

from mlx_qwen35.checkpoint import files
from mlx_qwen35.checkpoint.files import Entry
from mlx_qwen35.checkpoint.forms.face import Made
from mlx_qwen35.checkpoint.inventory import Shape
from mlx_qwen35.checkpoint.part import DTYPES, OfEntries, Passing, as_array
from mlx_qwen35.config import GROUP_SIZES, QuantSpec
from mlx_qwen35.experts.cast import Step

_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # where in a word AWQ has the values 0 to 7


@dataclass(frozen=True)
class Packing:
    """How a tool packs. across: the files have a map's rows as columns; words: what the files have of the integers ->
    uint32 [.., out, in * bits / 32]; zeros: what they have of the zeros -> [.., out, groups] int. apart: whether each
    of those columns holds one row, and not several in a word."""

    bits: int
    across: bool
    words: Callable[[np.ndarray], np.ndarray]
    zeros: Callable[[np.ndarray], np.ndarray]
    apart: bool = True


@dataclass(frozen=True)
class Integers:
    """One of our linear maps, or a stack of them, in integers.

    shape: unquantized. codes, scales, zeros, order: the published tensors, one for each expert. zeros: (): they all are
    `middle`, or were found to be. order: the group of each column, where groups are not neighbours. dtype: of the
    model that was quantized, as safetensors calls it.
    """

    packing: Packing
    shape: Shape
    codes: tuple[Entry, ...]
    scales: tuple[Entry, ...]
    zeros: tuple[Entry, ...] = ()
    order: tuple[Entry, ...] = ()
    middle: int = 0
    dtype: str = "BF16"

    @property
    def stacked(self) -> bool:
        return len(self.shape) == 3

    @property
    def groups(self) -> int:
        """Of a row, in the files."""
        shape = self.scales[0].shape
        return shape[0] if self.packing.across else (shape[1] if len(shape) > 1 else 1)

    @property
    def repeats(self) -> int:
        """How many groups of MLX have the scale of one of the files'."""
        width = self.shape[-1]
        size = width // self.groups
        return size // next((group for group in reversed(GROUP_SIZES["affine"]) if size % group == 0), size)

    @property
    def spec(self) -> QuantSpec:
        return QuantSpec(self.packing.bits, self.shape[-1] // self.groups // self.repeats, "affine")

    def made(self, ours: str) -> Made:
        """The parts of one of our weights."""
        if self.order or self.spec.group_size not in GROUP_SIZES["affine"]:
            return Made({ours: Dequantized(ours, self)})
        module = ours.removesuffix(".weight")
        parts = Words(ours, self), Lines(f"{module}.scales", self, False), Lines(f"{module}.biases", self, True)
        return Made({part.ours: part for part in parts}, self.spec)


@dataclass(frozen=True)
class _OfIntegers(OfEntries):
    """What the parts of a map have in common."""

    ours: str
    of: Integers

    @property
    def stacked(self) -> bool:
        return self.of.stacked

    @property
    def passing(self) -> Passing | None:
        return None

    @property
    def cuts(self) -> bool:
        """Experts lie apart; of a map whose rows share words, all are read for any."""
        return self.stacked or self.of.packing.apart

    def _read(self, entries: tuple[Entry, ...], which: slice, *, whole: bool = False) -> np.ndarray:
        """Rows of ours out of published tensors; whole: whatever rows, but of experts."""
        if self.stacked:
            return files.read_stacked(entries[which])
        if whole or not self.cuts or which == slice(0, self.rows):
            return files.read(entries[0])
        read = files.read_columns if self.of.packing.across else files.read
        return read(entries[0], which.start, which.stop)

    def _mine(self, made: np.ndarray, which: slice, *, whole: bool = False) -> np.ndarray:
        """What was made of _read(), without the rows that were only read along."""
        return made[which] if not self.stacked and (whole or not self.cuts) else made

    def _zeros(self, which: slice) -> np.ndarray:
        return self._mine(self.of.packing.zeros(self._read(self.of.zeros, which, whole=True)), which, whole=True)

    def _scales(self, which: slice) -> np.ndarray:
        scales = self._read(self.of.scales, which)
        scales = scales.swapaxes(-1, -2) if self.of.packing.across else scales
        scales = scales if scales.ndim == len(self.of.shape) else scales[..., None]
        return np.ascontiguousarray(self._mine(scales, which))

    def _slice(self, start: int, stop: int | None) -> slice:
        return slice(start, self.rows if stop is None else stop)


@dataclass(frozen=True)
class Words(_OfIntegers):
    """The integers, as MLX packs them."""

    dtype: ClassVar[str] = "U32"
    computed: ClassVar[bool] = False
    growth: ClassVar[int] = 1

    @property
    def entries(self) -> tuple[Entry, ...]:
        return self.of.codes

    @property
    def shape(self) -> Shape:
        return (*self.of.shape[:-1], self.of.shape[-1] * self.of.packing.bits // 32)

    def fetch(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        which = self._slice(start, stop)
        return np.ascontiguousarray(self._mine(self.of.packing.words(self._read(self.of.codes, which)), which))

    def finish(self, raw: np.ndarray | mx.array, dtype: mx.Dtype | None) -> mx.array:
        x = as_array(raw, "U32")
        mx.eval(x)
        return x


@dataclass(frozen=True)
class Lines(_OfIntegers):
    """The scales of the groups, or their biases."""

    is_bias: bool
    computed: ClassVar[bool] = False

    @property
    def entries(self) -> tuple[Entry, ...]:
        return self.of.scales + (self.of.zeros if self.is_bias else ())

    @property
    def dtype(self) -> str:
        return "F32" if self.of.zeros else self.of.scales[0].dtype

    @property
    def shape(self) -> Shape:
        return (*self.of.shape[:-1], self.of.groups * self.of.repeats)

    @property
    def nbytes(self) -> int:
        """Of the biases only what is theirs: the scales count as scales."""
        return sum(entry.nbytes for entry in (self.of.zeros if self.is_bias else self.of.scales))

    @property
    def growth(self) -> int:
        return 2 * self.of.repeats

    @property
    def passing(self) -> Passing | None:
        """Of groups that are MLX's own, with one zero for all: the scales as they are, or times that zero."""
        of = self.of
        if not of.stacked or of.packing.across or of.zeros or of.repeats > 1:
            return None
        return Passing(Step(times=-of.middle)) if self.is_bias else Passing()

    def fetch(self, start: int = 0, stop: int | None = None) -> tuple[np.ndarray, np.ndarray | None]:
        which = self._slice(start, stop)
        return self._scales(which), self._zeros(which) if self.is_bias and self.of.zeros else None

    def finish(self, raw: tuple[np.ndarray, np.ndarray | None], dtype: mx.Dtype | None) -> mx.array:
        scales, zeros = raw
        x = as_array(scales, self.of.scales[0].dtype)
        if zeros is not None:
            x = -mx.array(zeros.astype(np.float32)) * x.astype(mx.float32)
        elif self.is_bias:
            x = -self.of.middle * x
        if self.of.repeats > 1:
            x = mx.repeat(x, self.of.repeats, axis=-1)
        x = mx.contiguous(x.astype(dtype or DTYPES[self.dtype]))
        mx.eval(x)
        return x


@dataclass(frozen=True)
class Dequantized(_OfIntegers):
    """The values themselves, where MLX has no such groups: of scattered columns, or of other sizes."""

    computed: ClassVar[bool] = True

    @property
    def entries(self) -> tuple[Entry, ...]:
        return self.of.codes + self.of.scales + self.of.zeros + self.of.order

    @property
    def dtype(self) -> str:
        return self.of.dtype

    @property
    def shape(self) -> Shape:
        return self.of.shape

    @property
    def growth(self) -> int:
        return 32 // self.of.packing.bits

    def fetch(
        self, start: int = 0, stop: int | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray]:
        """Words, scales, zeros of rows start..stop, and which group each column is in, for each expert or once."""
        which = self._slice(start, stop)
        words = self._mine(self.of.packing.words(self._read(self.of.codes, which)), which)
        zeros = self._zeros(which) if self.of.zeros else None
        if self.of.order:
            order = files.read_stacked(self.of.order[which] if self.stacked else self.of.order)
        else:
            width = self.of.shape[-1]
            order = np.arange(width)[None] // (width // self.of.groups)
        return words, self._scales(which), zeros, order

    def finish(
        self, raw: tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray], dtype: mx.Dtype | None
    ) -> mx.array:
        words, scales, zeros, order = raw
        codes = mx.array(unpacked(np.ascontiguousarray(words), self.of.packing.bits))
        scales = as_array(scales, self.of.scales[0].dtype).astype(mx.float32)
        columns = mx.array(order.astype(np.uint32))
        columns = mx.broadcast_to(columns[:, None] if self.stacked else columns, codes.shape)
        q = codes.astype(mx.float32)
        if zeros is None:
            q = q - self.of.middle
        else:
            q = q - mx.take_along_axis(mx.array(zeros.astype(np.float32)), columns, axis=-1)
        x = (q * mx.take_along_axis(scales, columns, axis=-1)).astype(dtype or mx.float32)
        mx.eval(x)
        return x


def gptq(bits: int, lower: int) -> Packing:
    """GPTQ's: [in * bits / 32, out], streams of bits down the columns; zeros [groups, out * bits / 32], stored `lower`
    below themselves."""

    def zeros(raw: np.ndarray) -> np.ndarray:
        return (unpacked(raw.view(np.uint32), bits).astype(np.int64) + lower).swapaxes(-1, -2)

    return Packing(bits, True, lambda raw: raw.view(np.uint32).swapaxes(-1, -2), zeros)


def awq() -> Packing:
    """AWQ's: [in, out / 8], words of eight rows in an order of its own; zeros [groups, out / 8] alike."""

    def codes(raw: np.ndarray) -> np.ndarray:
        found = unpacked(raw.view(np.uint32), 4)
        found = found.reshape(*found.shape[:-1], -1, 8)[..., _AWQ_PLACES]
        return found.reshape(*found.shape[:-2], -1).swapaxes(-1, -2)

    def words(raw: np.ndarray) -> np.ndarray:
        found = codes(raw)
        return np.ascontiguousarray(found[..., 0::2] | found[..., 1::2] << 4).view(np.uint32)

    return Packing(4, True, words, codes, apart=False)


def compressed(bits: int, rows: int) -> Packing:
    """compressed-tensors': [out, in * bits / 32] as MLX has it; zeros [out * bits / 32, groups], streams of bits down
    the columns, the last word perhaps not full. rows: of a map."""

    def zeros(raw: np.ndarray) -> np.ndarray:
        return unpacked(np.ascontiguousarray(raw.swapaxes(-1, -2)).view(np.uint32), bits)[..., :rows].swapaxes(-1, -2)

    return Packing(bits, False, lambda raw: raw.view(np.uint32), zeros)


def unpacked(words: np.ndarray, bits: int) -> np.ndarray:
    """uint32 [.., n] -> its integers [.., n * 32 / bits], uint8; a stream of bits, the first in the lowest."""
    found = np.ascontiguousarray(words).view(np.uint8)
    if 8 % bits == 0:
        places = np.arange(0, 8, bits, dtype=np.uint8)
        return (found[..., None] >> places & ((1 << bits) - 1)).reshape(*words.shape[:-1], -1)
    each = np.unpackbits(found, axis=-1, bitorder="little").reshape(*words.shape[:-1], -1, bits)
    return (each << np.arange(bits, dtype=np.uint8)).sum(-1, dtype=np.uint8)
