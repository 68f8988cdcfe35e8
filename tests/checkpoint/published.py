"""Tiny checkpoints as each tool publishes its own form, and what their numbers mean, in NumPy.

Knows the tools' formulas, from their definitions. Knows neither MLX nor this package's readers: what a map is packed
into here, and the values that are its meaning, are what any reader has to arrive at.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.checkpoint.foreign import (
    KEPT,
    Written,
    as_read,
    bfloat16,
    decode_e4m3,
    encode_e4m3,
    pack_words,
    plain,
    widened,
    write_folder,
)
from tests.checkpoints import Tensors, random_tensors, relayout, tiny_config

Packed = tuple[Written, np.ndarray]  # tensors by what comes behind the module's name; the values that they mean
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
NF4 = np.array([-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0, 0.0795803,
                0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0], np.float32)  # fmt: skip


# Rows that groups of 32 divide, but not of 64 and not blocks of 128; blocks of 64 x 32 end inside.
SIZES: dict[str, Any] = {
    "hidden_size": 96, "head_dim": 32, "num_attention_heads": 5, "linear_num_value_heads": 4,
    "linear_value_head_dim": 40, "rope_parameters": {"mrope_section": [4, 2, 2]},
    "layer_types": ["linear_attention", "full_attention"],
    "full_attention_interval": 2, "mtp_num_hidden_layers": 0, "num_key_value_heads": 1,
}  # fmt: skip
FFN = {"dense": {"intermediate_size": 160},
       "moe": {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 32, "num_experts": 4}}  # fmt: skip


@dataclass(frozen=True)
class Published:
    """A form. pack: what becomes of a linear map [out, in]; section: quantization_config, or None where a file beside
    config.json has it (beside: its name and what it holds). mode: of MLX's quantization that holds the values as they
    are, None: floats do. streams: whether experts are read from where they lie. unlike: how far from the formula values
    may be, relative to the largest: where products are taken in another order."""

    pack: Callable[[np.ndarray], Packed]
    section: Mapping[str, Any] | None
    mode: str | None
    streams: bool = False
    beside: Mapping[str, Any] = field(default_factory=dict)
    unlike: float = 0.0


def write(folder: Path, form: Published, kind: str = "moe", change: Callable[[Written], Any] | None = None) -> Tensors:
    """A checkpoint whose linear maps are in this form; returns the values that they mean, under its names."""
    config = tiny_config(kind, **SIZES | FFN[kind])
    if form.section is not None:
        config["quantization_config"] = dict(form.section)
    written: Written = {}
    meant: Tensors = {}
    for name, value in relayout(random_tensors(config, 12), "hf-per-expert").items():
        if name.endswith(KEPT) or "visual" in name or name.startswith("mtp.") or not name.endswith("_proj.weight"):
            written[name] = plain(name, value)
            meant[name] = as_read(*written[name])
            continue
        made, meant[name] = form.pack(value)
        stem = name.removesuffix("weight")
        written |= {stem + kind: tensor for kind, tensor in made.items()}
    write_folder(folder, config, written, change)
    for name, section in form.beside.items():
        (folder / name).write_text(json.dumps(section))
    return meant


def _nearest(values: np.ndarray, table: np.ndarray) -> np.ndarray:
    return np.abs(values[..., None] - table).argmin(-1)


def _nibbles(codes: np.ndarray) -> np.ndarray:
    """[.., n] -> [.., n / 2] bytes, the first in the low half."""
    return (codes[..., 0::2] | codes[..., 1::2] << 4).astype(np.uint8)


def _integers(value: np.ndarray, bits: int, group: int, symmetric: bool, tag: str) -> tuple[np.ndarray, ...]:
    """q [out, in], stored scales [out, groups], zeros [out, groups], and the values."""
    grouped = value.reshape(len(value), -1, group)
    top, middle = (1 << bits) - 1, 1 << bits - 1
    if symmetric:
        scales, zeros = np.abs(grouped).max(-1) / (middle - 1), np.full(grouped.shape[:2], middle)
    else:
        low, high = grouped.min(-1), grouped.max(-1)
        scales = (high - low) / top
        zeros = np.clip(np.round(-low / scales), 0, top).astype(np.int64)
    stored = bfloat16(scales) if tag == "BF16" else scales.astype(np.float16)
    each = as_read(tag, stored)[..., None]
    q = np.clip(np.round(grouped / each) + zeros[..., None], 0, top).astype(np.int64)
    meant = ((q - zeros[..., None]) * each).astype(np.float32)
    return q.reshape(value.shape), stored, zeros, meant.reshape(value.shape)


def nvfp4(value: np.ndarray, *, modelopt: bool) -> Packed:
    """ModelOpt: e2m1 * e4m3 * weight_scale_2. compressed-tensors: e2m1 * e4m3 / weight_global_scale."""
    grouped = value.reshape(len(value), -1, 16)
    whole = np.float32(np.abs(value).max() / (6 * 448))
    codes = encode_e4m3(np.abs(grouped).max(-1) / 6 / whole)
    scales = decode_e4m3(codes)
    places = _nearest(grouped / (np.maximum(scales, 1e-9)[..., None] * whole), E2M1)
    packed = _nibbles(places.reshape(value.shape))
    exact = (E2M1[places] * scales[..., None]).reshape(value.shape)
    if modelopt:
        scalars = {kind: ("F32", whole.reshape(())) for kind in ("weight_scale_2", "input_scale")}
        made = {"weight": ("U8", packed), "weight_scale": ("F8_E4M3", codes)} | scalars
        return made, exact * whole
    inverse = np.float32(1 / whole).reshape(1)
    scalars = {kind: ("F32", inverse) for kind in ("weight_global_scale", "input_global_scale")}
    made = {"weight_packed": ("U8", packed), "weight_scale": ("F8_E4M3", codes)} | scalars
    return made, exact / inverse


def mx(value: np.ndarray, *, bits: int) -> Packed:
    """e2m1 or e4m3, times a power of two for 32."""
    grouped = value.reshape(len(value), -1, 32)
    exponent = np.floor(np.log2(np.abs(grouped).max(-1))).astype(np.int64) - (2 if bits == 4 else 8)
    scaled = grouped / np.exp2(exponent.astype(np.float32))[..., None]
    scales = (exponent + 127).astype(np.uint8)
    if bits == 8:
        codes = encode_e4m3(scaled)
        meant = decode_e4m3(codes) * np.exp2(exponent.astype(np.float32))[..., None]
        return {"weight": ("F8_E4M3", codes.reshape(value.shape)), "weight_scale": ("U8", scales)}, meant.reshape(
            value.shape
        ).astype(np.float32)
    places = _nearest(scaled, E2M1)
    meant = (E2M1[places] * np.exp2(exponent.astype(np.float32))[..., None]).reshape(value.shape).astype(np.float32)
    return {"weight_packed": ("U8", _nibbles(places.reshape(value.shape))), "weight_scale": ("U8", scales)}, meant


def compressed(value: np.ndarray, *, bits: int, group: int | None, symmetric: bool, scattered: bool = False) -> Packed:
    """Words along the rows; zeros packed down the columns. group None: one scale a row."""
    order = np.random.RandomState(value.shape[1]).permutation(value.shape[1]) if scattered else None
    seen = value if order is None else value[:, order]
    q, scales, zeros, meant = _integers(seen, bits, group or value.shape[1], symmetric, "BF16")
    made: Written = {"weight_scale": ("BF16", scales), "weight_shape": ("I64", np.array(value.shape, np.int64))}
    if order is not None:
        back = np.argsort(order)
        q, meant = q[:, back], meant[:, back]
        made["weight_g_idx"] = "I32", (back // (group or 1)).astype(np.int32)
    made["weight_packed"] = "I32", pack_words(q.T, bits).T
    if not symmetric:
        each = 32 // bits
        padded = np.zeros((-(-len(value) // each) * each, zeros.shape[1]), np.int64)
        padded[: len(value)] = zeros
        made["weight_zero_point"] = "I32", pack_words(padded, bits)
    return made, meant


def int8(value: np.ndarray) -> Packed:
    """compressed-tensors' int-quantized: q * scale of its row."""
    scales = bfloat16(np.abs(value).max(-1, keepdims=True) / 127)
    q = np.clip(np.round(value / widened(scales)), -128, 127)
    made = {"weight": ("I8", q.astype(np.int8)), "weight_scale": ("BF16", scales)}
    return made, (q * widened(scales)).astype(np.float32)


