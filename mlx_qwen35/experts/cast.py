"""A file's bytes as those of memory that is there already, and without MLX: floats of another dtype, or a step more.

Knows bit patterns. Every bit is what mx.array(...).astype(...) gives on the CPU: rounded to nearest even, and NaN as
MLX writes it. A thread that reads can so convert what it has read; MLX would have to allocate, and to be waited for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Convert = Callable[[memoryview, memoryview], None]

_TAGS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_AT_ONCE = 1 << 16  # items: what is made on the way stays in a processor's cache


@dataclass(frozen=True)
class Step:
    """What else becomes of a file's numbers. signs: of bytes, whose first bit is turned; times: of floats, in float32;
    inverse: before that, one over each."""

    signs: bool = False
    times: float = 1.0
    inverse: bool = False


def converter(from_tag: str, to: str, step: Step | None = None) -> Convert | None:
    """What turns the raw bytes of a tensor into those of another dtype: (file's bytes, memory to be filled).

    from_tag: as safetensors calls it, "F32", "F16" or "BF16"; to: "float32", "float16" or "bfloat16". None: the bytes
    are the same. Raises ValueError for other dtypes. Any stretch of whole items can be converted by itself.
    """
    if step is not None:
        return _turned if step.signs else _stepped(from_tag, to, step)
    tag = _TAGS.get(to)
    if tag is None or from_tag not in _STORED:
        raise ValueError(f"no conversion from {from_tag} to {to}: floats are {', '.join(_STORED)}")
    if tag == from_tag:
        return None
    source, target = _STORED[from_tag], _STORED[tag]
    widen, narrow = _WIDEN[from_tag], _NARROW[tag]

    def convert(raw: memoryview, out: memoryview) -> None:
        items, made = np.frombuffer(raw, source), np.frombuffer(out, target)
        if items.size != made.size:
            raise ValueError(f"{items.size} items of {from_tag} do not fill {made.size} of {to}")
        for start in range(0, items.size, _AT_ONCE):
            made[start : start + _AT_ONCE] = narrow(widen(items[start : start + _AT_ONCE]))

    return convert


def _turned(raw: memoryview, out: memoryview) -> None:
    np.bitwise_xor(np.frombuffer(raw, np.uint8), np.uint8(0x80), out=np.frombuffer(out, np.uint8))


def _stepped(from_tag: str, to: str, step: Step) -> Convert:
    source, target = _STORED[from_tag], _STORED[_TAGS[to]]
    widen, narrow = _WIDEN[from_tag], _NARROW[_TAGS[to]]

    def convert(raw: memoryview, out: memoryview) -> None:
        found = widen(np.frombuffer(raw, source)).view(np.float32)
        found = (1 / found if step.inverse else found) * np.float32(step.times)
        np.frombuffer(out, target)[:] = narrow(found.astype(np.float32).view(np.uint32))

    return convert


def _same(bits: np.ndarray) -> np.ndarray:
    return bits


def _from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return np.left_shift(bits, 16, dtype=np.uint32)


def _from_float16(bits: np.ndarray) -> np.ndarray:
    wide = bits.view(np.float16).astype(np.float32).view(np.uint32)
    wide[_is_nan(wide)] |= 0x400000  # made quiet
    return wide


def _to_bfloat16(bits: np.ndarray) -> np.ndarray:
    odd = (bits >> 16) & 1
    # What overflows is NaN, which is replaced.
    rounded = ((bits + np.uint32(0x7FFF) + odd) >> 16).astype(np.uint16)
    rounded[_is_nan(bits)] = 0x7FC0
    return rounded


def _to_float16(bits: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        half = bits.view(np.float32).astype(np.float16).view(np.uint16)
    nan = _is_nan(bits)
    half[nan] = (bits[nan] >> 16 & 0x8000) | 0x7D00
    return half


def _is_nan(bits: np.ndarray) -> np.ndarray:
    return (bits & 0x7FFFFFFF) > 0x7F800000


# All of them by their bits. What is widened is float32.
_STORED = {"F32": np.uint32, "F16": np.uint16, "BF16": np.uint16}
_WIDEN = {"F32": _same, "F16": _from_float16, "BF16": _from_bfloat16}
_NARROW = {"F32": _same, "F16": _to_float16, "BF16": _to_bfloat16}
