"""Blocks whose values lie on an even grid: as MLX's affine quantization has them, value = scale * code + bias.

Knows the bytes of Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q3_K, Q4_K, Q5_K, IQ4_NL, IQ4_XS, TQ1_0, TQ2_0, Q1_0 and Q2_0, and of
MXFP4 and NVFP4, whose grids are MLX's own. Knows no file and no tensor. Nothing is rounded: scales and biases are
float32, and float16 holds those of `SIXTEEN` exactly.

Three types become wider than they are, because MLX has no grid of theirs: Q3_K (16 values share a scale, and scale
times code is an integer of -124..128), IQ4_NL and IQ4_XS (16 uneven levels, which are integers of -127..113) are codes
of 8 bits. Types with groups of 16 and several scales (Q2_K, Q6_K) or codebooks (IQ1, IQ2, IQ3) are in decode.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mlx_qwen35.checkpoint.gguf.types import KINDS, NUMBERS
from mlx_qwen35.config.quantization import QuantSpec

# How each is packed in MLX.
SPECS = {
    "Q4_0": QuantSpec(4, 32, "affine"), "Q4_1": QuantSpec(4, 32, "affine"), "Q4_K": QuantSpec(4, 32, "affine"),
    "Q5_0": QuantSpec(5, 32, "affine"), "Q5_1": QuantSpec(5, 32, "affine"), "Q5_K": QuantSpec(5, 32, "affine"),
    "Q8_0": QuantSpec(8, 32, "affine"), "Q3_K": QuantSpec(8, 32, "affine"), "IQ4_NL": QuantSpec(8, 32, "affine"),
    "IQ4_XS": QuantSpec(8, 32, "affine"), "TQ1_0": QuantSpec(2, 128, "affine"), "TQ2_0": QuantSpec(2, 128, "affine"),
    "Q1_0": QuantSpec(1, 128, "affine"), "Q2_0": QuantSpec(2, 64, "affine"),
    "MXFP4": QuantSpec(4, 32, "mxfp4"), "NVFP4": QuantSpec(4, 16, "nvfp4"),
}  # fmt: skip
# Whose scales and biases are float16 numbers; those of the others have up to 17 bits.
SIXTEEN = frozenset(("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "TQ1_0", "TQ2_0", "Q1_0", "Q2_0"))
LEVELS = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8)  # of IQ4_*
_LEVEL_CODES = (LEVELS.astype(np.int16) + 128).astype(np.uint8)


@dataclass(frozen=True)
class Grid:
    """Blocks [N] as codes [N, values] uint8, and scales and biases [N, groups] float32.

    In the modes mxfp4 and nvfp4 codes are those of E2M1, scales bytes of E8M0 or E4M3, and biases None.
    """

    codes: np.ndarray
    scales: np.ndarray
    biases: np.ndarray | None


def grid_of(kind: str, blocks: np.ndarray) -> Grid:
    """blocks: [N, bytes of a block] uint8, of one of the types in SPECS."""
    return _READ[kind](blocks)


def scales_of(kind: str, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """The scales and biases of `grid_of` alone, at a fraction of its price."""
    return _SCALES[kind](blocks)


def words_of(kind: str, blocks: np.ndarray) -> np.ndarray:
    """The codes of blocks as MLX packs them: [N, bytes] uint8, code i at bit i * bits of a little-endian stream."""
    fast = _WORDS.get(kind)
    return fast(blocks) if fast else pack(_READ[kind](blocks).codes, SPECS[kind].bits)


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """[N, values] uint8 codes -> [N, bytes] uint8, code i at bit i * bits of a little-endian stream."""
    if bits == 8:
        return codes
    if bits == 1:
        return np.packbits(codes, axis=-1, bitorder="little")
    codes = np.ascontiguousarray(codes)
    if bits == 4:
        pairs = codes.view(np.uint16)
        return (pairs | pairs >> 4).astype(np.uint8)
    if bits == 2:
        fours = codes.view(np.uint32)
        return (fours | fours >> 6 | fours >> 12 | fours >> 18).astype(np.uint8)
    eights = codes.reshape(len(codes), -1, 8)
    words = np.zeros(eights.shape[:-1], np.uint64)
    for place in range(8):
        words |= eights[..., place].astype(np.uint64) << np.uint64(place * bits)
    return words[..., None].view(np.uint8)[..., :bits].reshape(len(codes), -1)


def half(blocks: np.ndarray, at: int) -> np.ndarray:
    """The float16 at byte `at` of each block, as float32 [N, 1]."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16).astype(np.float32)


