"""Better than rounding to nearest: codes, scales and biases that lose less, in MLX's affine format.

Knows how codes are packed and how many groups are worked on at once. Knows no modules and no files. mx.quantize spreads
the codes over a group's whole range and rounds the scale to 16 bits only after the codes are chosen. Here a scale and
bias that lose less are looked for (search.py), and the error that counts is that of what is stored.
"""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np

from mlx_qwen35.checkpoint import quantize as nearest
from mlx_qwen35.config import QuantSpec
from mlx_qwen35.conversion.passes import DevicePasses, HostPasses, memory
from mlx_qwen35.conversion.search import Search
from mlx_qwen35.conversion.staging import as_numpy

_SLAB = {mx.cpu: 1 << 20, mx.gpu: 1 << 24}  # values worked on at once


def pack(
    weight: mx.array, spec: QuantSpec, *, dtype: mx.Dtype | None = None, search: bool = False
) -> dict[str, mx.array]:
    """What quantize.pack() gives; search: with scales and biases that lose less, where the mode has them (affine)."""
    if not search or spec.mode != "affine":
        return nearest.pack(weight, spec, dtype=dtype)
    arrays = quantize(weight, spec.group_size, spec.bits, dtype or weight.dtype)
    return dict(zip(("weight", "scales", "biases"), arrays, strict=True))


def quantize(weight: mx.array, group_size: int, bits: int, dtype: mx.Dtype) -> tuple[mx.array, ...]:
    """weight [.., in] -> codes packed as mx.quantize packs them, uint32 [.., in * bits / 32], and scales and biases
    [.., in / group_size] in `dtype`."""
    device = mx.default_device().type
    step = max(1, _SLAB[device] // group_size)
    work = _on_host if device == mx.cpu else _on_device
    parts = work(weight.reshape(-1, group_size), step, bits, dtype)
    return tuple(part.reshape(*weight.shape[:-1], -1) for part in parts)


def _on_host(groups: mx.array, step: int, bits: int, dtype: mx.Dtype) -> list[mx.array]:
    values = as_numpy(groups)
    words = memory("words", values.size * bits // 32).view(np.uint32).reshape(len(values), -1)
    lines = memory("lines", 2 * len(values)).reshape(2, -1)
    with np.errstate(all="ignore"):  # what overflows is not kept, or is MLX's, too, and noticed when it is stored
        for start in range(0, len(values), step):
            rows = slice(start, start + step)
            search = Search(HostPasses(values[rows], dtype, bits, words[rows]), bits, dtype)
            _, lines[0, rows], lines[1, rows] = search.run(lambda pairs: packed(pairs, bits))
    return [mx.array(words), *(mx.array(line).astype(dtype) for line in lines)]


def _on_device(groups: mx.array, step: int, bits: int, dtype: mx.Dtype) -> list[mx.array]:
    found = []
    for start in range(0, len(groups), step):
        search = Search(DevicePasses(groups[start : start + step], dtype), bits, dtype)
        words, *line = search.run(lambda codes: packed_by_mlx(codes, bits))
        found.append((words, *(part.astype(dtype) for part in line)))
        mx.eval(found[-1])
    return [mx.concatenate(parts) for parts in zip(*found, strict=True)]


def packed(pairs: np.ndarray, bits: int) -> np.ndarray:
    """Pairs of codes, first + second * 2^bits, uint8 up to 4 bits and uint16 above, [.., in / 2] -> a stream of bits,
    the first code in the lowest, uint32 [.., in * bits / 32]. The pairs are used up.

    Two numbers become one until four or eight codes are together:  00dc00ba -> 0000dcba
    """
    if bits in (4, 8):
        return pairs.view(np.uint32)
    numbers, used = pairs, 2 * bits
    while used < (8 if bits == 2 else 24):  # a word is to be of two numbers at most
        lane = 8 * numbers.itemsize
        numbers = numbers.view(f"u{lane // 4}")
        upper = numbers >> lane
        upper *= (1 << lane) - (1 << used)
        numbers -= upper
        used *= 2
    if bits == 2:
        return numbers.astype(np.uint8).view(np.uint32)
    return _joined(numbers.reshape(-1), used).reshape(*pairs.shape[:-1], pairs.shape[-1] * bits // 16)


def _joined(numbers: np.ndarray, bits: int) -> np.ndarray:
    """Numbers of so many bits, 24 or more, one after the other -> uint32 [..] of all of these bits."""
    period = math.lcm(32, bits)
    numbers = numbers.reshape(-1, period // bits)
    words = np.empty((len(numbers), period // 32), np.uint32)
    for place in range(words.shape[1]):
        number, offset = divmod(32 * place, bits)
        word = numbers[:, number] >> offset
        if bits - offset < 32:
            word |= numbers[:, number + 1] << bits - offset
        words[:, place] = word  # the lower half
    return words.reshape(-1)


def packed_by_mlx(codes: mx.array, bits: int) -> mx.array:
    """The same with MLX: codes [.., in] -> [.., in * bits / 32].

    Eight codes of b bits are b bytes:     codes 7 6 5 4 3 2 1 0   (3 bits each)
                                           bytes |  2  |  1  |  0  |
    """
    *outer, width = codes.shape
    eights = codes.astype(mx.uint64).reshape(*outer, width // 8, 8)
    words = (eights << (mx.arange(8, dtype=mx.uint64) * bits)).sum(-1)
    octets = words[..., None].view(mx.uint8)[..., :bits]  # little-endian
    return mx.contiguous(octets.reshape(*outer, width * bits // 8)).view(mx.uint32)
