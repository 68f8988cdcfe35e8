"""The metadata of a GGUF file: the geometry of text model and vision tower, sampling defaults, what it is called.

Knows llama.cpp's keys. Knows neither the vocabulary (vocabulary.py) nor bytes (header.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mlx_qwen35.checkpoint.gguf.types import BOOL, F32, I32, STRING, U32
from mlx_qwen35.checkpoint.inventory import Shape
from mlx_qwen35.config import ModelConfig, TextConfig

_QUANTIZATION_VERSION = 2  # of ggml's blocks
_SAMPLING = (
    ("top_k", "top_k", I32), ("top_p", "top_p", F32), ("min_p", "min_p", F32), ("temperature", "temp", F32),
    ("repetition_penalty", "penalty_repeat", F32),
)  # fmt: skip
_UNITS = ((10**12, "T"), (10**9, "B"), (10**6, "M"))


@dataclass(frozen=True)
class Value:
    """A value of metadata, of one of the kinds in checkpoint.gguf.types. many: an array of that kind."""

    kind: int
    value: Any
    many: bool = False


Metadata = dict[str, Value]


def text_metadata(config: ModelConfig, mtp_layers: int) -> Metadata:
    """Of the text model with so many MTP layers behind it."""
    text, arch = config.text, architecture(config)
    sizes = {
        "block_count": text.num_hidden_layers + mtp_layers,
        "context_length": text.max_position_embeddings,
        "embedding_length": text.hidden_size,
        "attention.head_count": text.num_attention_heads,
        "attention.head_count_kv": text.num_key_value_heads,
        "attention.key_length": text.head_dim,
        "attention.value_length": text.head_dim,
        "rope.dimension_count": text.rope.rotary_dim,
        "ssm.conv_kernel": text.linear_conv_kernel_dim,
        "ssm.state_size": text.linear_key_head_dim,
        "ssm.group_count": text.linear_num_key_heads,
        "ssm.time_step_rank": text.linear_num_value_heads,
        "ssm.inner_size": text.linear_num_value_heads * text.linear_value_head_dim,
        "full_attention_interval": _interval(config, text),
    }
    if mtp_layers:
        sizes["nextn_predict_layers"] = mtp_layers
    if text.moe is None:
        sizes["feed_forward_length"] = text.intermediate_size
    else:
        sizes |= {
            "expert_count": text.moe.num_experts,
            "expert_used_count": text.moe.experts_per_token,
            "expert_feed_forward_length": text.moe.intermediate_size,
            "expert_shared_feed_forward_length": text.moe.shared_intermediate_size,
        }
    found = {key: Value(U32, size) for key, size in sizes.items()}
    recurrent = [kind == "linear_attention" for kind in text.layer_types] + [False] * mtp_layers
    found |= {
        "attention.layer_norm_rms_epsilon": Value(F32, text.rms_norm_eps),
        "attention.recurrent_layers": Value(BOOL, recurrent, many=True),
        "rope.freq_base": Value(F32, text.rope.theta),
        "rope.dimension_sections": Value(I32, [*text.rope.mrope_section, 0], many=True),
    }
    return {f"{arch}.{key}": value for key, value in (found | _yarn(config, text)).items()}


def vision_metadata(config: ModelConfig, pixels: Mapping[str, Any]) -> Metadata:
    """Of the vision tower, in its own file. pixels: what the published preprocessor_config.json says, or {}."""
    vision, text = config.vision, config.text
    sizes = {
        "projection_dim": text.hidden_size,
        "image_size": math.isqrt(vision.num_position_embeddings) * vision.patch_size,
        "patch_size": vision.patch_size,
        "embedding_length": vision.hidden_size,
        "feed_forward_length": vision.intermediate_size,
        "block_count": vision.depth,
        "attention.head_count": vision.num_heads,
        "spatial_merge_size": vision.spatial_merge_size,
    }
    found = {f"clip.vision.{key}": Value(U32, size) for key, size in sizes.items()}
    found |= {
        f"clip.vision.{key}": Value(F32, _three(pixels.get(key)), many=True) for key in ("image_mean", "image_std")
    }
    return found | {
        "clip.has_vision_encoder": Value(BOOL, True),
        "clip.projector_type": Value(STRING, "qwen3vl_merger"),
        "clip.use_gelu": Value(BOOL, True),
        "clip.vision.attention.layer_norm_epsilon": Value(F32, text.rms_norm_eps),
        "clip.vision.is_deepstack_layers": Value(BOOL, [False] * vision.depth, many=True),
    }


def general_metadata(architecture: str, kind: str, name: str, size: str, file_type: int) -> Metadata:
    """What every file says first. kind: "model" or "mmproj"; size: as `size_label` gives it."""
    return {
        "general.architecture": Value(STRING, architecture),
        "general.type": Value(STRING, kind),
        "general.name": Value(STRING, name),
        "general.size_label": Value(STRING, size),
        "general.file_type": Value(U32, file_type),
        "general.quantization_version": Value(U32, _QUANTIZATION_VERSION),
    }


def sampling_metadata(generation: Mapping[str, Any]) -> Metadata:
    """What generation_config.json advises, as far as GGUF has keys for it."""
    found = {}
    for published, key, kind in _SAMPLING:
        value = generation.get(published)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            found[f"general.sampling.{key}"] = Value(kind, int(value) if kind == I32 else float(value))
    return found


def architecture(config: ModelConfig) -> str:
    return "qwen35" if config.text.moe is None else "qwen35moe"


def size_label(shapes: Iterable[tuple[str, Shape]]) -> str:
    """How large a model of these tensors is, as llama.cpp's converter says it: "4.2B", or "256x2.4B" with experts (of
    those the last part counts one beside all else)."""
    alone, of_experts, experts = 0, 0, 0
    for name, shape in shapes:
        if "_exps." in name:
            of_experts, experts = of_experts + math.prod(shape[1:]), shape[0]
        else:
            alone += math.prod(shape)
    label = _rounded(alone + of_experts)
    return f"{experts}x{label}" if experts else label


def _rounded(count: int) -> str:
    number, unit = next(((count / unit, name) for unit, name in _UNITS if count >= unit), (count / 1e3, "K"))
    return f"{number:.{max(2 - len(str(round(number))), 0)}f}{unit}"


def _interval(config: ModelConfig, text: TextConfig) -> int:
    """config.json's, or the place of the first layer of full attention; what counts is attention.recurrent_layers."""
    raw = config.raw.get("text_config") or config.raw
    kinds = [*text.layer_types, "full_attention"]
    return raw.get("full_attention_interval") or 1 + kinds.index("full_attention")


def _yarn(config: ModelConfig, text: TextConfig) -> Metadata:
    yarn = text.rope.yarn
    if yarn is None:
        return {}
    found = {
        "rope.scaling.type": Value(STRING, "yarn"),
        "rope.scaling.factor": Value(F32, yarn.factor),
        "rope.scaling.original_context_length": Value(U32, yarn.original_max_position_embeddings),
    }
    rest = (("attn_factor", yarn.attention_factor, None), ("beta_fast", yarn.beta_fast, 32.0),
            ("beta_slow", yarn.beta_slow, 1.0))  # fmt: skip
    return found | {f"rope.scaling.yarn_{key}": Value(F32, given) for key, given, usual in rest if given != usual}


def _three(values: Any) -> list[float]:
    """A mean or deviation of each colour; the family's is 0.5."""
    good = isinstance(values, list) and len(values) == 3 and all(isinstance(value, (int, float)) for value in values)
    return [float(value) for value in values] if good else [0.5] * 3
