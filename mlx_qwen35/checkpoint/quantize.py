"""Quantized tensors: their shapes, packing and unpacking.

Knows mx.quantize's formats. Knows neither which module gets which (conversion/recipes.py) nor files.
"""

from __future__ import annotations

import mlx.core as mx

from mlx_qwen35.checkpoint.inventory import Shape
from mlx_qwen35.config import BITS, GROUP_SIZES, QuantSpec
from mlx_qwen35.errors import CheckpointError

_FLOATS = ("F32", "F16", "BF16")
_LEAST = 2.0**-100  # of mxfp4 and mxfp8; MLX 0.32.4 makes a power of two above 2^100 of a group's scale below 2^-127


def packed(shape: Shape, spec: QuantSpec) -> dict[str, tuple[Shape, tuple[str, ...]]]:
    """The tensors of a quantized [.., in] weight: suffix -> (shape, safetensors dtypes that it may have)."""
    *outer, width = shape
    groups = (*outer, width // spec.group_size)
    tensors: dict[str, tuple[Shape, tuple[str, ...]]] = {"weight": ((*outer, width * spec.bits // 32), ("U32",))}
    if spec.mode == "affine":
        return tensors | {"scales": (groups, _FLOATS), "biases": (groups, _FLOATS)}
    return tensors | {"scales": (groups, ("U8",))}


def default_spec(bits: int, group_size: int, mode: str) -> QuantSpec:
    """What a conversion was asked for; raises CheckpointError where MLX does not have it.

    The modes other than affine fix both figures, so affine's usual 4 and 64 stand for "as the mode has it" there.
    """
    if mode not in BITS:
        raise CheckpointError(f"mode is {mode!r}; MLX knows {', '.join(BITS)}")
    if mode != "affine":
        bits = BITS[mode][0] if bits == 4 else bits
        group_size = GROUP_SIZES[mode][0] if group_size == 64 else group_size
    if bits not in BITS[mode] or group_size not in GROUP_SIZES[mode]:
        raise CheckpointError(
            f"{bits} bits in groups of {group_size} is no {mode} quantization that MLX has: "
            f"bits {', '.join(map(str, BITS[mode]))}, group_size {', '.join(map(str, GROUP_SIZES[mode]))}"
        )
    return QuantSpec(bits, group_size, mode)


def pack(weight: mx.array, spec: QuantSpec, *, dtype: mx.Dtype | None = None) -> dict[str, mx.array]:
    """[.., in] floats -> {"weight": uint32, "scales": .., "biases": .. where affine}.

    dtype: of affine scales and biases; None is the weight's.
    """
    dtype = dtype or weight.dtype
    if spec.mode in ("mxfp4", "mxfp8"):
        groups = weight.reshape(*weight.shape[:-1], -1, spec.group_size)
        most = mx.abs(groups).max(-1, keepdims=True)
        gone = mx.logical_and(most > 0, most < _LEAST)
        weight = mx.where(gone, mx.zeros((), weight.dtype), groups).reshape(weight.shape)
    arrays = mx.quantize(weight, spec.group_size, spec.bits, mode=spec.mode)
    if spec.mode == "affine":
        arrays = arrays[0], arrays[1].astype(dtype), arrays[2].astype(dtype)
    return dict(zip(("weight", "scales", "biases"), arrays, strict=False))


def unpack(tensors: dict[str, mx.array], spec: QuantSpec) -> mx.array:
    """What pack() gave -> [.., in] float32, without rounding on the way.

    "factors", where there are any, are those of a whole tensor or of each row.
    """
    scales, biases, factors = tensors["scales"], tensors.get("biases"), tensors.get("factors")
    if spec.mode == "affine":
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    values = mx.dequantize(
        tensors["weight"], scales, biases, spec.group_size, spec.bits, mode=spec.mode, dtype=mx.float32
    )
    return values if factors is None else values * factors[..., None]
