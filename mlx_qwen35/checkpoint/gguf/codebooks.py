"""The codebooks of ggml's IQ types, and the blocks that point into them.

Knows which points of a lattice each codebook has, as ggml-common.h of llama.cpp lists them (iq2xxs_grid, iq2xs_grid,
iq2s_grid, iq3xxs_grid, iq3s_grid, iq1s_grid): they were chosen by what weights of models look like, so no rule makes
them, and they are data of the format. codebooks.bin holds them one after another, as the place of each coordinate
among its levels, 2 or 4 bits each, lowest first.

    name      points  coordinates  levels                              bits
    iq2_xxs   256     8            8 25 43                             2
    iq2_xs    512     8            8 25 43                             2
    iq2_s     1024    8            8 25 43                             2
    iq3_xxs   256     4            4 12 20 28 36 44 52 62              4
    iq3_s     512     4            1 3 5 7 9 11 13 15                  4
    iq1       2048    8            -1 0 1                              2
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np

from mlx_qwen35.checkpoint.gguf.grids import half

_TWOS = (8, 25, 43)
_BOOKS = {
    "iq2_xxs": (256, 8, _TWOS),
    "iq2_xs": (512, 8, _TWOS),
    "iq2_s": (1024, 8, _TWOS),
    "iq3_xxs": (256, 4, (4, 12, 20, 28, 36, 44, 52, 62)),
    "iq3_s": (512, 4, (1, 3, 5, 7, 9, 11, 13, 15)),
    "iq1": (2048, 8, (-1, 0, 1)),
}
_SHIFT = np.float32(0.125)  # of the IQ1 types: the lattice lies so far beside its points, on one side or the other


@cache
def book(name: str) -> np.ndarray:
    """The points of a codebook: [points, coordinates] float32."""
    data = np.frombuffer((Path(__file__).parent / "codebooks.bin").read_bytes(), np.uint8)
    for found, (points, coordinates, levels) in _BOOKS.items():
        bits = 2 if len(levels) < 4 else 4
        size = points * coordinates * bits // 8
        if found == name:
            places = data[:size, None] >> np.arange(0, 8, bits, dtype=np.uint8) & (1 << bits) - 1
            made = np.array(levels, np.float32)[places].reshape(points, coordinates)
            made.flags.writeable = False
            return made
        data = data[size:]
    raise KeyError(name)


def _signs_of(bits: np.ndarray) -> np.ndarray:
    """[...] bytes -> [..., 8] float32: -1 where a bit is set."""
    found = np.unpackbits(bits[..., None], axis=-1, bitorder="little")
    return np.float32(1) - np.float32(2) * found


# Seven signs are stored, and the eighth makes their number even.
_EVEN = np.array([n | (n.bit_count() & 1) << 7 for n in range(128)], np.uint8)


def _quarters(words: np.ndarray) -> np.ndarray:
    """[N, m] uint32 -> [N, m, 4, 8] signs: four fields of seven bits each."""
    sevens = words[..., None] >> np.array([0, 7, 14, 21], np.uint32) & 127
    return _signs_of(_EVEN[sevens])


def _unsigned(blocks: np.ndarray, begin: int, end: int, dtype: type) -> np.ndarray:
    return np.ascontiguousarray(blocks[:, begin:end]).view(dtype)


def _halves(data: np.ndarray) -> np.ndarray:
    """[N, n] bytes -> [N, 2n]: the low half of each byte and then its high half."""
    return (data[..., None] >> np.array([0, 4], np.uint8) & 15).reshape(len(data), -1)


def _scaled(d: np.ndarray, scales: np.ndarray, unit: float) -> np.ndarray:
    return d * (np.float32(0.5) + scales.astype(np.float32)) * np.float32(unit)


def _finish(scales: np.ndarray, points: np.ndarray, signs: np.ndarray) -> np.ndarray:
    """scales: [N, groups]; points, signs: [N, values] in any shape."""
    count, groups = scales.shape
    return (scales[..., None] * points.reshape(count, groups, -1) * signs.reshape(count, groups, -1)).reshape(count, -1)


def iq2_xxs(blocks: np.ndarray) -> np.ndarray:
    words = _unsigned(blocks, 2, 66, np.uint32).reshape(-1, 8, 2)
    points = book("iq2_xxs")[np.ascontiguousarray(words[..., 0]).view(np.uint8)]
    return _finish(_scaled(half(blocks, 0), words[..., 1] >> 28, 0.25), points, _quarters(words[..., 1]))


def iq2_xs(blocks: np.ndarray) -> np.ndarray:
    words = _unsigned(blocks, 2, 66, np.uint16)
    scales = _scaled(half(blocks, 0), _halves(blocks[:, 66:74]), 0.25)
    return _finish(scales, book("iq2_xs")[words & 511], _signs_of(_EVEN[words >> 9]))


def iq2_s(blocks: np.ndarray) -> np.ndarray:
    high = (blocks[:, 66:74, None] >> np.array([0, 2, 4, 6], np.uint8) & 3).reshape(-1, 32)
    points = book("iq2_s")[blocks[:, 2:34] | high.astype(np.uint16) << 8]
    scales = _scaled(half(blocks, 0), _halves(blocks[:, 74:82]), 0.25)
    return _finish(scales, points, _signs_of(blocks[:, 34:66]))


def iq3_xxs(blocks: np.ndarray) -> np.ndarray:
    words = _unsigned(blocks, 66, 98, np.uint32)
    return _finish(_scaled(half(blocks, 0), words >> 28, 0.5), book("iq3_xxs")[blocks[:, 2:66]], _quarters(words))


def iq3_s(blocks: np.ndarray) -> np.ndarray:
    high = np.unpackbits(blocks[:, 66:74], axis=-1, bitorder="little").astype(np.uint16)
    points = book("iq3_s")[blocks[:, 2:66] | high << 8]
    scales = half(blocks, 0) * (1 + 2 * _halves(blocks[:, 106:110])).astype(np.float32)
    return _finish(scales, points, _signs_of(blocks[:, 74:106]))


def iq1_s(blocks: np.ndarray) -> np.ndarray:
    high = _unsigned(blocks, 34, 50, np.uint16)
    scales = half(blocks, 0) * (2 * (high >> 12 & 7) + 1).astype(np.float32)
    upper = (high[..., None] >> np.array([0, 3, 6, 9], np.uint16) & 7).reshape(-1, 32)
    shift = np.where(high & 0x8000, -_SHIFT, _SHIFT)
    points = book("iq1")[blocks[:, 2:34] | upper << 8].reshape(-1, 8, 32)
    return (scales[..., None] * (points + shift[..., None])).reshape(len(blocks), -1)


def iq1_m(blocks: np.ndarray) -> np.ndarray:
    """The one type whose float16 scale lies in four pieces, on top of each of four words of scales."""
    words = _unsigned(blocks, 48, 56, np.uint16)
    pieces = (words >> 12) << np.array([0, 4, 8, 12], np.uint16)
    d = np.bitwise_or.reduce(pieces, axis=1, keepdims=True).view(np.float16).astype(np.float32)
    scales = d * (2 * _threes(words) + 1).astype(np.float32)
    high = _halves(blocks[:, 32:48])
    shift = np.where(high & 8, -_SHIFT, _SHIFT)
    points = book("iq1")[blocks[:, :32] | (high & 7).astype(np.uint16) << 8].reshape(-1, 16, 2, 8)
    shifted = points + shift.reshape(-1, 16, 2, 1)
    return (scales.reshape(-1, 16, 1, 1) * shifted).reshape(len(blocks), -1)


def _threes(words: np.ndarray) -> np.ndarray:
    """[N, m] uint16 -> [N, 4m]: four fields of three bits each."""
    return (words[..., None] >> np.array([0, 3, 6, 9], np.uint16) & 7).reshape(len(words), -1)