def nibbles(data: np.ndarray) -> np.ndarray:
    """[..., n] bytes -> [..., 2n]: the low halves, then the high ones."""
    return np.concatenate([data & 15, data >> 4], axis=-1)


def fields(data: np.ndarray, width: int, count: int) -> np.ndarray:
    """[N, m, n] bytes -> [N, m * count, n]: field 0 of every byte of a row, then field 1, and so on."""
    shifts = np.arange(0, width * count, width, dtype=np.uint8)[:, None]
    mask = np.uint8((1 << width) - 1)
    return (data[:, :, None, :] >> shifts & mask).reshape(len(data), -1, data.shape[-1])


def k_scales(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The eight scales and eight minima, 6 bits each, of Q4_K and Q5_K: bytes 4..16.

        bytes 0..3   scale j: low 6 bits | scale j + 4: high 2 bits above
        bytes 4..7   minimum j: low 6 bits | minimum j + 4: high 2 bits above
        bytes 8..11  low halves of scale j + 4 | of minimum j + 4
    """
    a, b, c = (blocks[:, at : at + 4] for at in (4, 8, 12))
    scales = np.concatenate([a & 63, c & 15 | a >> 6 << 4], axis=1)
    return scales, np.concatenate([b & 63, c >> 4 | b >> 6 << 4], axis=1)


def _one(d: np.ndarray, times: float) -> tuple[np.ndarray, np.ndarray]:
    return d, d * np.float32(times)


def _minimum(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return half(blocks, 0), half(blocks, 2)


def _k_grid(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scales, least = k_scales(blocks)
    return half(blocks, 0) * scales, -(half(blocks, 2) * least)


def _ternary(at: int) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    return lambda blocks: _one(half(blocks, at).repeat(2, 1), -1)


def _iq4_xs_scales(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    high = np.ascontiguousarray(blocks[:, 2:4]).view(np.uint16) >> np.arange(0, 16, 2, dtype=np.uint16) & 3
    low = blocks[:, 4:8].repeat(2, 1) >> np.array([0, 4] * 4, np.uint8) & 15
    return _one(half(blocks, 0) * ((low | high << 4).astype(np.int16) - 32), -128)


_SCALES: dict[str, Callable[[np.ndarray], tuple[np.ndarray, np.ndarray | None]]] = {
    "Q4_0": lambda b: _one(half(b, 0), -8),
    "Q4_1": _minimum,
    "Q5_0": lambda b: _one(half(b, 0), -16),
    "Q5_1": _minimum,
    "Q8_0": lambda b: _one(half(b, 0), -128),
    "Q3_K": lambda b: _one(half(b, 108).repeat(8, 1), -124),
    "Q4_K": _k_grid,
    "Q5_K": _k_grid,
    "IQ4_NL": lambda b: _one(half(b, 0), -128),
    "IQ4_XS": _iq4_xs_scales,
    "TQ1_0": _ternary(52),
    "TQ2_0": _ternary(64),
    "Q1_0": lambda b: (half(b, 0) * np.float32(2), -half(b, 0)),
    "Q2_0": lambda b: _one(half(b, 0), -1),
    "MXFP4": lambda b: (b[:, :1], None),
    "NVFP4": lambda b: (b[:, :4], None),
}


def _q5(at: int) -> Callable[[np.ndarray], np.ndarray]:
    def codes(blocks: np.ndarray) -> np.ndarray:
        fifth = np.unpackbits(blocks[:, at : at + 4], axis=-1, bitorder="little")
        return nibbles(blocks[:, at + 4 :]) | fifth << 4

    return codes


def _q4_k(blocks: np.ndarray) -> np.ndarray:
    return fields(blocks[:, 16:].reshape(-1, 4, 32), 4, 2).reshape(len(blocks), 256)


def _q5_k(blocks: np.ndarray) -> np.ndarray:
    low = fields(blocks[:, 48:].reshape(-1, 4, 32), 4, 2)
    return (low | fields(blocks[:, None, 16:48], 1, 8) << 4).reshape(len(blocks), 256)


def q3_k_codes(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Q3_K's integers -4..3 as [N, 16, 16] int8, and the scales -32..31 of each 16 as [N, 16] int8."""
    low = fields(blocks[:, 32:96].reshape(-1, 2, 32), 2, 4)
    high = fields(blocks[:, None, :32], 1, 8)
    codes = (low | high << 2).view(np.int8) - 4
    raw = blocks[:, 96:108]
    least = np.concatenate([raw[:, :8] & 15, raw[:, :8] >> 4], axis=1)
    most = fields(raw[:, None, 8:], 2, 4).reshape(-1, 16)
    return codes.reshape(-1, 16, 16), (least | most << 4).view(np.int8) - 32


def _q3_k(blocks: np.ndarray) -> np.ndarray:
    codes, scales = q3_k_codes(blocks)
    products = codes.astype(np.int16) * scales[..., None].astype(np.int16)
    return (products + 124).astype(np.uint8).reshape(len(blocks), 256)


def _iq4_xs(blocks: np.ndarray) -> np.ndarray:
    return _LEVEL_CODES[nibbles(blocks[:, 8:].reshape(-1, 8, 16))].reshape(len(blocks), 256)


_POWERS = np.array([1, 3, 9, 27, 81], np.uint8)[:, None]


def _tq1_0(blocks: np.ndarray) -> np.ndarray:
    """Five trits a byte, four in the last four: a byte times a power of three, modulo 256, has the trit on top."""
    count = len(blocks)
    parts = ((blocks[:, None, :32], 5), (blocks[:, None, 32:48], 5), (blocks[:, None, 48:52], 4))
    shifted = [(data * _POWERS[:times]).reshape(count, -1) for data, times in parts]
    return (np.concatenate(shifted, axis=1).astype(np.uint16) * 3 >> 8).astype(np.uint8)


def _crumbs(data: np.ndarray) -> np.ndarray:
    """[N, n] bytes -> [N, 4n]: each byte's four fields of two bits in turn."""
    return (data[..., None] >> np.array([0, 2, 4, 6], np.uint8) & 3).reshape(len(data), -1)


_CODES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "Q4_0": lambda b: nibbles(b[:, 2:]),
    "Q4_1": lambda b: nibbles(b[:, 4:]),
    "Q5_0": _q5(2),
    "Q5_1": _q5(4),
    "Q8_0": lambda b: b[:, 2:] ^ 128,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "IQ4_NL": lambda b: _LEVEL_CODES[nibbles(b[:, 2:])],
    "IQ4_XS": _iq4_xs,
    "TQ1_0": _tq1_0,
    "TQ2_0": lambda b: fields(b[:, :64].reshape(-1, 2, 32), 2, 4).reshape(len(b), 256),
    "Q1_0": lambda b: np.unpackbits(b[:, 2:], axis=-1, bitorder="little"),
    "Q2_0": lambda b: _crumbs(b[:, 2:]),
    "MXFP4": lambda b: nibbles(b[:, 1:]),
    "NVFP4": lambda b: nibbles(b[:, 4:].reshape(-1, 4, 8)).reshape(len(b), 64),
}


