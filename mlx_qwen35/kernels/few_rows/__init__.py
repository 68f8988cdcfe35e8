"""Products of a few rows on a CPU, in which each row has the bits that it has alone, and weights are read once.

Knows which calls of MLX give every row the same sums. Knows no layers.
Weights are taken in blocks that stay in a core's cache, and every row meets a block while it is there. A row meets it
in a product of its own, matrix times vector, so that its sums do not hang on the other rows. Quantized weights are
unpacked block by block for that:

    weight    w[o, i] = scale[o, g] code[o, i] + bias[o, g]        g: the group of input i
    product   y[o] = sum over i of (scale code)[o, i] x[i]  +  sum over g of bias[o, g] (sum of x over g)

MLX's own kernel takes as long for one row of a large matrix, and again for every further one; unpacking is done
once (docs/SPEED.md). With the BLAS of MLX's Linux wheel the kernel is the faster form for one row, so quantized weights
are unpacked only where OpenBLAS is.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator
from functools import cache

import mlx.core as mx

from ..lanes import in_lanes
from ..once import cut

MOST_ROWS = 16  # from there on one product of all rows costs less
ALIGNED = 64  # outputs: cuts lie between as many, so that a BLAS takes those of a part as it takes them of the whole
_BLOCK = 2**19  # values of a block: their unpacked halves go into a second-level cache
_LEAST_UNPACKED = 2**15  # values of a matrix; MLX's kernel has a smaller one done before the operations here are begun
_LEAST_SHARED = {True: 2**18, False: 2**20}  # values that are worth a lane of their own, unpacked or plain


@cache
def fast_blas() -> bool:
    """Whether OpenBLAS computes this process's products."""
    try:
        return hasattr(ctypes.CDLL(None), "openblas_get_corename")
    except (OSError, TypeError):
        return False


def unpacks(x: mx.array, outputs: int, *, bits: int, mode: str) -> bool:
    """Whether `quantized` is the form for a few rows x [.., in] and a matrix of so many outputs."""
    large = outputs * x.shape[-1] >= _LEAST_UNPACKED
    return large and by_bytes(bits, mode) and x.dtype == mx.float32 and fast_blas()


def by_bytes(bits: int, mode: str) -> bool:
    """Whether a byte of a quantized weight holds whole values, of the affine form."""
    return mode == "affine" and 8 % bits == 0


def matmul(x: mx.array, weight: mx.array) -> mx.array:
    """x [.., in], weight [out, in] -> [.., out]."""
    columns = x.reshape(-1, x.shape[-1], 1)

    def block(taken: slice) -> mx.array:
        return cut(weight, taken) @ columns

    return _by_blocks(x, weight.shape[0], block, unpacked=False)


def quantized(
    x: mx.array, weight: mx.array, scales: mx.array, biases: mx.array, *, group_size: int, bits: int
) -> mx.array:
    """x [.., in], weight, scales, biases of mx.quantize for [out, in], affine -> [.., out]."""
    product = Unpacked(x, group_size, bits)

    def block(taken: slice) -> mx.array:
        return product(*(cut(part, taken) for part in (weight, scales, biases)))

    return _by_blocks(x, weight.shape[0], block, unpacked=True)


class Unpacked:
    """Rows x [.., in] that are to meet blocks of quantized weights."""

    def __init__(self, x: mx.array, group_size: int, bits: int):
        self._x, self._bits, places = x, bits, 8 // bits
        flat = x.reshape(-1, x.shape[-1])
        # Values at one place of all bytes side by side, as the weights will lie.
        self._columns = [_columns(flat[:, place::places] if places > 1 else flat) for place in range(places)]
        self._sums = _columns(flat.reshape(len(flat), -1, group_size).sum(axis=-1))

    def __call__(self, weight: mx.array, scales: mx.array, biases: mx.array) -> mx.array:
        """A block [o, ..] of all rows' matrix -> [rows, o, 1]; a block of each row's own, [rows, o, ..], likewise."""
        # Only once x is there: lanes would run ahead and hold the weights of many layers unpacked.
        # (It is no gradient of theirs that x has.)
        (weight,) = mx.depends([weight], [mx.stop_gradient(self._x)])
        groups = (*scales.shape, -1)
        scales, biases = scales.astype(mx.float32)[..., None], biases.astype(mx.float32)
        y = biases @ self._sums
        for place, column in enumerate(self._columns):
            y = y + (codes(weight, place, self._bits).reshape(groups) * scales).flatten(-2) @ column
        return y


def codes(weight: mx.array, place: int, bits: int) -> mx.array:
    """weight uint32 [.., n] -> float32 [.., 4 n]: what its bytes hold at this place, of 8 // bits.

    4 bits, bytes of two values   b0 a0 | b1 a1 | b2 a2    ->    a0 a1 a2 .. at place 0, b0 b1 b2 .. at place 1
    """
    if bits < 8:
        weight = (weight >> place * bits if place else weight) & (2**bits - 1) * 0x01010101
    return weight.view(mx.uint8).astype(mx.float32)


def _columns(x: mx.array) -> mx.array:
    """x [.., n] -> [rows, n, 1]: a vector for each row."""
    return mx.contiguous(x.reshape(-1, x.shape[-1], 1))


def _by_blocks(x: mx.array, outputs: int, block: Callable[[slice], mx.array], *, unpacked: bool) -> mx.array:
    """block(taken) [rows, o, 1] of all outputs, in lanes -> [.., outputs]."""
    inputs = x.shape[-1]

    def share(taken: slice) -> mx.array:
        made = [block(part) for part in blocks(taken, inputs)]
        return made[0] if len(made) == 1 else mx.concatenate(made, axis=1)

    made = in_lanes(share, outputs, least=-(-_LEAST_SHARED[unpacked] // inputs), aligned=ALIGNED)
    y = made[0] if len(made) == 1 else mx.concatenate(made, axis=1)
    return y.reshape(*x.shape[:-1], outputs)


def blocks(taken: slice, inputs: int) -> Iterator[slice]:
    """Slices of `taken` outputs whose weights go into a cache."""
    step = max(ALIGNED, _BLOCK // inputs // ALIGNED * ALIGNED)
    for start in range(taken.start, taken.stop, step):
        yield slice(start, min(start + step, taken.stop))


def rows_of(x: mx.array) -> int:
    """How many rows x [.., in] has."""
    return math.prod(x.shape[:-1])