def fp8(value: np.ndarray, *, per: str, suffix: str = "weight_scale", block: tuple[int, int] = (128, 128)) -> Packed:
    """E4M3 times the scale of its tensor, row or block."""
    if per == "block":
        high, wide = (-(-size // each) for size, each in zip(value.shape, block, strict=True))
        padded = np.zeros((high * block[0], wide * block[1]), np.float32)
        padded[: value.shape[0], : value.shape[1]] = np.abs(value)
        scales = bfloat16(padded.reshape(high, block[0], wide, block[1]).max((1, 3)) / 448)
        each = widened(scales).repeat(block[0], 0).repeat(block[1], 1)[: value.shape[0], : value.shape[1]]
        tag = "BF16"
    elif per == "row":
        scales, tag = bfloat16(np.abs(value).max(-1, keepdims=True) / 448), "BF16"
        each = widened(scales)
    else:
        scales, tag = np.float32(np.abs(value).max() / 448).reshape((1,) if per == "tensor" else ()), "F32"
        each = scales
    codes = encode_e4m3(value / each)
    return {"weight": ("F8_E4M3", codes), suffix: (tag, scales)}, decode_e4m3(codes) * each


def gptq(value: np.ndarray, *, bits: int, symmetric: bool, scattered: bool, group: int | None = 32) -> Packed:
    """Words and zeros as AutoGPTQ packs them: streams of bits down the columns, zeros less 1."""
    width = value.shape[1]
    order = np.random.RandomState(width).permutation(width) if scattered else np.arange(width)
    each, back = group or width, np.argsort(order)
    q, scales, zeros, _ = _integers(value[:, order], bits, each, symmetric, "F16")
    zeros = np.maximum(zeros, 1)  # zero - 1 is stored
    meant = (q.reshape(len(q), -1, each) - zeros[..., None]) * scales.astype(np.float32)[..., None]
    meant = meant.astype(np.float32).reshape(value.shape)[:, back]
    made: Written = {
        "qweight": ("I32", _stream(q[:, back].T, bits)),
        "scales": ("F16", scales.T),
        "qzeros": ("I32", _stream((zeros - 1), bits).T),
        "g_idx": ("I32", (back // each).astype(np.int32)),
    }
    return made, meant


def _stream(values: np.ndarray, bits: int) -> np.ndarray:
    """[n, ..] -> I32 [n * bits / 32, ..]: a stream of bits along axis 0, for widths that cross words too."""
    across = np.moveaxis(values.astype(np.uint8), 0, -1)  # [.., n]
    found = np.unpackbits(across[..., None], axis=-1, bitorder="little", count=bits)
    words = np.packbits(found.reshape(*across.shape[:-1], -1), axis=-1, bitorder="little").view(np.int32)
    return np.moveaxis(words, -1, 0)


def awq(value: np.ndarray) -> Packed:
    """Columns 0 2 4 6 1 3 5 7 of eight from the lowest bits of a word on; transposed."""
    q, scales, zeros, meant = _integers(value, 4, 32, False, "F16")

    def words(codes: np.ndarray) -> np.ndarray:
        eight = codes.reshape(len(codes), -1, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]].astype(np.uint64)
        return (eight << np.arange(0, 32, 4, dtype=np.uint64)).sum(-1).astype(np.uint32).view(np.int32)

    return {"qweight": ("I32", words(q.T)), "qzeros": ("I32", words(zeros.T)), "scales": ("F16", scales.T)}, meant


def nf4(value: np.ndarray, *, nested: bool) -> Packed:
    """Blocks of 64 of the flat tensor, the first of two in the high half of a byte."""
    flat = value.reshape(-1, 64)
    absmax = np.abs(flat).max(-1).astype(np.float32)
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(value.shape)}
    made: Written = {}
    if nested:
        offset = float(absmax.mean())
        table = np.linspace(-1, 1, 256).astype(np.float32)
        rest = (absmax - np.float32(offset)).astype(np.float32)
        outer = np.array([np.abs(rest[n : n + 256]).max() for n in range(0, len(rest), 256)], np.float32)
        each = outer.repeat(256)[: len(rest)]
        places = _nearest(rest / each, table).astype(np.uint8)
        absmax = (table[places] * each + np.float32(offset)).astype(np.float32)
        made |= {"weight.absmax": ("U8", places), "weight.nested_absmax": ("F32", outer),
                 "weight.nested_quant_map": ("F32", table)}  # fmt: skip
        state |= {"nested_blocksize": 256, "nested_offset": offset, "nested_dtype": "float32"}
    else:
        made["weight.absmax"] = "F32", absmax
    places = _nearest(flat / absmax[:, None], NF4)
    high_first = (places.reshape(-1, 2)[:, 0] << 4 | places.reshape(-1, 2)[:, 1]).astype(np.uint8)
    text = np.frombuffer(json.dumps(state).encode(), np.uint8)
    made |= {"weight": ("U8", high_first[:, None]), "weight.quant_map": ("F32", NF4),
             "weight.quant_state.bitsandbytes__nf4": ("U8", text)}  # fmt: skip
    return made, (NF4[places] * absmax[:, None]).astype(np.float32).reshape(value.shape)


def bnb_int8(value: np.ndarray) -> Packed:
    most = np.abs(value).max(-1).astype(np.float32)
    q = np.round(value / most[:, None] * 127)
    made = {"weight": ("I8", q.astype(np.int8)), "SCB": ("F32", most), "weight_format": ("U8", np.zeros((), np.uint8))}
    return made, (q * (most / np.float32(127))[:, None]).astype(np.float32)


def mixed(value: np.ndarray) -> Packed:
    """As unsloth's: the widest maps NVFP4, others FP8 for each row."""
    return nvfp4(value, modelopt=False) if len(value) in (64, 160) else fp8(value, per="row")


def _ct(how: str, weights: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": dict(weights), "format": how}
    return {"quant_method": "compressed-tensors", "format": how, "quantization_status": "compressed",
            "config_groups": {"group_0": group}, "ignore": ["lm_head"], **more}  # fmt: skip


def _int(bits: int, **more: Any) -> dict[str, Any]:
    return {"type": "int", "num_bits": bits, "group_size": 32, "strategy": "group", "symmetric": True} | more


_FP4 = {"type": "float", "num_bits": 4, "symmetric": True}
_FP8 = {"type": "float", "num_bits": 8, "symmetric": True}
_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
_MODELOPT = {"producer": {"name": "modelopt", "version": "0.47.0"}}
_NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}

FORMS: dict[str, Published] = {
    "modelopt nvfp4": Published(
        lambda v: nvfp4(v, modelopt=True), {"quant_method": "modelopt", "quant_algo": "NVFP4"}, "nvfp4", True
    ),
    "modelopt nvfp4, told beside": Published(
        lambda v: nvfp4(v, modelopt=True), None, "nvfp4", True,
        {"hf_quant_config.json": _MODELOPT | {"quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8"}}},
    ),
    "modelopt fp8": Published(
        lambda v: fp8(v, per="scalar"), {"quant_method": "modelopt", "quant_algo": "FP8"}, "mxfp8", True
    ),
    "compressed nvfp4": Published(
        lambda v: nvfp4(v, modelopt=False), _ct("nvfp4-pack-quantized", _FP4 | {"group_size": 16}), "nvfp4", True,
        unlike=3e-7,
    ),
    "compressed mxfp4": Published(
        lambda v: mx(v, bits=4), _ct("mxfp4-pack-quantized", _FP4 | {"group_size": 32}), "mxfp4", True
    ),
    "compressed mxfp8": Published(
        lambda v: mx(v, bits=8), _ct("mxfp8-quantized", _FP8 | {"group_size": 32}), "mxfp8", True
    ),
    "compressed w4a16": Published(
        lambda v: compressed(v, bits=4, group=32, symmetric=True), _ct("pack-quantized", _int(4)), "affine", True
    ),
    "compressed w8a16": Published(
        lambda v: compressed(v, bits=8, group=32, symmetric=True), _ct("pack-quantized", _int(8)), "affine", True
    ),
    "compressed w8a16, a scale a row": Published(
        lambda v: compressed(v, bits=8, group=None, symmetric=True),
        _ct("pack-quantized", _int(8, strategy="channel", group_size=None)), "affine",
    ),
    "compressed w4a16, zeros": Published(
        lambda v: compressed(v, bits=4, group=32, symmetric=False), _ct("pack-quantized", _int(4, symmetric=False)),
        "affine",
    ),
    "compressed w4a16, scattered": Published(
        lambda v: compressed(v, bits=4, group=32, symmetric=False, scattered=True),
        _ct("pack-quantized", _int(4, symmetric=False, actorder="group")), None,
    ),
    "compressed int8": Published(
        int8, _ct("int-quantized", _int(8, strategy="channel", group_size=None)), "affine", True
    ),
    "compressed fp8, a scale a tensor": Published(
        lambda v: fp8(v, per="tensor"), _ct("float-quantized", _FP8 | {"strategy": "tensor"}), "mxfp8", True
    ),
    "compressed fp8, a scale a row": Published(
        lambda v: fp8(v, per="row"), _ct("float-quantized", _FP8 | {"strategy": "channel"}), "mxfp8", True
    ),
    "compressed fp8, blocks": Published(
        lambda v: fp8(v, per="block"),
        _ct("float-quantized", _FP8 | {"strategy": "block", "block_structure": [128, 128]}), None,
    ),
    "compressed nvfp4 and fp8": Published(
        mixed, _ct("mixed-precision", _FP4 | {"group_size": 16}), "nvfp4", True, unlike=3e-7
    ),
    "awq": Published(
        awq, {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}, "affine"
    ),
    "auto-round awq": Published(
        awq, {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": False,
              "packing_format": "auto_round:auto_awq"}, "affine"
    ),
    "gptq, 8 bits": Published(
        lambda v: gptq(v, bits=8, symmetric=True, scattered=False), _GPTQ | {"bits": 8}, "affine"
    ),
    "gptq, 3 bits": Published(
        lambda v: gptq(v, bits=3, symmetric=True, scattered=False), _GPTQ | {"bits": 3}, "affine"
    ),
    "gptq, zeros": Published(
        lambda v: gptq(v, bits=4, symmetric=False, scattered=False), _GPTQ | {"sym": False}, "affine"
    ),
    "gptq, scattered": Published(
        lambda v: gptq(v, bits=4, symmetric=False, scattered=True), _GPTQ | {"sym": False, "desc_act": True}, None
    ),
    "gptq, a scale a row": Published(
        lambda v: gptq(v, bits=8, symmetric=True, scattered=False, group=None), _GPTQ | {"bits": 8, "group_size": -1},
        "affine",
    ),
    "auto-round gptq": Published(
        lambda v: gptq(v, bits=4, symmetric=True, scattered=False),
        {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": True,
         "packing_format": "auto_round:auto_gptq"}, "affine",
    ),
    "fp8, blocks of 64 x 32": Published(
        lambda v: fp8(v, per="block", suffix="weight_scale_inv", block=(64, 32)),
        {"quant_method": "fp8", "weight_block_size": [64, 32]}, None,
    ),
    "fp8, a scale a tensor": Published(
        lambda v: fp8(v, per="scalar"), {"quant_method": "fp8", "activation_scheme": "static"}, "mxfp8", True
    ),
    "bitsandbytes nf4": Published(lambda v: nf4(v, nested=False), _NF4, None),
    "bitsandbytes nf4, twice": Published(
        lambda v: nf4(v, nested=True), _NF4 | {"bnb_4bit_use_double_quant": True}, None
    ),
    "bitsandbytes int8": Published(
        bnb_int8, {"quant_method": "bitsandbytes", "load_in_8bit": True}, "affine", True, unlike=3e-7
    ),
}  # fmt: skip
