"""Which tensors a configuration calls for, under our names, and their unquantized shapes.

Knows the geometry and nothing else: no files, no arrays. It is what a checkpoint is held against before the model is
built, and what a conversion writes. tests/checkpoint holds it against the parameters of Model, in which only one shape
differs: the patch embedding is a convolution [V, T, P, P, C] in files and a matrix [V, C * T * P * P] there.
"""

from __future__ import annotations

from collections.abc import Iterator

from mlx_qwen35.config import ModelConfig, TextConfig, VisionConfig

Shape = tuple[int, ...]

PATCH_EMBEDDING = "vision.patch_embed.proj.weight"

# Stay float32 where the file has them so: exp() of one and the decay of a whole context hang on them.
FACTORS = ".factors"  # of a packed module: what its product is multiplied by, one for all outputs or one for each
SIGNS = ".signs"  # of a packed module: those of the rotation before its product, one for each input
KEPT_FLOAT32 = ("linear_attn.A_log", "linear_attn.dt_bias", FACTORS, SIGNS)


def text_tensors(config: ModelConfig) -> dict[str, Shape]:
    """Every weight of the text model, in the order of its use; the head only where it is not tied."""
    text = config.text
    shapes: dict[str, Shape] = {"embed_tokens.weight": (text.vocab_size, text.hidden_size)}
    for number, kind in enumerate(text.layer_types):
        shapes |= {f"layers.{number}.{name}": shape for name, shape in _layer(text, kind)}
    shapes["norm.weight"] = (text.hidden_size,)
    if not text.tie_word_embeddings:
        shapes["lm_head.weight"] = (text.vocab_size, text.hidden_size)
    return shapes


def vision_tensors(config: ModelConfig) -> dict[str, Shape]:
    """Every weight of the vision tower; empty without a vision_config."""
    vision = config.vision
    return {f"vision.{name}": shape for name, shape in _vision(vision)} if vision else {}


def mtp_tensors(config: ModelConfig, layers: int) -> dict[str, Shape]:
    """Every weight of an MTP head of so many layers."""
    hidden = config.text.hidden_size
    shapes: dict[str, Shape] = {"mtp.fc.weight": (hidden, 2 * hidden)}
    shapes |= {f"mtp.{name}.weight": (hidden,) for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")}
    for number in range(layers):
        shapes |= {f"mtp.layers.{number}.{name}": shape for name, shape in _layer(config.text, "full_attention")}
    return shapes


def is_linear(name: str, shape: Shape) -> bool:
    """Whether a weight is a matrix that MLX can quantize: an embedding, a linear map, or one per expert."""
    return name.endswith(".weight") and len(shape) > 1 and not name.endswith((".conv1d.weight", PATCH_EMBEDDING))


def _layer(text: TextConfig, kind: str) -> Iterator[tuple[str, Shape]]:
    hidden = text.hidden_size
    yield "input_layernorm.weight", (hidden,)
    if kind == "full_attention":
        yield from _attention(text)
    else:
        yield from _delta_net(text)
    yield "post_attention_layernorm.weight", (hidden,)
    if text.moe is None:
        yield from _mlp("mlp.", hidden, text.intermediate_size)
        return
    experts, size = text.moe.num_experts, text.moe.intermediate_size
    yield "mlp.gate.weight", (experts, hidden)
    yield "mlp.experts.gate_proj.weight", (experts, size, hidden)
    yield "mlp.experts.up_proj.weight", (experts, size, hidden)
    yield "mlp.experts.down_proj.weight", (experts, hidden, size)
    yield from _mlp("mlp.shared_expert.", hidden, text.moe.shared_intermediate_size)
    yield "mlp.shared_expert_gate.weight", (1, hidden)


def _attention(text: TextConfig) -> Iterator[tuple[str, Shape]]:
    hidden, dim = text.hidden_size, text.head_dim
    queries, keys = text.num_attention_heads * dim, text.num_key_value_heads * dim
    yield "self_attn.q_proj.weight", (2 * queries, hidden)  # per head: its query, then its output gate
    yield "self_attn.k_proj.weight", (keys, hidden)
    yield "self_attn.v_proj.weight", (keys, hidden)
    yield "self_attn.o_proj.weight", (hidden, queries)
    yield "self_attn.q_norm.weight", (dim,)
    yield "self_attn.k_norm.weight", (dim,)


def _delta_net(text: TextConfig) -> Iterator[tuple[str, Shape]]:
    hidden, heads = text.hidden_size, text.linear_num_value_heads
    keys, values = text.linear_num_key_heads * text.linear_key_head_dim, heads * text.linear_value_head_dim
    yield "linear_attn.in_proj_qkv.weight", (2 * keys + values, hidden)
    yield "linear_attn.in_proj_z.weight", (values, hidden)
    yield "linear_attn.in_proj_b.weight", (heads, hidden)
    yield "linear_attn.in_proj_a.weight", (heads, hidden)
    yield "linear_attn.conv1d.weight", (2 * keys + values, text.linear_conv_kernel_dim, 1)
    yield "linear_attn.A_log", (heads,)
    yield "linear_attn.dt_bias", (heads,)
    yield "linear_attn.norm.weight", (text.linear_value_head_dim,)
    yield "linear_attn.out_proj.weight", (hidden, values)


def _mlp(prefix: str, hidden: int, size: int) -> Iterator[tuple[str, Shape]]:
    yield f"{prefix}gate_proj.weight", (size, hidden)
    yield f"{prefix}up_proj.weight", (size, hidden)
    yield f"{prefix}down_proj.weight", (hidden, size)


def _vision(vision: VisionConfig) -> Iterator[tuple[str, Shape]]:
    hidden, inner, patch = vision.hidden_size, vision.intermediate_size, vision.patch_size
    merged = hidden * vision.spatial_merge_size**2
    yield "patch_embed.proj.weight", (hidden, vision.temporal_patch_size, patch, patch, vision.in_channels)
    yield "patch_embed.proj.bias", (hidden,)
    yield "pos_embed.weight", (vision.num_position_embeddings, hidden)
    for number in range(vision.depth):
        block = f"blocks.{number}."
        yield from _norm(f"{block}norm1", hidden)
        yield from _affine(f"{block}attn.qkv", hidden, 3 * hidden)
        yield from _affine(f"{block}attn.proj", hidden, hidden)
        yield from _norm(f"{block}norm2", hidden)
        yield from _affine(f"{block}mlp.linear_fc1", hidden, inner)
        yield from _affine(f"{block}mlp.linear_fc2", inner, hidden)
    yield from _norm("merger.norm", hidden)
    yield from _affine("merger.linear_fc1", merged, merged)
    yield from _affine("merger.linear_fc2", merged, vision.out_hidden_size)


def _norm(name: str, size: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (size,)
    yield f"{name}.bias", (size,)


def _affine(name: str, width: int, height: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (height, width)
    yield f"{name}.bias", (height,)
