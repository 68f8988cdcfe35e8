"""The grids of floats that MLX has too, and what other tools put around them.

Knows nvfp4, mxfp4, mxfp8 and E4M3, in bytes and in MLX's words. Knows no config.json.

    MLX                                          other tools
    weight  U32 [out, in / 8] or [out, in / 4]   the same bytes, as U8 [out, in / 2] or F8_E4M3 [out, in]
    scales  U8 [out, in / 16] or [out, in / 32]  the same bytes, as F8_E4M3 or U8
    factors F32 [1] or [out]                     one scale a tensor, or a row, with which the product is multiplied

E4M3 with one scale for a tensor, or for a row, is mxfp8 whose own scales are 1. In smaller blocks it is dequantized.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import mlx.core as mx
import numpy as np

from mlx_qwen35.checkpoint import files
from mlx_qwen35.checkpoint.files import Entry
from mlx_qwen35.checkpoint.forms import integers
from mlx_qwen35.checkpoint.forms.blocks import CODES, Block, Fp8Part, blocks
from mlx_qwen35.checkpoint.forms.face import Made, Published, Taken
from mlx_qwen35.checkpoint.forms.integers import Integers
from mlx_qwen35.checkpoint.forms.values import as_floats
from mlx_qwen35.checkpoint.inventory import FACTORS, Shape
from mlx_qwen35.checkpoint.part import FLOATS, AnyPart, OfEntries, Part, Passing, as_array
from mlx_qwen35.config import GROUP_SIZES, QuantSpec
from mlx_qwen35.errors import CheckpointError
from mlx_qwen35.experts.cast import Step

_ONE = 127  # 2^0, as E8M0
_LARGEST = 6 * 448  # of E2M1, times that of E4M3
_NVFP4, _MXFP4, _MXFP8 = QuantSpec(4, 16, "nvfp4"), QuantSpec(4, 32, "mxfp4"), QuantSpec(8, 32, "mxfp8")
_WHOLE = ((), (1,), (1, 1))  # shapes of one scale for a tensor
# What names of their tensors have in place of ".weight"; and those that say nothing of weights.
ENDINGS = (
    ".weight_packed", ".weight_scale", ".weight_scale_inv", ".weight_scale_2", ".weight_global_scale",
    ".weight_zero_point", ".weight_g_idx",
)  # fmt: skip
UNUSED = (
    ".weight_shape", ".input_scale", ".input_zero_point", ".input_global_scale", ".output_scale",
    ".q_scale", ".k_scale", ".v_scale", ".prob_scale",
)  # fmt: skip


@dataclass(frozen=True)
class Factors(OfEntries):
    """One float32 a tensor, [1], or a row, [out]; for experts [E, 1] or [E, out].

    entries: of one value or a column, one for each expert, or a list of all experts'. inverse: whether the files have
    what values are divided by; over: what these are divided by.
    """

    ours: str
    entries: tuple[Entry, ...]
    shape: Shape
    stacked: bool
    inverse: bool = False
    over: float = 1.0
    dtype: ClassVar[str] = "F32"
    computed: ClassVar[bool] = False
    growth: ClassVar[int] = 2

    @property
    def passing(self) -> Passing | None:
        step = Step(times=1 / self.over, inverse=self.inverse)
        return Passing(None if step == Step() and self.entries[0].dtype == "F32" else step, exact=True)

    @property
    def cuts(self) -> bool:
        return True

    def fetch(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        which = slice(start, self.rows if stop is None else stop)
        if self.stacked:
            return files.read_stacked(self.entries[which]).reshape(-1, *self.shape[1:])
        whole = files.read(self.entries[0]).reshape(-1)
        if self.shape == (1,):
            return whole
        return whole[which, None] if len(self.shape) == 2 else whole[which]

    def finish(self, raw: np.ndarray | mx.array, dtype: mx.Dtype | None) -> mx.array:
        """Raises CheckpointError for what is no number, or no scale."""
        x = as_array(raw, self.entries[0].dtype).astype(mx.float32)
        if not mx.all(mx.logical_and(mx.isfinite(x), x > 0 if self.inverse else x >= 0)).item():
            raise CheckpointError(
                f"{self.entries[0]} or a neighbour holds scales that are none: this checkpoint is damaged, download it "
                "again"
            )
        x = (1 / x if self.inverse else x) * (1 / self.over)
        mx.eval(x)
        return x


@dataclass(frozen=True)
class Codes(Part):
    """E4M3 codes as words, of which none may be NaN."""

    def finish(self, raw: np.ndarray | mx.array, dtype: mx.Dtype | None) -> mx.array:
        x = as_array(raw, "U32")
        if mx.any((x.view(mx.uint8) & 0x7F) == 0x7F).item():
            raise CheckpointError(
                f"{self.entries[0]} or a neighbour holds NaN (an E4M3 code): this checkpoint is damaged, download it "
                "again"
            )
        mx.eval(x)
        return x


@dataclass(frozen=True)
class Signed(Part):
    """Bytes with a sign, as MLX's words of bytes without one, which are 128 more."""

    passing: ClassVar[Passing] = Passing(Step(signs=True))

    def finish(self, raw: np.ndarray | mx.array, dtype: mx.Dtype | None) -> mx.array:
        x = as_array(raw, "U32") ^ mx.array(0x80808080, mx.uint32)
        mx.eval(x)
        return x


