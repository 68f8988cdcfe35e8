"""Products of a few rows on a CPU, in which each row has the bits that it has alone, and weights are read once.

Knows which calls of MLX give every row the same sums. Knows no layers.
Rows are the columns of one product, weight times x, as far as the BLAS gives each of so many columns the bits that it
has alone (alike.py tries it). Quantized weights are unpacked for that in blocks that stay in a core's cache, and
not scaled: sums over the inputs of a group are, which are few:

    weight    w[o, i] = scale[o, g] code[o, i] + bias[o, g]        g: the group of input i
    product   y[o] = sum over g of  scale[o, g] (sum over g of code[o, i] x[i])  +  bias[o, g] (sum of x over g)

MLX's own kernel takes about as long for one row of a large matrix, and again for every further one; unpacking is done
once (docs/SPEED.md). With the BLAS of MLX's Linux wheel the kernel is the faster form for one row, so quantized weights
are unpacked only where OpenBLAS is.
"""

from __future__ import annotations

import ctypes
import math
import threading
import weakref
from functools import cache

import mlx.core as mx
import numpy as np

from ...machine.allocator import keep_freed_memory
from ...machine.system import is_mac
from ..lanes import in_turning_lanes, lane_count
from ..once import cut, once
from .alike import width_of

MOST_ROWS = 16  # from there on one product of all rows costs less
# Outputs: cuts lie between as many, so that a BLAS takes those of a part as it takes them of the whole (OpenBLAS with
# several threads does where the inputs are even, as those of all models are).
ALIGNED = 64
# Values of a block. Smaller ones stay in a second-level cache, but each costs a dozen operations, whatever its size.
_BLOCK = {True: 2**20, False: 2**19}  # unpacked, or plain
_MOST_UNPACKED = 1024  # outputs of such a block: more would wake OpenBLAS's threads (alike.py)
_SMALL = 2**17  # values of a plain matrix whose rows are each a product of their own
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
    (outputs, inputs), fast = weight.shape, not plain_blas()
    if weight.size <= (_SMALL if fast else _BLOCK[False]):  # the time of a small matrix is that of the calls
        if not fast:
            return x @ weight.T
        if x.size == inputs:  # the same product, with nothing to be broadcast
            return (weight @ x.reshape(inputs, 1)).reshape(*x.shape[:-1], outputs)
        return (weight @ x.reshape(*x.shape, 1)).squeeze(-1)
    blocks = _blocks(outputs, inputs, unpacked=False)
    if fast:
        columns = _columns(x, width_of(_forms(blocks, inputs), rows_of(x)))
        return _rows(_joined(in_turning_lanes(lambda taken: cut(weight, taken) @ columns, blocks)), x)
    rows = x.reshape(-1, 1, inputs)
    made = in_turning_lanes(lambda taken: (rows @ cut(weight, taken).T).swapaxes(-1, -2), blocks)
    return _joined(made).reshape(*x.shape[:-1], -1)


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
    keep_freed_memory()
    group_bytes, groups = group_size * bits // 8, scales.shape[1]
    blocks = _blocks(weight.shape[0], x.shape[-1], unpacked=True)
    width = width_of(_forms(blocks, group_bytes, groups), rows_of(x))
    columns, sums = _once_for_all_products(x, group_size, bits, width)
    parts = _parts(weight, scales, biases, blocks, group_bytes, kept)
    # Only once x is there: lanes would run ahead and hold the weights of many layers unpacked. (It is no gradient of
    # theirs that x has.)
    words = mx.depends([words for words, _, _ in parts], [mx.stop_gradient(x)])

    def block(number: int) -> mx.array:
        _, scale, bias = parts[number]
        packed = mx.contiguous(words[number])
        y = None
        for place, column in enumerate(columns):
            masked = packed & _mask(bits * (place + 1), packed.dtype) if place < len(columns) - 1 else packed
            values = masked.view(mx.uint8).astype(mx.float32)  # [groups, o, bytes of a group]
            y = values @ column if y is None else mx.addmm(y, values, column)
        return mx.addmm((y * scale).sum(axis=-3, keepdims=True), bias, sums)

    return _rows(_joined(in_turning_lanes(block, range(len(blocks)))), x)


def _parts(
    weight: mx.array, scales: mx.array, biases: mx.array, blocks: list[slice], group_bytes: int, kept: bool
) -> list[list[mx.array]]:
    """Of each block: words [groups, o, group_bytes / 8 or 4], the scales [groups, o, 1], the biases [o, groups]."""

    def by_group(weight: mx.array) -> list[mx.array]:
        words = weight if group_bytes % 8 else weight.view(mx.uint64)
        words = words.reshape(len(words), scales.shape[1], -1).swapaxes(0, 1)
        return [words[:, taken] for taken in blocks]

    def groups_first(scales: mx.array) -> list[mx.array]:
        return [scales[taken].T[..., None] for taken in blocks]

    def by_output(biases: mx.array) -> list[mx.array]:
        return [biases[taken] for taken in blocks]

    made, step = [], blocks[0].stop
    for array, make in ((weight, by_group), (scales, groups_first), (biases, by_output)):
        made.append(once(array, (make.__name__, step), make) if kept else make(array))
    floats = ([each.astype(mx.float32) for each in parts] for parts in made[1:])
    return [*map(list, zip(made[0], *floats, strict=True))]


