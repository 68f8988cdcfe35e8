"""Tiny random Qwen3.5 checkpoints for tests: configuration, tensors, files, in every published layout.

Knows config.json, the names and shapes of the tensors, and the safetensors format. Knows neither MLX nor this
package nor torch: what is written here is what any implementation has to read, and the golden vectors are made from
the very same values.
"""

import functools
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

Tensors = dict[str, np.ndarray]

_TAGS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
# What Qwen3.5 keeps in float32 in an otherwise 16-bit file.
KEPT_FLOAT32 = ("linear_attn.A_log", "linear_attn.norm.weight")
_SHIFTED_NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight", "q_norm.weight", "k_norm.weight",
                  "language_model.norm.weight", "model.norm.weight", "mtp.norm.weight",
                  "pre_fc_norm_embedding.weight", "pre_fc_norm_hidden.weight")


def tiny_config(kind: str = "dense", *, flat: bool = False, vision: bool = False, **overrides: Any) -> dict[str, Any]:
    """config.json of a small model in which no two sizes that could be confused are equal.

    kind: "dense" (tied head) or "moe" (its own head). flat: the text-only form, without text_config. vision: with a
    vision tower. overrides: keys of the text configuration; `layer_types` alone sets the number of layers too,
    `num_hidden_layers` alone the layer types (every fourth is full attention), and `rope_parameters` is merged into
    the default. To quantize, choose sizes that a group divides (the defaults are odd on purpose).
    """
    if kind not in ("dense", "moe"):
        raise ValueError(f"kind is 'dense' or 'moe', not {kind!r}")
    model_type = "qwen3_5_moe" if kind == "moe" else "qwen3_5"
    text: dict[str, Any] = {
        "attention_bias": False,
        "attn_output_gate": True,
        "dtype": "float32",
        "eos_token_id": 86,
        "full_attention_interval": 4,
        "head_dim": 16,
        "hidden_act": "silu",
        "hidden_size": 64,
        "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 6,
        "linear_value_head_dim": 12,
        "max_position_embeddings": 4096,
        "model_type": model_type + "_text",
        "mtp_num_hidden_layers": 0,
        "num_attention_heads": 6,
        "num_hidden_layers": 4,
        "num_key_value_heads": 3,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": kind == "dense",
        "vocab_size": 96,
    }
    rope = {
        "mrope_interleaved": True,
        "mrope_section": [2, 1, 1],
        "partial_rotary_factor": 0.5,
        "rope_theta": 10000000,
        "rope_type": "default",
    }
    if kind == "dense":
        text["intermediate_size"] = 112
    else:
        text |= {"moe_intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 3,
                 "shared_expert_intermediate_size": 40}
    if "layer_types" in overrides:
        overrides = {"num_hidden_layers": len(overrides["layer_types"])} | overrides
    elif "num_hidden_layers" in overrides:
        text["layer_types"] = [
            "linear_attention" if (i + 1) % 4 else "full_attention" for i in range(overrides["num_hidden_layers"])
        ]
    text["rope_parameters"] = rope | overrides.pop("rope_parameters", {})
    text |= overrides
    if flat:
        return {"architectures": [_architecture(kind, "CausalLM")]} | text
    config = {
        "architectures": [_architecture(kind, "ConditionalGeneration")],
        "image_token_id": 80,
        "model_type": model_type,
        "text_config": text,
        "tie_word_embeddings": text["tie_word_embeddings"],
        "video_token_id": 81,
        "vision_end_token_id": 83,
        "vision_start_token_id": 82,
    }
    if vision:
        config["vision_config"] = {
            "deepstack_visual_indexes": [],
            "depth": 2,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": 24,
            "in_channels": 3,
            "intermediate_size": 36,
            "model_type": model_type,
            "num_heads": 2,
            "num_position_embeddings": 16,
            "out_hidden_size": text["hidden_size"],
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        }
    return config