@dataclass(frozen=True)
class Same(OfEntries):
    """Scales or biases that are one number everywhere, and lie nowhere. entries: those that they belong to."""

    ours: str
    entries: tuple[Entry, ...]
    shape: Shape
    stacked: bool
    value: int
    dtype: str
    computed: ClassVar[bool] = False
    cuts: ClassVar[bool] = True
    growth: ClassVar[int] = 1
    nbytes: ClassVar[int] = 0

    @property
    def passing(self) -> Passing:
        return Passing(fixed=self.value)

    def fetch(self, start: int = 0, stop: int | None = None) -> int:
        return (self.rows if stop is None else stop) - start

    def finish(self, raw: int, dtype: mx.Dtype | None) -> mx.array:
        own = mx.uint8 if self.dtype == "U8" else dtype or mx.float32
        x = mx.full((raw, *self.shape[1:]), self.value, own)
        mx.eval(x)
        return x


def by_tensors(
    ours: str, shape: Shape, found: Published, block: Block | None, dtype: str
) -> Made | list[str] | None:
    """One of our linear maps, by the published tensors that it has; as Form.make.

    block: of E4M3 with a scale for each block of a matrix; None: no word of it. dtype: of the model that was quantized.
    """
    taken = Taken(found.entries, found.stems(ours))
    packed = "weight_packed" if taken.has("weight_packed") else "weight"
    found_as, scaled_as = taken.dtype(packed), taken.dtype("weight_scale")
    if found_as == "U8":
        made = _fp4(ours, shape, taken, packed)
    elif found_as == CODES and scaled_as == "U8":
        made = _mxfp8(ours, shape, taken)
    elif found_as == CODES:
        made = _fp8(ours, shape, taken, block, dtype)
    elif found_as == "I8":
        made = _int8(ours, shape, taken, dtype)
    elif packed == "weight_packed":
        made = _integers(ours, shape, taken, dtype)
    else:
        return None
    if not isinstance(made, Made):
        return made
    return as_floats(ours, shape, made, dtype) if ours.startswith(("vision.", "mtp.")) else made


