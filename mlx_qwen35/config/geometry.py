"""Geometry of a checkpoint of the Qwen3.5 family (3.5, 3.6, 3.8), read from config.json and frozen.

Knows the keys of config.json and which values this package can run. Knows no arrays, no weights and no tokenizer.
A size has no default: a missing, ill-typed or unsupported value is a CheckpointError that names the file and the key.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_qwen35.errors import CheckpointError
from mlx_qwen35.machine.files import listed

from .fields import LARGEST_COUNT, LARGEST_SIZE, Fields, kind_of
from .quantization import Quantization, read_quantization

DENSE_TYPES = ("qwen3_5", "qwen3_5_text")
MOE_TYPES = ("qwen3_5_moe", "qwen3_5_moe_text")
HADAMARD = "prism_hadamard_qwen35"  # Ternary-Bonsai: the dense model, whose packed products are given rotated inputs
# Flash-Next, under its own name and under that of the first files.
_FLASH_NEXT = ("qwen4_exp", "qwen4_exp_text", "qwen3_8_flash_next", "qwen3_8_flash_next_text")
LAYER_KINDS = ("linear_attention", "full_attention")

_MOST_LAYERS = 4096
# Of rope_parameters, those that may stand straight in text_config; max_position_embeddings is none of them.
_ROPE_KEYS = (
    "rope_theta", "partial_rotary_factor", "rope_type", "mrope_section", "mrope_interleaved", "factor",
    "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim",
    "truncate",
)  # fmt: skip


@dataclass(frozen=True)
class Yarn:
    """Context extension by YaRN, with the keys and defaults that transformers gives them."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of the first `rotary_dim` of head_dim; mrope_section counts frequencies per axis (t, h, w)."""

    theta: float
    rotary_dim: int
    mrope_section: tuple[int, int, int]
    yarn: Yarn | None


@dataclass(frozen=True)
class MoE:
    """Sizes of the routed experts and of the shared one."""

    num_experts: int
    experts_per_token: int
    intermediate_size: int
    shared_intermediate_size: int


@dataclass(frozen=True)
class TextConfig:
    """The text model. Exactly one of intermediate_size (dense FFN) and moe is set."""

    hidden_size: int
    num_hidden_layers: int
    vocab_size: int
    layer_types: tuple[str, ...]
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope: Rope
    tie_word_embeddings: bool
    intermediate_size: int | None
    moe: MoE | None
    mtp_num_hidden_layers: int


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    in_channels: int
    patch_size: int
    spatial_merge_size: int
    temporal_patch_size: int
    num_position_embeddings: int
    out_hidden_size: int


@dataclass(frozen=True)
class ModelConfig:
    """A whole config.json. `source_quantization` holds a quantization_config that is not MLX's (fp8, gptq, ...)."""

    model_type: str
    text: TextConfig
    vision: VisionConfig | None
    image_token_id: int | None
    video_token_id: int | None
    vision_start_token_id: int | None
    vision_end_token_id: int | None
    eos_token_ids: tuple[int, ...]
    quantization: Quantization | None
    source_quantization: dict[str, Any] | None
    raw: dict[str, Any] = field(repr=False)

    @classmethod
    def from_folder(cls, folder: str | Path) -> ModelConfig:
        """Read `folder`/config.json; raises CheckpointError if it is missing, unreadable or not supported."""
        path = Path(folder) / "config.json"
        try:
            raw = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise CheckpointError(f"{path} does not exist: {_advice(path.parent)}") from None
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error}): check the path and its permissions") from None
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} is not valid JSON ({error}): download or copy the file again") from None
        return cls.from_dict(raw, where=str(path))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], *, where: str = "config.json") -> ModelConfig:
        """Read a parsed config.json, nested (text_config) or flat; `where` names it in errors (CheckpointError)."""
        if not isinstance(raw, Mapping):
            raise CheckpointError(f"{where} holds {kind_of(raw)} where an object is expected: download the file again")
        raw = dict(raw)
        top = Fields(raw, where)
        model_type = _model_type(top)
        text = top.section("text_config") or top
        vision = top.section("vision_config")
        text_config = _text(text, top, moe=_is_moe(model_type, text), vision=vision is not None)
        quantization, source = read_quantization(top, text)
        return cls(
            model_type=model_type,
            text=text_config,
            vision=_vision(vision, text_config) if vision is not None else None,
            image_token_id=top.token("image_token_id"),
            video_token_id=top.token("video_token_id"),
            vision_start_token_id=top.token("vision_start_token_id"),
            vision_end_token_id=top.token("vision_end_token_id"),
            eos_token_ids=tuple(dict.fromkeys(top.tokens("eos_token_id") + text.tokens("eos_token_id"))),
            quantization=quantization,
            source_quantization=source,
            raw=raw,
        )


def _advice(folder: Path) -> str:
    """What to do about a folder without config.json."""
    if any(listed(folder, "*.gguf")):
        return "of the GGUF files in it none is a model's by its name; give the .gguf file itself"
    if (folder / "adapter_config.json").exists():
        return "this folder holds an adapter; give the folder of the model that it belongs to, or fuse the two"
    return "give the folder that holds a checkpoint's files"