def _reader(kind: str) -> Callable[[np.ndarray], Grid]:
    return lambda blocks: Grid(_CODES[kind](blocks), *_SCALES[kind](blocks))


_READ = {kind: _reader(kind) for kind in SPECS}


def _paired(data: np.ndarray) -> np.ndarray:
    """[..., 2n] bytes of which each holds two codes, of one half of a group and of the other -> MLX's order."""
    pairs = np.ascontiguousarray(data).view(np.uint16)
    low, high = pairs & 0x0F0F, pairs >> 4 & 0x0F0F
    return np.concatenate([low | low >> 4, high | high >> 4], axis=-1).astype(np.uint8)


# Those whose bytes need not be taken apart.
_WORDS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "Q4_0": lambda b: _paired(b[:, 2:]),
    "Q4_1": lambda b: _paired(b[:, 4:]),
    "Q4_K": lambda b: _paired(b[:, 16:].reshape(-1, 4, 32)).reshape(len(b), 128),
    "MXFP4": lambda b: _paired(b[:, 1:]),
    "NVFP4": lambda b: _paired(b[:, 4:].reshape(-1, 4, 8)).reshape(len(b), 32),
    "Q1_0": lambda b: b[:, 2:],
    "Q2_0": lambda b: b[:, 2:],
}


def groups_of(kind: str) -> int:
    """Groups of MLX in one block."""
    return KINDS[NUMBERS[kind]].values // SPECS[kind].group_size
