"""Blocks of every type as float32, value by value as ggml's own decoders make them.

Knows all types that llama-quantize writes; Q2_K and Q6_K by itself, even grids by grids.py, codebooks by codebooks.py.
Knows no file.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mlx_qwen35.checkpoint.gguf import codebooks
from mlx_qwen35.checkpoint.gguf.grids import SPECS, fields, grid_of, half
from mlx_qwen35.checkpoint.gguf.types import KINDS, NUMBERS

_AT_ONCE = 1 << 17  # values: what is made on the way stays in a processor's cache
_DOUBLED = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)  # E2M1, times two


def decode(kind: str, rows: np.ndarray) -> np.ndarray:
    """rows: [R, bytes of a row] uint8 -> [R, values of a row] float32. Raises KeyError for a type without a decoder."""
    form = KINDS[NUMBERS[kind]]
    made = np.empty((len(rows), rows.shape[1] // form.nbytes * form.values), np.float32)
    if not made.size:
        return made
    blocks, out = rows.reshape(-1, form.nbytes), made.reshape(-1, form.values)
    step = max(1, _AT_ONCE // form.values)
    read = _DECODERS[kind]
    with np.errstate(over="ignore", invalid="ignore"):  # of damaged scales: whoever reads them looks at the values
        for start in range(0, len(blocks), step):
            out[start : start + step] = read(blocks[start : start + step])
    return made


def can_decode(kind: str) -> bool:
    return kind in _DECODERS


def _bf16(blocks: np.ndarray) -> np.ndarray:
    return (blocks.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def _even(kind: str) -> Callable[[np.ndarray], np.ndarray]:
    def read(blocks: np.ndarray) -> np.ndarray:
        grid = grid_of(kind, blocks)
        count, groups = grid.scales.shape
        values = grid.codes.astype(np.float32).reshape(count, groups, -1)
        values *= grid.scales[..., None]
        values += grid.biases[..., None]
        return values.reshape(count, -1)

    return read


def _q2_k(blocks: np.ndarray) -> np.ndarray:
    codes = fields(blocks[:, 16:80].reshape(-1, 2, 32), 2, 4).reshape(-1, 16, 16).astype(np.float32)
    scales = half(blocks, 80) * (blocks[:, :16] & 15)
    least = half(blocks, 82) * (blocks[:, :16] >> 4)
    return (scales[..., None] * codes - least[..., None]).reshape(len(blocks), -1)


def _q6_k(blocks: np.ndarray) -> np.ndarray:
    low = fields(blocks[:, :128].reshape(-1, 2, 64), 4, 2).reshape(-1, 256)
    high = fields(blocks[:, 128:192].reshape(-1, 2, 32), 2, 4).reshape(-1, 256)
    codes = ((low | high << 4).view(np.int8) - 32).reshape(-1, 16, 16).astype(np.float32)
    scales = half(blocks, 208) * np.ascontiguousarray(blocks[:, 192:208]).view(np.int8)
    return (scales[..., None] * codes).reshape(len(blocks), -1)


def _mxfp4(blocks: np.ndarray) -> np.ndarray:
    grid = grid_of("MXFP4", blocks)
    exponents = grid.scales.astype(np.uint32)
    # 2 ** (e - 128): half of the scale, for values that are doubled; the two smallest are subnormal.
    bits = np.where(exponents < 2, np.uint32(0x00200000) << (exponents & 1), (exponents - 1) << 23)
    return bits.view(np.float32) * _DOUBLED[grid.codes]


def _nvfp4(blocks: np.ndarray) -> np.ndarray:
    grid = grid_of("NVFP4", blocks)
    codes = _DOUBLED[grid.codes].reshape(-1, 4, 16)
    return (e4m3(grid.scales)[..., None] * np.float32(0.5) * codes).reshape(len(blocks), -1)


def e4m3(codes: np.ndarray) -> np.ndarray:
    """Unsigned E4M3 as ggml reads it, in float32: the top bit is passed over, and 0x7F is 0."""
    exponent = (codes >> 3 & 15).astype(np.int32)
    mantissa = (codes & 7).astype(np.float32)
    normal = np.ldexp(1 + mantissa / 8, exponent - 7)
    return np.where(codes == 0x7F, np.float32(0), np.where(exponent == 0, mantissa * 2**-9, normal)).astype(np.float32)


_DECODERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "F32": lambda blocks: blocks.view(np.float32),
    "F16": lambda blocks: blocks.view(np.float16).astype(np.float32),
    "BF16": _bf16,
    **{kind: _even(kind) for kind, spec in SPECS.items() if spec.mode == "affine"},
    "MXFP4": _mxfp4,
    "NVFP4": _nvfp4,
    "Q2_K": _q2_k,
    "Q6_K": _q6_k,
    "IQ1_S": codebooks.iq1_s,
    "IQ1_M": codebooks.iq1_m,
    "IQ2_XXS": codebooks.iq2_xxs,
    "IQ2_XS": codebooks.iq2_xs,
    "IQ2_S": codebooks.iq2_s,
    "IQ3_XXS": codebooks.iq3_xxs,
    "IQ3_S": codebooks.iq3_s,
}