def _model_type(top: Fields) -> str:
    model_type = top.values.get("model_type")
    if model_type is None:
        raise top.fail("model_type", "is missing: this does not look like the config.json of a language model")
    if model_type in _FLASH_NEXT:
        raise top.fail(
            "model_type",
            f"is {model_type!r}: Qwen3.8-Flash-Next is another architecture than Qwen3.5 to 3.8, which this package "
            "does not compute; use mlx-vlm for it",
        )
    if model_type == "qwen3_5_mtp":
        raise top.fail(
            "model_type",
            f"is {model_type!r}: this is a head that drafts for a model. Give that model, and this as draft_model "
            "(--draft-model)",
        )
    if model_type == HADAMARD:
        return DENSE_TYPES[0]
    if top.has("dflash_config"):
        raise top.fail(
            "dflash_config",
            "is that of a drafter, which answers nothing itself. Give the model that it drafts for, and this as "
            "draft_model (--draft-model)",
        )
    if model_type not in DENSE_TYPES + MOE_TYPES:
        raise top.fail(
            "model_type",
            f"is {model_type!r:.80}: this package runs Qwen3.5, 3.6 and 3.8 "
            f"({', '.join(DENSE_TYPES + MOE_TYPES)}); use mlx-lm or mlx-vlm for other models",
        )
    return model_type


def _is_moe(model_type: str, text: Fields) -> bool:
    inner = text.values.get("model_type", model_type)
    same_family = MOE_TYPES if model_type in MOE_TYPES else DENSE_TYPES
    if inner is not None and inner not in (*same_family, HADAMARD):
        raise text.fail("model_type", f"is {inner!r:.80}, but the checkpoint's model_type is {model_type!r}")
    return model_type in MOE_TYPES


def _text(text: Fields, top: Fields, *, moe: bool, vision: bool) -> TextConfig:
    text.only("hidden_act", "silu", "swish")
    text.only("output_gate_type", "silu", "swish")
    text.only("attention_bias", False)
    layers = text.size("num_hidden_layers", most=_MOST_LAYERS)
    config = TextConfig(
        hidden_size=text.size("hidden_size"),
        num_hidden_layers=layers,
        vocab_size=text.size("vocab_size", most=2**24),
        layer_types=_layer_types(text, layers),
        num_attention_heads=text.size("num_attention_heads"),
        num_key_value_heads=text.size("num_key_value_heads"),
        head_dim=text.size("head_dim"),
        linear_num_key_heads=text.size("linear_num_key_heads"),
        linear_num_value_heads=text.size("linear_num_value_heads"),
        linear_key_head_dim=text.size("linear_key_head_dim"),
        linear_value_head_dim=text.size("linear_value_head_dim"),
        linear_conv_kernel_dim=text.size("linear_conv_kernel_dim"),
        rms_norm_eps=text.number("rms_norm_eps"),
        max_position_embeddings=text.size("max_position_embeddings", most=LARGEST_COUNT),
        rope=_rope(text, vision=vision),
        # transformers ties by the outermost config; text_config speaks where that is silent.
        tie_word_embeddings=top.flag("tie_word_embeddings", text.flag("tie_word_embeddings", False)),
        intermediate_size=None if moe else text.size("intermediate_size"),
        moe=_moe(text) if moe else None,
        mtp_num_hidden_layers=text.size("mtp_num_hidden_layers", least=0, most=_MOST_LAYERS)
        if text.has("mtp_num_hidden_layers")
        else 0,
    )
    for many, few in (
        ("num_attention_heads", "num_key_value_heads"),
        ("linear_num_value_heads", "linear_num_key_heads"),
    ):
        if getattr(config, many) % getattr(config, few):
            raise text.fail(many, f"is {getattr(config, many)}, no multiple of {few} ({getattr(config, few)})")
    for heads, dim in (
        ("num_attention_heads", "head_dim"),
        ("linear_num_key_heads", "linear_key_head_dim"),
        ("linear_num_value_heads", "linear_value_head_dim"),
    ):
        if getattr(config, heads) * getattr(config, dim) > LARGEST_SIZE:
            raise text.fail(heads, f"times {dim} is {getattr(config, heads) * getattr(config, dim)}: a damaged file")
    return config


def _layer_types(text: Fields, layers: int) -> tuple[str, ...]:
    kinds = text.values.get("layer_types")
    if kinds is None:
        if not text.has("full_attention_interval"):
            raise text.fail("layer_types", "is missing, and so is full_attention_interval: one of them must be given")
        every = text.size("full_attention_interval")
        return tuple(LAYER_KINDS[(n + 1) % every == 0] for n in range(layers))
    if not isinstance(kinds, list) or len(kinds) != layers:
        found = f"{len(kinds)} entries" if isinstance(kinds, list) else kind_of(kinds)
        raise text.fail("layer_types", f"holds {found} where a list of num_hidden_layers = {layers} is expected")
    for n, kind in enumerate(kinds):
        if kind not in LAYER_KINDS:
            raise text.fail(f"layer_types[{n}]", f"is {kind!r:.80}; known are {' and '.join(LAYER_KINDS)}")
    return tuple(kinds)


