"""The published sizes of Qwen3.5's text models, and configurations cut from them.

Knows numbers of config.json files. Knows neither MLX nor any model.
"""

from __future__ import annotations

from typing import Any

_DENSE = ("0.8B", "2B", "4B", "9B", "27B")
# hidden, layers, heads, kv heads, linear value heads, ffn (dense) or (experts, chosen, width, shared width)
_SIZES: dict[str, tuple[int, int, int, int, int, Any]] = {
    "0.8B": (1024, 24, 8, 2, 16, 3584),
    "2B": (2048, 24, 8, 2, 16, 6144),
    "4B": (2560, 32, 16, 4, 32, 9216),
    "9B": (4096, 32, 16, 4, 32, 12288),
    "27B": (5120, 64, 24, 4, 48, 17408),
    "35B-A3B": (2048, 40, 16, 2, 32, (256, 8, 512, 512)),
    "122B-A10B": (3072, 48, 32, 2, 64, (256, 8, 1024, 1024)),
    "397B-A17B": (4096, 60, 32, 2, 64, (512, 10, 1024, 1024)),
}
SIZES = tuple(_SIZES)
_TIED = ("0.8B", "2B", "4B")
PERIOD = 4  # three delta-net layers, then one with attention
_MOE_KEYS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size")


def depth(size: str) -> int:
    """How many layers the published model has."""
    return _SIZES[size][1]


def config(size: str, layers: int | None = None, **overrides: Any) -> dict[str, Any]:
    """config.json of the text model of `size`, a key of SIZES, of so many layers (None: all); overrides: text keys."""
    hidden, published, heads, kv_heads, value_heads, ffn = _SIZES[size]
    layers = published if layers is None else layers
    kind = "qwen3_5" if size in _DENSE else "qwen3_5_moe"
    text: dict[str, Any] = {
        "model_type": f"{kind}_text", "hidden_size": hidden, "num_hidden_layers": layers, "vocab_size": 248320,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": 256, "attention_bias": False,
        "attn_output_gate": True, "full_attention_interval": PERIOD, "hidden_act": "silu", "rms_norm_eps": 1e-6,
        "layer_types": ["linear_attention" if (i + 1) % PERIOD else "full_attention" for i in range(layers)],
        "linear_conv_kernel_dim": 4, "linear_num_key_heads": 16, "linear_num_value_heads": value_heads,
        "linear_key_head_dim": 128, "linear_value_head_dim": 128, "max_position_embeddings": 262144,
        "tie_word_embeddings": size in _TIED, "dtype": "bfloat16", "eos_token_id": 248044, "mtp_num_hidden_layers": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000000, "partial_rotary_factor": 0.25,
                            "mrope_interleaved": True, "mrope_section": [11, 11, 10]},
    }  # fmt: skip
    text |= {"intermediate_size": ffn} if isinstance(ffn, int) else dict(zip(_MOE_KEYS, ffn, strict=True))
    text |= overrides
    architecture = "Qwen3_5ForConditionalGeneration" if kind == "qwen3_5" else "Qwen3_5MoeForConditionalGeneration"
    return {
        "architectures": [architecture], "model_type": kind, "text_config": text,
        "tie_word_embeddings": text["tie_word_embeddings"],
    }  # fmt: skip