def _fp4(ours: str, shape: Shape, taken: Taken, packed: str) -> Made | list[str]:
    """Four bits: two values a byte, the first in the low half; scales tell nvfp4 and mxfp4 apart."""
    spec = _MXFP4 if taken.dtype("weight_scale") == "U8" else _NVFP4
    *_, height, width = shape
    if width % spec.group_size:
        return [_undivided(taken.stems[0], shape, spec.group_size)]
    words = taken.take(packed, ("U8",), (height, width // 2))
    scales = taken.take("weight_scale", ("U8" if spec is _MXFP4 else CODES,), (height, width // spec.group_size))
    factors, inverse = (), taken.has("weight_global_scale")
    if spec is _NVFP4:
        factors = taken.take("weight_global_scale" if inverse else "weight_scale_2", FLOATS, *_WHOLE)
    if taken.problems:
        return taken.problems
    return _made(ours, shape, words, scales, spec, factors, inverse)


def _mxfp8(ours: str, shape: Shape, taken: Taken) -> Made | list[str]:
    *_, height, width = shape
    if width % _MXFP8.group_size:
        return [_undivided(taken.stems[0], shape, _MXFP8.group_size)]
    words = taken.take("weight", (CODES,), (height, width))
    scales = taken.take("weight_scale", ("U8",), (height, width // _MXFP8.group_size))
    return taken.problems or _made(ours, shape, words, scales, _MXFP8)


def _made(
    ours: str,
    shape: Shape,
    words: tuple[Entry, ...],
    scales: tuple[Entry, ...],
    spec: QuantSpec,
    factors: tuple[Entry, ...] = (),
    inverse: bool = False,
) -> Made:
    """MLX's own bytes: nothing is changed but what they are called."""
    *outer, width = shape
    stacked, module = len(shape) == 3, ours.removesuffix(".weight")
    per_word, row = 32 // spec.bits, shape[-2]
    words = tuple(replace(entry, dtype="U32", shape=(row, width // per_word)) for entry in words)
    scales = tuple(replace(entry, dtype="U8") for entry in scales)
    kind = Codes if spec.mode == "mxfp8" else Part
    parts: dict[str, AnyPart] = {
        ours: kind(ours, words, (*outer, width // per_word), stacked=stacked),
        f"{module}.scales": Part(f"{module}.scales", scales, (*outer, width // spec.group_size), stacked=stacked),
    }
    if factors:
        parts[f"{module}{FACTORS}"] = _factors(module, shape, factors, inverse)
    return Made(parts, spec)


def _factors(module: str, shape: Shape, entries: tuple[Entry, ...], inverse: bool = False) -> Factors:
    size = 1 if entries[0].shape in _WHOLE else shape[-2]
    listed = tuple(replace(entry, shape=(size,)) for entry in entries)
    return Factors(f"{module}{FACTORS}", listed, (*shape[:-2], size), len(shape) == 3, inverse)


def global_scale(module: str, shape: Shape, entry: Entry) -> Factors | str:
    """mlx-lm's one scale a tensor beside nvfp4, [E] for a stack of experts; or what is wrong with it, in words.

    MLX divides by the largest value that codes and scales of groups make together.
    """
    due = shape[:1] if len(shape) == 3 else (1,)
    if entry.dtype != "F32" or entry.shape not in (due, () if due == (1,) else due):
        return f"{entry} is {entry.dtype} {list(entry.shape)}, expected F32 {list(due)}"
    return Factors(f"{module}{FACTORS}", (entry,), (*due, 1) if len(shape) == 3 else due, False, over=_LARGEST)


def _fp8(ours: str, shape: Shape, taken: Taken, block: Block | None, dtype: str) -> Made | list[str]:
    """E4M3 with a scale for the tensor, for each row, or for each block."""
    *outer, height, width = shape
    stacked, module = len(shape) == 3, ours.removesuffix(".weight")
    codes = taken.take("weight", (CODES,), (height, width))
    blocked = (blocks((height, width), block),) if block else ()
    kind = "weight_scale" if taken.has("weight_scale") else "weight_scale_inv"
    scales = taken.take(kind, FLOATS, *blocked, *_WHOLE, (height,), (height, 1))
    if taken.problems:
        return taken.problems
    per_block = scales[0].shape in blocked
    if per_block or width % _MXFP8.group_size:
        size = block if per_block else (height if scales[0].shape in _WHOLE else 1, width)
        grid = tuple(replace(entry, shape=blocks((height, width), size)) for entry in scales)
        return Made({ours: Fp8Part(Part(ours, codes, shape, stacked=stacked), grid, dtype, size)})
    words = tuple(replace(entry, dtype="U32", shape=(height, width // 4)) for entry in codes)
    groups = (*outer, height, width // _MXFP8.group_size)
    parts = (
        Codes(ours, words, (*outer, height, width // 4), stacked=stacked),
        Same(f"{module}.scales", codes, groups, stacked, _ONE, "U8"),
        _factors(module, shape, scales),
    )
    return Made({part.ours: part for part in parts}, _MXFP8)


def _int8(ours: str, shape: Shape, taken: Taken, dtype: str) -> Made | list[str]:
    """Eight bits with a sign, and a scale for the tensor or for each row: affine with steps of 1 from -128 on."""
    *_, height, width = shape
    module = ours.removesuffix(".weight")
    codes = taken.take("weight", ("I8",), (height, width))
    scales = taken.take("weight_scale", FLOATS, (height, 1), (height,), *_WHOLE)
    group = next((size for size in reversed(GROUP_SIZES["affine"]) if width % size == 0), None)
    if group is None:
        return [_undivided(taken.stems[0], shape, GROUP_SIZES["affine"][0])]
    if taken.problems:
        return taken.problems
    return signed_bytes(module, shape, codes, _factors(module, shape, scales), dtype)


def signed_bytes(module: str, shape: Shape, codes: tuple[Entry, ...], factors: AnyPart, dtype: str) -> Made:
    """I8 [out, in] as affine words, whose product is multiplied by factors."""
    *outer, width = shape
    group = next(size for size in reversed(GROUP_SIZES["affine"]) if width % size == 0)
    words = tuple(replace(entry, dtype="U32", shape=(shape[-2], width // 4)) for entry in codes)
    stacked, groups = len(shape) == 3, (*outer, width // group)
    parts = (
        Signed(f"{module}.weight", words, (*outer, width // 4), stacked=stacked),
        Same(f"{module}.scales", codes, groups, stacked, 1, dtype),
        Same(f"{module}.biases", codes, groups, stacked, -128, dtype),
        factors,
    )
    return Made({part.ours: part for part in parts}, QuantSpec(8, group, "affine"))


def _integers(ours: str, shape: Shape, taken: Taken, dtype: str) -> Made | list[str]:
    """compressed-tensors' packed integers: of as many bits as words are wide."""
    *_, height, width = shape
    entry = taken.entries.get(f"{taken.stems[0]}.weight_packed")
    words = entry.shape[-1] if entry is not None and len(entry.shape) == 2 else 0
    bits = next((bits for bits in (2, 4, 8) if words == -(-width * bits // 32)), 4)
    if width * bits % 32:
        return [_undivided(taken.stems[0], shape, 32 // bits)]
    codes = taken.take("weight_packed", ("I32",), (height, width * bits // 32))
    first = taken.entries.get(f"{taken.stems[0]}.weight_scale")
    groups = first.shape[-1] if first is not None and len(first.shape) == 2 else 1
    if not groups or width % groups:
        return [f"{first} has shape {list(first.shape)}, and {width} columns are not divided so"]
    scales = taken.take("weight_scale", FLOATS, (height, groups))
    zeros, order = (), ()
    if taken.has("weight_zero_point"):
        zeros = taken.take("weight_zero_point", ("I32",), (-(-height * bits // 32), groups))
    if taken.has("weight_g_idx"):
        order = taken.take("weight_g_idx", ("I32",), (width,))
    if taken.problems:
        return taken.problems
    of = Integers(integers.compressed(bits, height), shape, codes, scales, zeros, order, 1 << bits - 1, dtype)
    made = of.made(ours)
    if zeros or order or of.repeats > 1 or made.spec is None:
        return made
    # Their words and scales are MLX's, byte for byte.
    module, stacked = ours.removesuffix(".weight"), len(shape) == 3
    own = tuple(replace(entry, dtype="U32") for entry in codes)
    same = {
        ours: Part(ours, own, made.parts[ours].shape, stacked=stacked),
        f"{module}.scales": Part(f"{module}.scales", scales, made.parts[f"{module}.scales"].shape, stacked=stacked),
    }
    return replace(made, parts={**made.parts, **same})


def _undivided(stem: str, shape: Shape, size: int) -> str:
    return f"{stem} is a {list(shape[-2:])} map, whose rows groups of {size} do not divide"