def _rope(text: Fields, *, vision: bool) -> Rope:
    # rope_parameters is today's key, rope_scaling the older one; a file that has both overrides the first by the
    # second, as transformers does. Some writers put the same keys straight into text_config, beside or instead.
    merged = _rope_section(text, "rope_parameters")
    for key in _ROPE_KEYS:
        if not text.has(key):
            continue
        if key in merged and merged[key] != text.values[key]:
            raise text.fail(
                key,
                f"is {text.values[key]!r:.80} and rope_parameters.{key} is {merged[key]!r:.80}: keep the one that the "
                "published config.json has",
            )
        merged[key] = text.values[key]
    merged |= _rope_section(text, "rope_scaling")
    rope = Fields(merged, text.where, text.prefix + "rope_parameters.")
    rope.only("rope_type", "default", "yarn")
    rope.only("mrope_interleaved", True)

    head_dim = text.size("head_dim")
    rotary_dim = int(head_dim * rope.number("partial_rotary_factor"))
    if rotary_dim % 2 or not 2 <= rotary_dim <= head_dim:
        raise rope.fail("partial_rotary_factor", f"turns {rotary_dim} of head_dim = {head_dim}: must be even and fit")
    if rope.has("mrope_section") or vision:
        section = rope.required("mrope_section")
        whole = isinstance(section, list) and all(isinstance(n, int) and not isinstance(n, bool) for n in section)
        if not whole or len(section) != 3 or min(section) < 0 or sum(section) != rotary_dim // 2:
            raise rope.fail("mrope_section", f"is {section!r:.80}: three counts of sum {rotary_dim // 2} are expected")
    else:
        section = (rotary_dim // 2, 0, 0)  # text has one position per token: the sections make no difference
    theta = rope.number("rope_theta", above=1.0)
    yarn = _yarn(rope, text) if rope.values.get("rope_type") == "yarn" else None
    return Rope(theta, rotary_dim, tuple(section), yarn)


def _rope_section(text: Fields, key: str) -> dict[str, Any]:
    part = text.section(key)
    values = {k: v for k, v in part.values.items() if v is not None} if part else {}
    if "type" in values:
        values.setdefault("rope_type", values["type"])
    return values


def _yarn(rope: Fields, text: Fields) -> Yarn:
    def optional(key: str, default: float | None) -> float | None:
        return rope.number(key) if rope.values.get(key) not in (None, 0) else default  # 0 is "unset" (transformers)

    source = rope if rope.has("original_max_position_embeddings") else text
    key = "original_max_position_embeddings" if source is rope else "max_position_embeddings"
    return Yarn(
        factor=rope.number("factor"),
        original_max_position_embeddings=source.size(key, most=LARGEST_COUNT),
        beta_fast=optional("beta_fast", 32.0),
        beta_slow=optional("beta_slow", 1.0),
        attention_factor=rope.number("attention_factor") if rope.has("attention_factor") else None,
        mscale=optional("mscale", None),
        mscale_all_dim=optional("mscale_all_dim", None),
        truncate=rope.flag("truncate", True),
    )


def _moe(text: Fields) -> MoE:
    moe = MoE(
        num_experts=text.size("num_experts"),
        experts_per_token=text.size("num_experts_per_tok"),
        intermediate_size=text.size("moe_intermediate_size"),
        shared_intermediate_size=text.size("shared_expert_intermediate_size"),
    )
    if moe.experts_per_token > moe.num_experts:
        raise text.fail("num_experts_per_tok", f"is {moe.experts_per_token}, more than num_experts ({moe.num_experts})")
    return moe


def _vision(vision: Fields, text: TextConfig) -> VisionConfig:
    vision.only("model_type", *DENSE_TYPES, *MOE_TYPES, "qwen3_5_vision", "qwen3_5_moe_vision")
    vision.only("hidden_act", "gelu_pytorch_tanh")
    vision.only("deepstack_visual_indexes", [])
    sizes = {name: vision.size(name) for name in VisionConfig.__dataclass_fields__}
    config = VisionConfig(**sizes)
    if config.hidden_size % config.num_heads or config.hidden_size // config.num_heads % 4:
        raise vision.fail("num_heads", f"is {config.num_heads}: hidden_size {config.hidden_size} needs heads of 4n")
    if math.isqrt(config.num_position_embeddings) ** 2 != config.num_position_embeddings:
        raise vision.fail("num_position_embeddings", f"is {config.num_position_embeddings}: a square is expected")
    if config.out_hidden_size != text.hidden_size:
        raise vision.fail(
            "out_hidden_size", f"is {config.out_hidden_size}, but the text's hidden_size is {text.hidden_size}"
        )
    return config
