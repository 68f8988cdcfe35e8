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
import threading
import weakref
from collections.abc import Callable
from functools import cache

import mlx.core as mx

from ...machine.system import is_mac
from ..lanes import in_turning_lanes, lane_count
from ..once import cut, once

MOST_ROWS = 16  # from there on one product of all rows costs less
# Outputs: cuts lie between as many, so that a BLAS takes those of a part as it takes them of the whole (OpenBLAS with
# several threads does where the inputs are even, as those of all models are).
ALIGNED = 64
_BLOCK = 2**19  # values of a block: their unpacked halves go into a second-level cache
_LEAST_UNPACKED = 2**15  # values of a matrix; MLX's kernel has a smaller one done before the operations here are begun
_LEAST_SHARED = {True: 2**18, False: 2**20}  # values that are worth a lane of their own, unpacked or plain
_LAST = threading.local()  # made: what `_prepared` gave last


@cache
def fast_blas() -> bool:
    """Whether OpenBLAS computes this process's products."""
    try:
        return hasattr(ctypes.CDLL(None), "openblas_get_corename")
    except (OSError, TypeError):
        return False


@cache
def plain_blas() -> bool:
    """Whether it is the BLAS of MLX's Linux wheel. It adds up every sum in the order of the inputs, however many rows
    there are, and is slow with a single column."""
    return not is_mac() and not fast_blas()


def unpacks(x: mx.array, outputs: int, *, bits: int, mode: str, inputs: int | None = None) -> bool:
    """Whether `quantized` is the form for a few rows x [.., in] and a matrix of so many outputs; inputs: if others than
    those of x."""
    large = outputs * (inputs or x.shape[-1]) >= _LEAST_UNPACKED
    return large and by_bytes(bits, mode) and x.dtype == mx.float32 and fast_blas()


def by_bytes(bits: int, mode: str) -> bool:
    """Whether a byte of a quantized weight holds whole values, of the affine form."""
    return mode == "affine" and 8 % bits == 0


def matmul(x: mx.array, weight: mx.array) -> mx.array:
    """x [.., in], weight [out, in] -> [.., out]."""
    if weight.size <= _BLOCK:  # one block: most matrices of a small model, whose time is that of the calls
        return x @ weight.T if plain_blas() else (weight @ x.reshape(*x.shape, 1)).squeeze(-1)
    if plain_blas():
        rows = x.reshape(-1, 1, x.shape[-1])
        y = _by_blocks(x, weight.shape[0], lambda taken: (rows @ cut(weight, taken).T).swapaxes(-1, -2), unpacked=False)
    else:
        columns = x.reshape(-1, x.shape[-1], 1) if rows_of(x) > 1 else x.reshape(-1, 1)
        y = _by_blocks(x, weight.shape[0], lambda taken: cut(weight, taken) @ columns, unpacked=False)
    return y.reshape(*x.shape[:-1], -1)


def quantized(
    x: mx.array,
    weight: mx.array,
    scales: mx.array,
    biases: mx.array,
    *,
    group_size: int,
    bits: int,
    kept: bool = True,
) -> mx.array:
    """x [.., in], weight, scales, biases of mx.quantize for [out, in], affine -> [.., out].

    kept: whether later calls have these arrays, and not others.
    """
    columns, sums = _once_for_all_products(x, group_size, bits)
    before = mx.stop_gradient(x)  # it is no gradient of the weights that x has

    def block(taken: slice) -> mx.array:
        part, scale = _parts(weight, scales, taken, kept)
        # Only once x is there: lanes would run ahead and hold the weights of many layers unpacked.
        (packed,) = mx.depends([part], [before])
        y = None
        for place, column in enumerate(columns):
            masked = packed & _mask(bits * (place + 1)) if place < len(columns) - 1 else packed
            values = masked.view(mx.uint8).astype(mx.float32).reshape(*scale.shape[:-1], -1)
            values = (values * scale).flatten(-2)
            y = values @ column if y is None else mx.addmm(y, values, column)
        return y

    y = _by_blocks(x, weight.shape[0], block, unpacked=True)
    return mx.addmm(y, biases.astype(mx.float32), sums).reshape(*x.shape[:-1], -1)


def _parts(weight: mx.array, scales: mx.array, taken: slice, kept: bool) -> tuple[mx.array, mx.array]:
    """weight[taken], and the scales of these outputs [o, groups, 1]."""
    if not kept or scales.dtype != mx.float32:
        return weight[taken], scales[taken].astype(mx.float32)[..., None]
    return cut(weight, taken), once(scales, ("tall", taken.start, taken.stop), lambda a: a[taken][..., None])


def _once_for_all_products(x: mx.array, group_size: int, bits: int) -> tuple[list[mx.array], mx.array]:
    """_prepared(x), remembered for the products that meet the same x one after the other."""
    held = getattr(_LAST, "made", None)
    if held is None or held[0]() is not x or held[1] != (group_size, bits):
        held = _LAST.made = weakref.ref(x), (group_size, bits), _prepared(x, group_size, bits)
    return held[2]


def _prepared(x: mx.array, group_size: int, bits: int) -> tuple[list[mx.array], mx.array]:
    """x [.., in] -> what meets the values at each place of all bytes, [rows, in * bits / 8, 1] each, and the sums over
    groups [rows, in / group_size, 1].

    A byte b of two codes, and x for both: code 0 is b & 15, and 16 code 1 is b - (b & 15), so that

        code 0 x0 + code 1 x1 = (b & 15) (x0 - x1 / 16) + b x1 / 16

    which takes one operation for each weight less than shifting; so with more codes a byte.
    """
    flat = x.reshape(-1, x.shape[-1])
    places = 8 // bits
    sums = flat.reshape(len(flat), -1, group_size).sum(axis=-1)[..., None]
    if places == 1:
        return [flat[..., None]], sums
    own = [flat[:, place::places] * 2.0 ** (-bits * place) for place in range(places)]
    pairs = zip(own, [*own[1:], None], strict=True)
    return [(one if after is None else one - after)[..., None] for one, after in pairs], sums


def _mask(bits: int) -> int:
    """The lowest bits of each byte of 32 bits."""
    return (2**bits - 1) * 0x01010101


def codes(weight: mx.array, place: int, bits: int) -> mx.array:
    """weight uint32 [.., n] -> float32 [.., 4 n]: what its bytes hold at this place, of 8 // bits.

    4 bits, bytes of two values   b0 a0 | b1 a1 | b2 a2    ->    a0 a1 a2 .. at place 0, b0 b1 b2 .. at place 1
    """
    if bits < 8:
        weight = (weight >> place * bits if place else weight) & (2**bits - 1) * 0x01010101
    return weight.view(mx.uint8).astype(mx.float32)


def _by_blocks(x: mx.array, outputs: int, block: Callable[[slice], mx.array], *, unpacked: bool) -> mx.array:
    """block(taken) [.., o, 1] of all outputs, one after the other in turning lanes -> [.., outputs, 1]."""
    inputs = x.shape[-1]
    lanes = max(1, min(lane_count(), outputs * inputs // _LEAST_SHARED[unpacked]))
    step = min(_BLOCK // inputs // ALIGNED, -(-outputs // lanes // ALIGNED)) * ALIGNED or ALIGNED
    made = in_turning_lanes(block, [slice(start, min(start + step, outputs)) for start in range(0, outputs, step)])
    return made[0] if len(made) == 1 else mx.concatenate(made, axis=-2)


def rows_of(x: mx.array) -> int:
    """How many rows x [.., in] has."""
    return math.prod(x.shape[:-1])
