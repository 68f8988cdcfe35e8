"""bitsandbytes' checkpoints: nf4 and fp4 in blocks of a flat tensor, and int8 with a scale for each row.

Knows quantization_config of quant_method "bitsandbytes", and what its library keeps beside a weight.

    X.weight                   U8 [out * in / 2, 1]     two places of a table a byte, the first in the high half
    X.weight.quant_map         F32 [16]                 the table
    X.weight.absmax            F32 [blocks]             value = table[place] * absmax of its block; or, twice quantized,
    X.weight.absmax            U8 [blocks]              places of nested_quant_map, F32 [256]: times nested_absmax of
    X.weight.nested_absmax     F32 [blocks / 256]       their block, plus nested_offset
    X.weight.quant_state.*     U8                       JSON: blocksize, nested_blocksize, nested_offset, shape
    X.weight, X.SCB            I8 [out, in], F32 [out]  value = q * SCB / 127
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import mlx.core as mx
import numpy as np

from mlx_qwen35.checkpoint import files
from mlx_qwen35.checkpoint.files import Entry
from mlx_qwen35.checkpoint.forms.face import LEAST, Made, Published, Taken, named_dtype
from mlx_qwen35.checkpoint.forms.grids import Factors, as_floats, signed_bytes
from mlx_qwen35.checkpoint.inventory import FACTORS, Shape, is_linear
from mlx_qwen35.checkpoint.part import OfEntries
from mlx_qwen35.config import GROUP_SIZES
from mlx_qwen35.errors import CheckpointError

_STATES = tuple(f"weight.quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4"))
_KINDS = ("weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map", *_STATES, "SCB")
_MOST_STATE = 1 << 16  # bytes of JSON
_RANGE = 127  # of int8


@dataclass(frozen=True)
class BitsAndBytes:
    """What config.json says. dtype: of the model that was quantized."""

    dtype: str
    name: ClassVar[str] = "bitsandbytes"
    endings: ClassVar[tuple[str, ...]] = tuple(f".{kind}" for kind in _KINDS)
    streams: ClassVar[bool] = False
    unused: ClassVar[tuple[str, ...]] = (".weight_format",)
    spec: ClassVar[None] = None

    def make(self, ours: str, shape: Shape, found: Published) -> Made | list[str] | None:
        """A linear map: nf4 and fp4 dequantized, int8 packed as MLX has it."""
        taken = Taken(found.entries, found.stems(ours) if is_linear(ours, shape) else ())
        if taken.has("weight.absmax"):
            return _four_bits(ours, shape, taken, self.dtype)
        return _int8(ours, shape, taken, self.dtype) if taken.has("SCB") else None

    def left_over(self, entry: Entry) -> str | None:
        if not entry.name.endswith(self.endings):
            return None
        return f"{entry} is left over: it has no part of its own in a linear map that is quantized so"


@dataclass(frozen=True)
class FourBits(OfEntries):
    """A map, or a stack of maps, in blocks. One entry of each kind for each expert; nested: () or (absmax, table)."""

    ours: str
    shape: Shape
    codes: tuple[Entry, ...]
    absmax: tuple[Entry, ...]
    table: tuple[Entry, ...]
    state: tuple[Entry, ...]
    nested: tuple[tuple[Entry, ...], ...]
    dtype: str
    computed: ClassVar[bool] = True
    cuts: ClassVar[bool] = True
    growth: ClassVar[int] = 8
    passing: ClassVar[None] = None

    @property
    def entries(self) -> tuple[Entry, ...]:
        return self.codes + self.absmax + self.table + self.state + tuple(e for kind in self.nested for e in kind)

    @property
    def stacked(self) -> bool:
        return len(self.shape) == 3

    def fetch(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows start..stop as float32; raises CheckpointError where a state does not fit."""
        stop = self.rows if stop is None else stop
        if self.stacked:
            return np.stack([self._values(expert, 0, self.shape[1]) for expert in range(start, stop)])
        return self._values(0, start, stop)

    def finish(self, raw: np.ndarray | mx.array, dtype: mx.Dtype | None) -> mx.array:
        x = mx.array(raw).astype(dtype or mx.float32)
        mx.eval(x)
        return x

    def _values(self, which: int, start: int, stop: int) -> np.ndarray:
        """Rows of one map."""
        width, state = self.shape[-1], self._state(which)
        begin, end = start * width, stop * width
        codes = files.read(self.codes[which], begin // 2, end // 2).reshape(-1)
        places = np.stack([codes >> 4, codes & 15], axis=-1).reshape(-1)
        first = begin // state["blocksize"]
        blocks = np.arange(begin, end) // state["blocksize"] - first
        scales = files.read(self.absmax[which], first, first + int(blocks[-1]) + 1).astype(np.float32)
        if self.nested:
            nested, table = (files.read(kind[which]).reshape(-1) for kind in self.nested)
            outer = (np.arange(len(scales)) + first) // state["nested_blocksize"]
            scales = table[scales.astype(np.int64)] * nested[outer] + np.float32(state["nested_offset"])
        values = files.read(self.table[which]).reshape(-1)[places] * scales[blocks]
        return values.astype(np.float32).reshape(stop - start, width)

    def _state(self, which: int) -> dict[str, Any]:
        entry = self.state[which]
        try:
            found = json.loads(files.read(entry).tobytes())
            state = {"blocksize": found["blocksize"], "nested_blocksize": 256, "nested_offset": 0.0}
            if self.nested:
                state |= {key: found[key] for key in ("nested_blocksize", "nested_offset")}
            sizes = [state["blocksize"], state["nested_blocksize"]]
            good = all(type(size) is int and size > 0 for size in sizes) and found["shape"] == [*self.shape[-2:]]
            if not good or not isinstance(state["nested_offset"], (int, float)):
                raise ValueError("sizes that do not fit")
            blocks = -(-self.shape[-1] * self.shape[-2] // sizes[0])
            if self.absmax[which].shape[0] != blocks:
                raise ValueError(f"blocks of {sizes[0]} and {self.absmax[which].shape[0]} scales")
            if self.nested and self.nested[0][which].shape[0] < -(-blocks // sizes[1]):
                raise ValueError(f"{self.nested[0][which].shape[0]} nested scales")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{entry} does not describe its weight ({error}): download it again") from None
        return state


def _four_bits(ours: str, shape: Shape, taken: Taken, dtype: str) -> Made | list[str]:
    *_, height, width = shape
    if width % 2:
        return [f"{taken.stems[0]} has rows of {width} values, which bytes of two do not divide"]
    codes = taken.take("weight", ("U8",), (height * width // 2, 1))
    many = taken.dtype("weight.absmax") == "U8"
    absmax = taken.alike("weight.absmax", ("U8",) if many else ("F32",))
    table = taken.take("weight.quant_map", ("F32",), (16,))
    state = taken.alike(next((kind for kind in _STATES if taken.has(kind)), _STATES[0]), ("U8",), most=_MOST_STATE)
    nested: tuple[tuple[Entry, ...], ...] = ()
    if many:
        nested = (
            taken.alike("weight.nested_absmax", ("F32",)),
            taken.take("weight.nested_quant_map", ("F32",), (256,)),
        )
    if taken.problems:
        return taken.problems
    return Made({ours: FourBits(ours, shape, codes, absmax, table, state, nested, dtype)})


def _int8(ours: str, shape: Shape, taken: Taken, dtype: str) -> Made | list[str]:
    *_, height, width = shape
    if width % GROUP_SIZES["affine"][0]:
        return [f"{taken.stems[0]} has rows of {width} values, which groups of MLX do not divide"]
    codes, scales = taken.take("weight", ("I8",), (height, width)), taken.take("SCB", ("F32",), (height,))
    if taken.problems:
        return taken.problems
    module = ours.removesuffix(".weight")
    factors = Factors(f"{module}{FACTORS}", scales, (*shape[:-2], height), len(shape) == 3, over=_RANGE)
    made = signed_bytes(module, shape, codes, factors, dtype)
    return as_floats(ours, shape, made, dtype) if ours.startswith(("vision.", "mtp.")) else made


def read_config(section: Mapping[str, Any], raw: Mapping[str, Any], where: str) -> BitsAndBytes:
    """What a quantization_config of bitsandbytes says; raises CheckpointError for what of it is not read.

    raw: all of config.json; where: the file, for errors.
    """
    kind = section.get("bnb_4bit_quant_type", "nf4")
    if section.get("load_in_4bit") and kind not in ("nf4", "fp4"):
        raise CheckpointError(
            f"{where}: quantization_config.bnb_4bit_quant_type is {kind!r:.40}, and only 'nf4' and 'fp4' are read: "
            f"{LEAST}"
        )
    return BitsAndBytes(named_dtype(raw))
