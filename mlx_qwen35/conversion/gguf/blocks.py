"""float32 values to the bytes of GGUF's tensor types, as ggml's reference quantizers make them, bit for bit.

Knows blocks of 32 values and how each type rounds them (quantize_row_*_ref in ggml-quants.c, whose products are not
fused with sums). Knows neither tensors nor files.

    F32, F16, BF16   each value by itself, to the nearest, ties to even
    Q8_0             d, 32 codes of a byte:           x ~ d * q,        d = max |x| / 127
    Q4_0             d, 16 bytes of two codes:        x ~ d * (q - 8),  d = x of the largest |x| / -8
    Q4_1             d, m, 16 bytes of two codes:     x ~ d * q + m,    m = min, d = (max - min) / 15
    MXFP4            e, 16 bytes of two E2M1 codes:   x ~ 2^(e - 127) * value

d and m are float16. The first 16 values of a block are the low halves of its 16 bytes, the others the high ones.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

VALUES = 32  # of a block
_MIDDLES = (0.5, 1.5, 2.5, 3.5, 5, 7, 10)  # between the magnitudes 0, 1, 2, 3, 4, 6, 8, 12 of E2M1, doubled


_STEPS = 8  # of float16's smallest, 6e-8: a number of fewer is off by more than a sixteenth


class Overflow(ValueError):
    """A value is larger than the type holds."""


def encode(values: np.ndarray, kind: str) -> np.ndarray:
    """float32 [.., n] -> uint8 [.., bytes of a row]; kind: a name of checkpoint.gguf.types.KINDS that ENCODERS has.

    Raises Overflow where a float16, value or scale, would be infinite. n is a multiple of the type's block.
    """
    values = np.ascontiguousarray(values, np.float32)
    found = ENCODERS[kind](values.reshape(-1, VALUES) if kind in BLOCKED else values)
    return found.reshape(*values.shape[:-1], -1)


def faint(made: np.ndarray, values: np.ndarray, kind: str) -> tuple[int, int]:
    """(how many blocks that encode() made of `values` [rows, n] have weights so small that float16 loses more than a
    sixteenth of the largest of them, or all; how many blocks there are). A row is a block of F16; nothing is so small
    for F32, BF16 and MXFP4."""
    most = _FAINT.get(kind)
    if most is None:
        return 0, 0
    values = values if kind == "F16" else values.reshape(-1, VALUES)
    heads = made.reshape(len(values), -1)
    heads = heads if kind == "F16" else heads[:, : 2 * len(most)]
    halves = np.ascontiguousarray(heads).view(np.uint16) & 0x7FFF
    small = np.flatnonzero((halves < most).all(axis=1))
    return int((values[small] != 0).any(axis=1).sum()), len(values)


def _f32(values: np.ndarray) -> np.ndarray:
    return values.view(np.uint8)


def _f16(values: np.ndarray) -> np.ndarray:
    return _halves(values).view(np.uint8)


def _bf16(values: np.ndarray) -> np.ndarray:
    bits = values.view(np.uint32)
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits  # no number overflows: the largest becomes infinite
    return (rounded >> 16).astype(np.uint16).view(np.uint8)


def _q8_0(blocks: np.ndarray) -> np.ndarray:
    scales = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    scaled = blocks * _inverse(scales)
    whole = np.trunc(scaled)
    scaled -= whole  # exact, and so is twice of it: halves go away from zero
    scaled *= 2
    whole += np.trunc(scaled, out=scaled)
    return _joined(scales, codes=whole.astype(np.int8).view(np.uint8))


def _q4_0(blocks: np.ndarray) -> np.ndarray:
    largest = np.abs(blocks).argmax(axis=1)[:, None]
    scales = np.take_along_axis(blocks, largest, axis=1) / np.float32(-8)
    scaled = blocks * _inverse(scales)
    scaled += np.float32(8.5)
    return _joined(scales, codes=_paired(np.minimum(scaled, 15, out=scaled).astype(np.uint8)))


def _q4_1(blocks: np.ndarray) -> np.ndarray:
    least = blocks.min(axis=1, keepdims=True)
    scales = (blocks.max(axis=1, keepdims=True) - least) / np.float32(15)
    scaled = blocks - least
    scaled *= _inverse(scales)
    scaled += np.float32(0.5)
    return _joined(scales, least, codes=_paired(np.minimum(scaled, 15, out=scaled).astype(np.uint8)))


def _mxfp4(blocks: np.ndarray) -> np.ndarray:
    magnitudes = np.abs(blocks)
    largest = magnitudes.max(axis=1, keepdims=True)
    with np.errstate(divide="ignore"):
        exponents = np.floor(np.log2(largest)) + np.float32(125)  # -2 and the bias of 127
    exponents = np.maximum(exponents, 0)
    magnitudes /= np.ldexp(np.float32(0.5), exponents.astype(np.int32) - 127)
    codes = np.zeros(blocks.shape, np.uint8)
    for middle in _MIDDLES:  # a value in the middle takes the smaller magnitude
        codes += magnitudes > middle
    codes |= ((blocks < 0) & (codes > 0)).astype(np.uint8) << 3
    return _joined(codes=_paired(codes), first=exponents.astype(np.uint8))


def _inverse(scales: np.ndarray) -> np.ndarray:
    """1 / scales, and 0 for those that float16 has as 0 anyway because nothing is left of them."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1) / scales
    inverse[~np.isfinite(inverse)] = 0
    return inverse


def _halves(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        halves = values.astype(np.float16)
    if not np.isfinite(halves).all():
        raise Overflow
    return halves


def _paired(codes: np.ndarray) -> np.ndarray:
    """[n, 32] codes of 4 bits -> [n, 16] bytes."""
    high = codes[:, VALUES // 2 :] << 4
    high |= codes[:, : VALUES // 2]
    return high


def _joined(*halves: np.ndarray, codes: np.ndarray, first: np.ndarray | None = None) -> np.ndarray:
    """One block after the other: its bytes of `first`, its float16 scales, its codes."""
    heads = [] if first is None else [first]
    heads += [_halves(column).view(np.uint8) for column in halves]
    return np.concatenate([*heads, codes], axis=1)


ENCODERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "F32": _f32, "F16": _f16, "BF16": _bf16, "Q8_0": _q8_0, "Q4_0": _q4_0, "Q4_1": _q4_1, "MXFP4": _mxfp4,
}  # fmt: skip
# What the float16 numbers of a block are below where it is faint: of Q4_1 the scale, and the least value with it.
_FAINT = {"F16": (_STEPS,), "Q8_0": (_STEPS,), "Q4_0": (_STEPS,), "Q4_1": (_STEPS, 15 * _STEPS)}
BLOCKED = ("Q8_0", "Q4_0", "Q4_1", "MXFP4")
