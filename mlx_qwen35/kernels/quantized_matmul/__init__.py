"""x @ w.T with a quantized w: MLX's kernel, but on the CPU the weights are unpacked first.

Knows which form to run. Knows no layers and no experts.
MLX's CPU kernel is scalar and unpacks the weights again for each row: 64 rows of 2048 values and 512 outputs take it
59 ms, where unpacking takes 1.5 ms and OpenBLAS's product as much again; with the BLAS of MLX's Linux wheel both forms
break even (docs/SPEED.md). Of few rows each has the bits that it has alone: kernels/few_rows, or MLX's kernel. Of GPUs
docs/EXACTNESS.md says which.
"""

from __future__ import annotations

import math

import mlx.core as mx

from .. import few_rows
from ..lanes import LEAST_SHARED, in_lanes
from ..once import cut

_UNPACK_FROM = 8  # rows on the CPU, where few_rows has no form for them
_MOST_UNPACKED = 2**24  # values that a block of unpacked weights has
_LEAST_UNPACKED = 2**17  # values that are worth a lane of their own: 0.2 ms


def quantized_matmul(
    x: mx.array,
    weight: mx.array,
    scales: mx.array,
    biases: mx.array | None,
    *,
    group_size: int,
    bits: int,
    mode: str,
    kept: bool = True,
) -> mx.array:
    """x [.., in], weight, scales, biases of mx.quantize for [out, in] -> [.., out].

    kept: whether later calls have these arrays, and not others.
    """
    how = {"group_size": group_size, "bits": bits, "mode": mode}

    if mx.default_device().type != mx.cpu:
        return mx.quantized_matmul(x, weight, scales, biases, transpose=True, **how)
    rows, (outputs, inputs) = math.prod(x.shape[:-1]), (weight.shape[0], x.shape[-1])
    if rows <= few_rows.MOST_ROWS and few_rows.unpacks(x, outputs, bits=bits, mode=mode):
        return few_rows.quantized(x, weight, scales, biases, group_size=group_size, bits=bits, kept=kept)
    if rows <= rows_alone(bits, mode) or x.dtype != mx.float32:
        packed = [part for part in (weight, scales, biases) if part is not None]

        def some(taken: slice) -> mx.array:
            parts = [cut(part, taken) for part in packed]
            return mx.quantized_matmul(x, *parts, transpose=True, **how)

        blocks = in_lanes(some, outputs, least=-(-LEAST_SHARED // inputs))
        return blocks[0] if len(blocks) == 1 else mx.concatenate(blocks, axis=-1)
    step = max(1, _MOST_UNPACKED // inputs)
    columns, blocks = _columns(x, bits, mode), []
    for start in range(0, outputs, step):

        def unpack(taken: slice, start: int = start) -> list[mx.array]:
            rows = slice(start + taken.start, start + taken.stop)
            parts = weight[rows], scales[rows], None if biases is None else biases[rows]
            # Only once x is there: lanes would run ahead and hold the weights of many layers unpacked.
            # (It is no gradient of theirs that x has.)
            held = mx.depends([part for part in parts if part is not None], [mx.stop_gradient(x)])
            return _unpacked(*held, *[None] * (3 - len(held)), **how)

        count = min(step, outputs - start)
        for parts in in_lanes(unpack, count, least=-(-_LEAST_UNPACKED // inputs)):
            block, *others = (values @ part.T for values, part in zip(columns, parts, strict=True))
            for other in others:
                block = block + other
            blocks.append(block)
    return blocks[0] if len(blocks) == 1 else mx.concatenate(blocks, axis=-1)


def rows_alone(bits: int, mode: str) -> int:
    """Up to how many rows of float32 each has the bits that it has alone, on the CPU."""
    return few_rows.MOST_ROWS if few_rows.by_bytes(bits, mode) and few_rows.fast_blas() else _UNPACK_FROM - 1


def _columns(x: mx.array, bits: int, mode: str) -> list[mx.array]:
    """x [.., in] -> its columns in the order in which `_unpacked` has the weights'."""
    count = 8 // bits if few_rows.by_bytes(bits, mode) else 1
    return [x] if count == 1 else [mx.contiguous(x[..., place::count]) for place in range(count)]


def _unpacked(
    weight: mx.array, scales: mx.array, biases: mx.array | None, *, group_size: int, bits: int, mode: str
) -> list[mx.array]:
    """The float32 weights [out, in] that a quantized weight stands for, those at each place of a byte by themselves.

    4 bits, bytes of two values   b0 a0 | b1 a1 | b2 a2    ->    a0 a1 a2 .. and b0 b1 b2 ..

    mx.dequantize, which puts them side by side again, takes three times as long.
    """
    if not few_rows.by_bytes(bits, mode):
        return [mx.dequantize(weight, scales, biases, group_size, bits, mode, dtype=mx.float32)]
    scales, biases = scales.astype(mx.float32)[..., None], biases.astype(mx.float32)[..., None]
    made = []
    for place in range(8 // bits):
        values = few_rows.codes(weight, place, bits).reshape(*scales.shape[:-1], -1)
        made.append((values * scales + biases).flatten(-2))
    return made