def _once_for_all_products(x: mx.array, *how: int) -> tuple[list[mx.array], mx.array]:
    """_prepared(x, *how), remembered for the products that meet the same x one after the other."""
    held = getattr(_LAST, "made", None)
    if held is None or held[0]() is not x or held[1] != how:
        held = _LAST.made = weakref.ref(x), how, _prepared(x, *how)
    return held[2]


def _prepared(x: mx.array, group_size: int, bits: int, width: int) -> tuple[list[mx.array], mx.array]:
    """x [.., in] -> what meets the values at each place of all bytes, [groups, bytes of a group, width] each, and the
    sums over groups [1, groups, width]; before that an axis of parts, if it takes several of `width` rows.

    A byte b of two codes, and x for both: code 0 is b & 15, and 16 code 1 is b - (b & 15), so that

        code 0 x0 + code 1 x1 = (b & 15) (x0 - x1 / 16) + b x1 / 16

    which takes one operation for each weight less than shifting; so with more codes a byte.
    """
    columns = _columns(x, width)  # [.., in, width]
    columns = columns.reshape(*columns.shape[:-2], -1, group_size, width)
    sums = columns.sum(axis=-2)[..., None, :, :]
    places = 8 // bits
    if places == 1:
        return [columns], sums
    own = [columns[..., place::places, :] * 2.0 ** (-bits * place) for place in range(places)]
    pairs = zip(own, [*own[1:], None], strict=True)
    return [mx.contiguous(one) if after is None else one - after for one, after in pairs], sums


@cache
def _mask(bits: int, dtype: mx.Dtype) -> mx.array:
    """The lowest bits of each byte of a word; evaluated, as any thread may be given it."""
    made = mx.array(np.full(dtype.size, 2**bits - 1, np.uint8)).view(dtype)
    mx.eval(made)
    return made


def codes(weight: mx.array, place: int, bits: int) -> mx.array:
    """weight uint32 [.., n] -> float32 [.., 4 n]: what its bytes hold at this place, of 8 // bits.

    4 bits, bytes of two values   b0 a0 | b1 a1 | b2 a2    ->    a0 a1 a2 .. at place 0, b0 b1 b2 .. at place 1
    """
    if bits < 8:
        weight = (weight >> place * bits if place else weight) & (2**bits - 1) * 0x01010101
    return weight.view(mx.uint8).astype(mx.float32)


def _blocks(outputs: int, inputs: int, *, unpacked: bool) -> list[slice]:
    """How outputs are cut, which does not hang on how many rows there are."""
    most = _BLOCK[unpacked] // inputs
    if unpacked:
        most = min(most, _MOST_UNPACKED)
    elif outputs <= most:
        return [slice(0, outputs)]
    lanes = max(1, min(lane_count(), outputs * inputs // _LEAST_SHARED[unpacked]))
    step = min(most // ALIGNED, -(-outputs // lanes // ALIGNED)) * ALIGNED or ALIGNED
    return [slice(start, min(start + step, outputs)) for start in range(0, outputs, step)]


def _forms(blocks: list[slice], *inputs: int) -> frozenset[tuple[int, int]]:
    """(outputs, inputs) of the products that blocks have."""
    return frozenset((taken.stop - taken.start, each) for taken in blocks for each in inputs)


def _columns(x: mx.array, width: int) -> mx.array:
    """x [.., in] -> [in, rows], or of more rows than `width` [parts, in, width], filled up with zeros."""
    flat = x.reshape(-1, x.shape[-1])
    parts = -(-len(flat) // width)
    if parts == 1:
        return flat.T
    missing = parts * width - len(flat)
    if missing:
        flat = mx.concatenate([flat, mx.zeros((missing, flat.shape[1]), flat.dtype)])
    return flat.reshape(parts, width, -1).swapaxes(-1, -2)


def _joined(blocks: list[mx.array]) -> mx.array:
    """[.., o, rows] of all outputs."""
    return blocks[0] if len(blocks) == 1 else mx.concatenate(blocks, axis=-2)


def _rows(y: mx.array, x: mx.array) -> mx.array:
    """y [.., out, width], one part after the other -> [.., out], the rows as in x [.., in]."""
    rows = rows_of(x)
    if rows > 1:
        y = y.swapaxes(-1, -2).reshape(-1, y.shape[-2])
        y = y if len(y) == rows else y[:rows]
    return y.reshape(*x.shape[:-1], -1)


def rows_of(x: mx.array) -> int:
    """How many rows x [.., in] has."""
    return math.prod(x.shape[:-1])
