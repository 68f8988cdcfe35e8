"""Tiny checkpoints as other tools quantize them: FP8 with block scales, GPTQ. And what their numbers mean, in NumPy.

Knows the formats and the published names. Knows neither MLX nor this package: encoder and decoder are written from the
definition of the formats, and the decoded values are what any reader has to arrive at.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tests.checkpoints import KEPT_FLOAT32, Tensors, random_tensors, relayout, tiny_config

Written = dict[str, tuple[str, np.ndarray]]  # name -> (dtype as safetensors calls it, what lies in the file)

KEPT = ("embed_tokens.weight", "lm_head.weight", "norm.weight", "A_log", "dt_bias", "conv1d.weight", "in_proj_a.weight",
        "in_proj_b.weight", "mlp.gate.weight", "shared_expert_gate.weight", "fc.weight", "norm_embedding.weight",
        "norm_hidden.weight")  # fmt: skip
# No size is a multiple of 128, most are of 32, and the up rows of fused experts begin inside a block.
SIZES: dict[str, Any] = {
    "hidden_size": 160, "head_dim": 32, "num_attention_heads": 6, "linear_num_value_heads": 4,
    "linear_value_head_dim": 40, "rope_parameters": {"mrope_section": [4, 2, 2]},
    "layer_types": ["linear_attention", "full_attention"], "full_attention_interval": 2, "mtp_num_hidden_layers": 1,
}  # fmt: skip
FFN = {"dense": {"intermediate_size": 288},
       "moe": {"moe_intermediate_size": 96, "shared_expert_intermediate_size": 192, "num_experts": 4}}  # fmt: skip


def config_of(kind: str, section: Mapping[str, Any], flat: bool = False, **sizes: Any) -> dict[str, Any]:
    """flat: text only, without text_config."""
    config = tiny_config(kind, vision=not flat, flat=flat, **SIZES | FFN[kind] | sizes)
    return config | {"quantization_config": dict(section)}


def decode_e4m3(codes: np.ndarray) -> np.ndarray:
    """Sign, four bits of exponent (bias 7), three of mantissa; all ones after the sign is NaN, and no infinity."""
    codes = codes.astype(np.int64)
    sign, exponent, mantissa = codes >> 7, codes >> 3 & 15, codes & 7
    normal = np.ldexp(1 + mantissa / 8, exponent - 7)
    value = np.where(exponent == 0, np.ldexp(mantissa / 8, -6), normal) * np.where(sign, -1.0, 1.0)
    return np.where(codes & 0x7F == 0x7F, np.nan, value).astype(np.float32)


def encode_e4m3(values: np.ndarray) -> np.ndarray:
    """The nearest code of each value; what is too large becomes the largest."""
    table = decode_e4m3(np.arange(0x7F))
    middles = (table[1:] + table[:-1]) / 2
    return (np.searchsorted(middles, np.abs(values)) | np.where(values < 0, 0x80, 0)).astype(np.uint8)


def bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 -> the bits of bfloat16, rounded to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def widened(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def spread(scales: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """[.., blocks, blocks] -> a scale for each value of [.., out, in], in blocks of 128 x 128."""
    return scales.repeat(128, -2).repeat(128, -1)[..., : shape[-2], : shape[-1]]


def write(path: Path, written: Written, marker: str = "pt") -> None:
    header: dict[str, Any] = {"__metadata__": {"format": marker}}
    end, blobs = 0, []
    for name, (tag, value) in written.items():
        blobs.append(np.ascontiguousarray(value).tobytes())
        header[name] = {"dtype": tag, "shape": list(value.shape), "data_offsets": [end, end + len(blobs[-1])]}
        end += len(blobs[-1])
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(blobs))


def write_folder(folder: Path, config: Mapping[str, Any], written: Written, change: Callable[[Written], Any] | None):
    if change:
        change(written)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    write(folder / "model.safetensors", written)


def plain(name: str, value: np.ndarray) -> tuple[str, np.ndarray]:
    """How the official files keep what is not quantized, and it is not exact."""
    return ("F32", value) if name.endswith(KEPT_FLOAT32) else ("BF16", bfloat16(value))


def as_read(tag: str, value: np.ndarray) -> np.ndarray:
    return widened(value) if tag == "BF16" else value.astype(np.float32)


FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
       "modules_to_not_convert": ["lm_head"]}  # fmt: skip


def write_fp8(
    folder: Path,
    kind: str = "moe",
    layout: str = "hf-per-expert",
    change: Callable[[Written], Any] | None = None,
    section: Mapping[str, Any] = FP8,
    **sizes: Any,
) -> Tensors:
    """An FP8 checkpoint; returns the dequantized values under its names. layout: see relayout()."""
    config = config_of(kind, section, **sizes)
    written: Written = {}
    meant: Tensors = {}
    for name, value in relayout(random_tensors(config, 8), layout).items():
        if name.endswith(KEPT) or "visual" in name:
            written[name] = plain(name, value)
            meant[name] = as_read(*written[name])
            continue
        high, wide = (-(-size // 128) for size in value.shape[-2:])
        padded = np.zeros((*value.shape[:-2], high * 128, wide * 128), np.float32)
        padded[..., : value.shape[-2], : value.shape[-1]] = np.abs(value)
        most = padded.reshape(*value.shape[:-2], high, 128, wide, 128).max((-3, -1))
        scales = bfloat16(most / 448)
        each = spread(widened(scales), value.shape)
        codes = encode_e4m3(value / each)
        written[name], written[f"{name}_scale_inv"] = ("F8_E4M3", codes), ("BF16", scales)
        meant[name] = decode_e4m3(codes) * each
    write_folder(folder, config, written, change)
    return meant


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False,
        "dynamic": {"lm_head": {}, "-:.*attn.*": {}, "-:.*shared_expert.*": {}, "-:.*mtp.*": {}}}  # fmt: skip


def pack_words(values: np.ndarray, bits: int) -> np.ndarray:
    """[n, ..] small integers -> I32 [n * bits / 32, ..], the first in the lowest bits."""
    rows = values.astype(np.uint32).reshape(-1, 32 // bits, *values.shape[1:])
    return sum(rows[:, n] << np.uint32(n * bits) for n in range(32 // bits)).astype(np.uint32).view(np.int32)


def write_gptq(
    folder: Path,
    kind: str = "moe",
    change: Callable[[Written], Any] | None = None,
    tag: str = "F16",
    order: bool = True,
    sizes: Mapping[str, Any] | None = None,
    head: bool = False,
    special: Mapping[str, int] | None = None,
    **section: Any,
) -> Tensors:
    """A GPTQ checkpoint whose routed experts, or whose MLPs where it is dense, are integers; returns what they mean.

    tag: of the scales. order: with g_idx. sizes: changes of text_config. head: the same modules of the MTP layer too.
    special: other bits, by ends of modules' names. section: changes of quantization_config.
    """
    how = GPTQ | section
    config = config_of(kind, how, **sizes or {})
    group = how["group_size"]
    written: Written = {}
    meant: Tensors = {}
    for name, value in relayout(random_tensors(config, 9), "hf-per-expert").items():
        packed = ".mlp.experts." in name if kind == "moe" else "_proj.weight" in name and ".mlp." in name
        bits = next((b for end, b in (special or {}).items() if name.endswith(f"{end}.weight")), how["bits"])
        zero = 1 << bits - 1
        stored = zero - (how.get("checkpoint_format", "gptq") == "gptq")
        if not packed or (name.startswith("mtp.") and not head):
            written[name] = plain(name, value)
            meant[name] = as_read(*written[name])
            continue
        stem, (height, width) = name.removesuffix(".weight"), value.shape
        grouped = value.reshape(height, -1, group)
        found = np.abs(grouped).max(-1) / (zero - 1)
        scales = bfloat16(found) if tag == "BF16" else found.astype(np.float16)
        each = as_read(tag, scales)[..., None]
        q = np.clip(np.round(grouped / each) + zero, 0, 2 * zero - 1)
        meant[name] = ((q - zero) * each).astype(np.float32).reshape(value.shape)
        written[f"{stem}.qweight"] = "I32", pack_words(q.reshape(height, width).T, bits)
        written[f"{stem}.scales"] = tag, scales.T
        written[f"{stem}.qzeros"] = "I32", pack_words(np.full((height, width // group), stored), bits).T
        if order:
            written[f"{stem}.g_idx"] = "I32", (np.arange(width) // group).astype(np.int32)
    write_folder(folder, config, written, change)
    return meant