def _architecture(kind: str, head: str) -> str:
    return f"Qwen3_5{'Moe' if kind == 'moe' else ''}For{head}"


def tensor_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint under its HF name, experts fused; "model." prefixes as config's form wants."""
    nested = "text_config" in config
    text = config["text_config"] if nested else config
    prefix = "model.language_model." if nested else "model."
    hidden, vocab = text["hidden_size"], text["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {f"{prefix}embed_tokens.weight": (vocab, hidden)}
    for i, kind in enumerate(text["layer_types"]):
        shapes |= _layer_shapes(f"{prefix}layers.{i}.", text, kind)
    shapes[f"{prefix}norm.weight"] = (hidden,)
    if not text["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    if "vision_config" in config:
        shapes |= _vision_shapes(config["vision_config"])
    for i in range(text.get("mtp_num_hidden_layers", 0)):
        shapes |= _layer_shapes(f"mtp.layers.{i}.", text, "full_attention")
    if text.get("mtp_num_hidden_layers", 0):
        shapes["mtp.fc.weight"] = (hidden, 2 * hidden)
        shapes |= {f"mtp.{n}.weight": (hidden,) for n in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")}
    return shapes


def _layer_shapes(prefix: str, text: Mapping[str, Any], kind: str) -> dict[str, tuple[int, ...]]:
    hidden = text["hidden_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    if kind == "linear_attention":
        heads, dim = text["linear_num_value_heads"], text["linear_value_head_dim"]
        channels = 2 * text["linear_num_key_heads"] * text["linear_key_head_dim"] + heads * dim
        shapes |= {
            "linear_attn.in_proj_qkv.weight": (channels, hidden),
            "linear_attn.in_proj_z.weight": (heads * dim, hidden),
            "linear_attn.in_proj_b.weight": (heads, hidden),
            "linear_attn.in_proj_a.weight": (heads, hidden),
            "linear_attn.conv1d.weight": (channels, 1, text["linear_conv_kernel_dim"]),
            "linear_attn.A_log": (heads,),
            "linear_attn.dt_bias": (heads,),
            "linear_attn.norm.weight": (dim,),
            "linear_attn.out_proj.weight": (hidden, heads * dim),
        }
    else:
        query, key, dim = text["num_attention_heads"], text["num_key_value_heads"], text["head_dim"]
        shapes |= {
            "self_attn.q_proj.weight": (query * 2 * dim, hidden),
            "self_attn.k_proj.weight": (key * dim, hidden),
            "self_attn.v_proj.weight": (key * dim, hidden),
            "self_attn.o_proj.weight": (hidden, query * dim),
            "self_attn.q_norm.weight": (dim,),
            "self_attn.k_norm.weight": (dim,),
        }
    if "num_experts" in text:
        experts, size = text["num_experts"], text["moe_intermediate_size"]
        shapes |= {
            "mlp.gate.weight": (experts, hidden),
            "mlp.experts.gate_up_proj": (experts, 2 * size, hidden),
            "mlp.experts.down_proj": (experts, hidden, size),
            "mlp.shared_expert_gate.weight": (1, hidden),
        }
        ffn, size = "mlp.shared_expert.", text["shared_expert_intermediate_size"]
    else:
        ffn, size = "mlp.", text["intermediate_size"]
    shapes |= {f"{ffn}{name}_proj.weight": (size, hidden) for name in ("gate", "up")}
    shapes[f"{ffn}down_proj.weight"] = (hidden, size)
    return {prefix + name: shape for name, shape in shapes.items()}


def _vision_shapes(vision: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, inner, patch = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
    merged = hidden * vision["spatial_merge_size"] ** 2
    weights: dict[str, tuple[int, ...]] = {
        "patch_embed.proj": (hidden, vision["in_channels"], vision["temporal_patch_size"], patch, patch),
        "merger.norm": (hidden,),
        "merger.linear_fc1": (merged, merged),
        "merger.linear_fc2": (vision["out_hidden_size"], merged),
    }
    for i in range(vision["depth"]):
        weights |= {
            f"blocks.{i}.norm1": (hidden,),
            f"blocks.{i}.norm2": (hidden,),
            f"blocks.{i}.attn.qkv": (3 * hidden, hidden),
            f"blocks.{i}.attn.proj": (hidden, hidden),
            f"blocks.{i}.mlp.linear_fc1": (inner, hidden),
            f"blocks.{i}.mlp.linear_fc2": (hidden, inner),
        }
    shapes: dict[str, tuple[int, ...]] = {"model.visual.pos_embed.weight": (vision["num_position_embeddings"], hidden)}
    for name, shape in weights.items():
        shapes |= {f"model.visual.{name}.weight": shape, f"model.visual.{name}.bias": shape[:1]}
    return shapes


def random_tensors(config: Mapping[str, Any], seed: int = 0) -> Tensors:
    """float32 tensors under HF names. A value depends on the seed and the tensor's name only, on every machine.

    RandomState and not default_rng: NumPy promises that its numbers never change, and the golden vectors hang on it.
    Scales are such that each part matters to the logits: norms are not at rest, gates and decays are spread.
    """
    return {name: _drawn(seed, name, shape).copy() for name, shape in tensor_shapes(config).items()}


@functools.lru_cache(maxsize=2000)
def _drawn(seed: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Kept, as many tests ask for the same model."""
    rng = np.random.RandomState(zlib.crc32(f"{seed}:{name}".encode()))
    return _values(name, shape, rng).astype(np.float32)


def _values(name: str, shape: tuple[int, ...], rng: np.random.RandomState) -> np.ndarray:
    if name.endswith("A_log"):
        return np.log(rng.uniform(0.05, 15, shape))
    noise = rng.standard_normal(shape)
    if name.endswith("dt_bias"):
        return noise - 2
    if name.endswith("linear_attn.norm.weight") or (".visual." in name and ".norm" in name and name.endswith("weight")):
        return 1 + 0.3 * noise
    if "norm" in name:
        return 0.3 * noise
    if name.endswith("bias"):
        return 0.1 * noise
    if "embed_tokens" in name:
        return noise
    if "conv1d" in name or "pos_embed" in name:
        return 0.5 * noise
    # A router twice as spread as its neighbours keeps the choice of experts clear of rounding.
    return noise * (3.0 if name.endswith("mlp.gate.weight") else 1.5) / np.sqrt(_fan_in(name, shape))


def _fan_in(name: str, shape: tuple[int, ...]) -> int:
    return int(np.prod(shape[1:])) if "patch_embed" in name else shape[-1]


def relayout(tensors: Mapping[str, np.ndarray], layout: str) -> Tensors:
    """The same model under the names and shapes of another layout.

    "hf": as published, experts fused. "hf-per-expert": one tensor per expert and projection. "mlx": as mlx-lm and
    mlx-vlm write it - norms hold 1 + w, conv1d is [C, K, 1], experts are mlp.switch_mlp.*, and mtp.* is left out.
    "mlx-text": the same without the roof "language_model." over every name.
    """
    if layout == "hf":
        return dict(tensors)
    if layout == "hf-per-expert":
        return _split_experts(tensors, per_expert=True)
    if layout in ("mlx", "mlx-text"):
        roof = "language_model." if layout == "mlx" else ""
        split = _split_experts(tensors, per_expert=False)
        return {_mlx_name(n, roof): _mlx_value(n, v) for n, v in split.items() if not n.startswith("mtp.")}
    raise ValueError(f"unknown layout {layout!r}")


def _split_experts(tensors: Mapping[str, np.ndarray], *, per_expert: bool) -> Tensors:
    out = {}
    for name, value in tensors.items():
        stem, _, last = name.rpartition(".experts.")
        if last == "gate_up_proj":
            gate, up = np.split(value, 2, axis=1)  # [E, 2M, H] -> 2 x [E, M, H]
            parts = {"gate_proj": gate, "up_proj": up}
        elif last == "down_proj":
            parts = {"down_proj": value}
        else:
            out[name] = value
            continue
        for part, stacked in parts.items():
            if per_expert:
                out |= {f"{stem}.experts.{e}.{part}.weight": stacked[e] for e in range(len(stacked))}
            else:
                out[f"{stem}.switch_mlp.{part}.weight"] = stacked
    return out


def _mlx_name(name: str, roof: str) -> str:
    if name.startswith("model.visual."):
        return "vision_tower." + name.removeprefix("model.visual.")
    return roof + name.replace("model.language_model.", "model.")


def _mlx_value(name: str, value: np.ndarray) -> np.ndarray:
    if name.endswith("conv1d.weight"):
        return value.transpose(0, 2, 1)  # [C, 1, K] -> [C, K, 1]
    if name.endswith("patch_embed.proj.weight"):
        return value.transpose(0, 2, 3, 4, 1)  # [V, C, T, P, P] -> [V, T, P, P, C]
    if ".visual." not in name and name.endswith(_SHIFTED_NORMS):
        return value + np.float32(1)
    return value


def loaded(name: str, value: np.ndarray) -> tuple[str, np.ndarray]:
    """What a model of this package calls a tensor of the layout "mlx", and the value that it has there."""
    name = name.removeprefix("language_model.").removeprefix("model.").replace("switch_mlp", "experts")
    if name.endswith("patch_embed.proj.weight"):
        value = value.transpose(0, 4, 1, 2, 3).reshape(len(value), -1)  # [V, T, P, P, C] -> [V, C * T * P * P]
    return name.replace("vision_tower.", "vision."), value


def write_checkpoint(
    folder: Path | str,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    *,
    shards: int = 1,
    layout: str = "hf",
    dtype: str = "float32",
    keep_float32: tuple[str, ...] = KEPT_FLOAT32,
) -> Path:
    """Write config.json and the weights: model.safetensors, or `shards` files with an index.

    tensors: HF names, float32 (as random_tensors gives them); see relayout() for `layout`. dtype: float32, float16 or
    bfloat16; tensors whose name ends in one of `keep_float32` stay float32, as Qwen3.5 publishes them.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = relayout(tensors, layout)
    names = sorted(tensors)
    metadata = {"format": "mlx" if layout.startswith("mlx") else "pt"}
    weight_map, total = {}, 0
    for number in range(shards):
        file = "model.safetensors" if shards == 1 else f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = names[len(names) * number // shards : len(names) * (number + 1) // shards]
        weight_map |= dict.fromkeys(part, file)
        dtypes = {n: "float32" if n.endswith(keep_float32) else dtype for n in part}
        total += write_safetensors(folder / file, {n: tensors[n] for n in part}, dtypes, metadata)
    if shards > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    return folder


def write_safetensors(
    path: Path, tensors: Mapping[str, np.ndarray], dtypes: Mapping[str, str], metadata: Mapping[str, str]
) -> int:
    """Write one file, each tensor in the dtype named for it; returns the bytes of the tensors.

    By hand, because NumPy has no bfloat16 and so safetensors.numpy cannot write it.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    blobs, end = [], 0
    for name, value in tensors.items():
        blobs.append(_bytes(value, dtypes[name]))
        start, end = end, end + len(blobs[-1])
        header[name] = {"dtype": _TAGS[dtypes[name]], "shape": list(value.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(blobs))
    return end


def _bytes(value: np.ndarray, dtype: str) -> bytes:
    if dtype != "bfloat16":
        return np.ascontiguousarray(value, dtype).tobytes()
    bits = np.ascontiguousarray(value, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).tobytes()  # the upper half, rounded to even
