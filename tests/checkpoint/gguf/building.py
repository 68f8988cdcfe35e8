"""Tiny random models as GGUF files, by gguf-py's writer, and what their numbers mean.

Knows what llama.cpp's converter does to names, orders and values (the layout that was held against llama.cpp's own
logits), and blocks of every type by gguf-py. Knows nothing of how this package reads them.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.constants import GGML_QUANT_SIZES

from tests.checkpoints import Tensors, tiny_config
from tests.text.folders import TEMPLATE, tokenizer_json

# Rows of 256 values wherever K types may go, and no two sizes alike that could be confused. Value heads: 6 on 2.
SIZES: dict[str, Any] = {
    "hidden_size": 256, "head_dim": 64, "num_attention_heads": 8, "num_key_value_heads": 4,
    "linear_num_key_heads": 2, "linear_num_value_heads": 6, "linear_key_head_dim": 24, "linear_value_head_dim": 128,
    "layer_types": ["linear_attention", "full_attention"], "full_attention_interval": 2,
    "rope_parameters": {"mrope_section": [8, 4, 4]}, "vocab_size": 290,
}  # fmt: skip
FFN = {"dense": {"intermediate_size": 1280},
       "moe": {"moe_intermediate_size": 512, "shared_expert_intermediate_size": 1024, "num_experts": 5,
               "num_experts_per_tok": 2}}  # fmt: skip
_NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "post_attention_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "linear_attn.in_proj_qkv": "attn_qkv",
    "linear_attn.in_proj_z": "attn_gate", "linear_attn.in_proj_a": "ssm_alpha", "linear_attn.in_proj_b": "ssm_beta",
    "linear_attn.conv1d": "ssm_conv1d", "linear_attn.norm": "ssm_norm", "linear_attn.out_proj": "ssm_out",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "mlp.gate": "ffn_gate_inp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp", "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp", "mlp.shared_expert.down_proj": "ffn_down_shexp",
}  # fmt: skip
_HEAD = {"fc": "eh_proj", "pre_fc_norm_embedding": "enorm", "pre_fc_norm_hidden": "hnorm", "norm": "shared_head_norm"}
_TOWER = {
    "patch_embed.proj.bias": "v.patch_embd.bias", "pos_embed.weight": "v.position_embd.weight",
    "merger.norm": "v.post_ln", "merger.linear_fc1": "mm.0", "merger.linear_fc2": "mm.2",
}  # fmt: skip
_TOWER_BLOCK = {
    "attn.qkv": "attn_qkv", "attn.proj": "attn_out", "mlp.linear_fc1": "ffn_up", "mlp.linear_fc2": "ffn_down",
    "norm1": "ln1", "norm2": "ln2",
}  # fmt: skip
_SHIFTED = re.compile(r"(attn_norm|attention_norm|attn_[qk]_norm|output_norm|enorm|hnorm|shared_head_norm)\.weight$")
# The small template, with placeholders for pictures.
SEEING = TEMPLATE.replace(
    "{{- part.text }}",
    "{{- '<|vision_start|><|image_pad|><|vision_end|>' if part.type == 'image' else part.text }}",
)
Kinds = Callable[[str], str]


def config_of(kind: str, **overrides: Any) -> dict[str, Any]:
    return tiny_config(kind, **SIZES | FFN[kind] | overrides)


def all_f32(name: str) -> str:
    return "F32"


def matrices(kind: str) -> Kinds:
    """As llama-quantize writes it: matrices of this type, and everything that it leaves alone in F32."""

    def of(name: str) -> str:
        kept = re.search(r"norm|ssm_a$|ssm_dt|conv1d|gate_inp|bias|patch_embd|position_embd", name)
        return "F32" if kept else kind

    return of


def order_of(text: Mapping[str, Any], width: int) -> np.ndarray:
    """For each row of value heads in the file, which row of Hugging Face's it is: heads tiled, not grouped."""
    keys, values = text["linear_num_key_heads"], text["linear_num_value_heads"]
    heads = np.arange(values).reshape(keys, values // keys).T.reshape(-1)
    return (heads[:, None] * width + np.arange(width)).reshape(-1)


def to_gguf(name: str, value: np.ndarray, text: Mapping[str, Any], back: bool = False) -> np.ndarray:
    """A tensor by its name in the file, in the order of the file; back: in Hugging Face's."""
    dim, split = text["linear_value_head_dim"], 2 * text["linear_num_key_heads"] * text["linear_key_head_dim"]
    kind = name.split(".")[2] if name.startswith("blk.") else ""
    number = int(name.split(".")[1]) if kind else 0
    recurrent = text["layer_types"][number : number + 1] == ["linear_attention"]
    width = {"attn_gate": dim, "ssm_alpha": 1, "ssm_beta": 1, "ssm_a": 1, "ssm_dt": 1, "ssm_out": dim}.get(kind)
    if kind in ("attn_qkv", "ssm_conv1d") and recurrent:
        order = order_of(text, dim)
        order = np.argsort(order) if back else order
        return np.concatenate([value[:split], value[split:][order]])
    if width is None:
        return value
    order = order_of(text, width)
    return np.take(value, np.argsort(order) if back else order, axis=1 if kind == "ssm_out" else 0)


def gguf_names(config: Mapping[str, Any], tensors: Tensors, fused: bool = False) -> dict[str, tuple[str, np.ndarray]]:
    """GGUF's name -> (Hugging Face's, value in the file's order), of the text model and its MTP head."""
    text = config["text_config"]
    layers = text["num_hidden_layers"]
    made: dict[str, tuple[str, np.ndarray]] = {}
    for name, value in tensors.items():
        if name.startswith("model.visual."):
            continue
        short = name.removeprefix("model.language_model.")
        top = {"embed_tokens.weight": "token_embd.weight", "norm.weight": "output_norm.weight",
               "lm_head.weight": "output.weight"}.get(short)  # fmt: skip
        found = re.fullmatch(r"(mtp\.)?layers\.(\d+)\.(.+)", short)
        if top:
            theirs = top
        elif found:
            stem = f"blk.{int(found[2]) + (layers if found[1] else 0)}."
            rest = found[3]
            if rest == "mlp.experts.gate_up_proj" and not fused:
                half = value.shape[1] // 2
                made[f"{stem}ffn_gate_exps.weight"] = name, value[:, :half]
                made[f"{stem}ffn_up_exps.weight"] = name, value[:, half:]
                continue
            special = {"linear_attn.A_log": "ssm_a", "linear_attn.dt_bias": "ssm_dt.bias",
                       "mlp.experts.gate_up_proj": "ffn_gate_up_exps.weight",
                       "mlp.experts.down_proj": "ffn_down_exps.weight"}.get(rest)  # fmt: skip
            theirs = stem + (special or _NAMES[rest.removesuffix(".weight")] + ".weight")
        else:
            theirs = f"blk.{layers}.nextn.{_HEAD[short.removeprefix('mtp.').removesuffix('.weight')]}.weight"
        if theirs.endswith("ssm_conv1d.weight"):
            value = value[:, 0]
        if theirs.endswith("ssm_a"):
            value = -np.exp(value)
        if _SHIFTED.search(theirs):
            value = value + np.float32(1)
        made[theirs] = name, to_gguf(theirs, value, text)
    if fused:
        for number in range(layers + text.get("mtp_num_hidden_layers", 0)):
            parts = [made.pop(f"blk.{number}.attn_{p}.weight", None) for p in "qkv"]
            if parts[0]:
                made[f"blk.{number}.attn_qkv.weight"] = "", np.concatenate([value for _, value in parts])
    return made


def tower_names(tensors: Tensors) -> dict[str, np.ndarray]:
    made = {}
    for name, value in tensors.items():
        if not name.startswith("model.visual."):
            continue
        short = name.removeprefix("model.visual.")
        stem, _, end = short.rpartition(".")
        if short == "patch_embed.proj.weight":
            made["v.patch_embd.weight"], made["v.patch_embd.weight.1"] = value[:, :, 0], value[:, :, 1]
        elif short in _TOWER:
            made[_TOWER[short]] = value
        elif stem in _TOWER:
            made[f"{_TOWER[stem]}.{end}"] = value
        else:
            _, number, rest = stem.split(".", 2)
            made[f"v.blk.{number}.{_TOWER_BLOCK[rest]}.{end}"] = value
    return made


def random_blocks(kind: str, shape: tuple[int, ...], seed: int, rms: float) -> tuple[np.ndarray, np.ndarray]:
    """(bytes [.., row bytes], values) of random blocks of a type, whose values have about this mean square."""
    from tests.checkpoint.gguf.test_blocks import HALVES, blocks_of, wanted

    values, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    blocks = blocks_of(kind, int(np.prod(shape)) // values, seed)
    if kind == "MXFP4":
        blocks[:, 0] = 120 + blocks[:, 0] % 4
    if kind == "NVFP4":
        blocks[:, :4] = 8 + blocks[:, :4] % 24
    if kind in HALVES:
        found = np.sqrt(np.mean(np.square(wanted(kind, blocks), dtype=np.float64)))
        for at in HALVES[kind]:
            d = blocks[:, at : at + 2].copy().view(np.float16).astype(np.float32) * (rms / found)
            blocks[:, at : at + 2] = d.astype(np.float16).view(np.uint8).reshape(-1, 2)
    rows = (*shape[:-1], shape[-1] // values * nbytes)
    return blocks.reshape(rows), wanted(kind, blocks).astype(np.float32).reshape(shape)


def encoded(kind: str, name: str, value: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(bytes, what they mean) of a tensor. Floats are its own values; blocks are random ones of about their size."""
    if kind == "F32":
        return np.ascontiguousarray(value, np.float32).view(np.uint8), value
    if kind == "F16":
        half = value.astype(np.float16)
        return np.ascontiguousarray(half).view(np.uint8), half.astype(np.float32)
    if kind == "BF16":
        bits = np.ascontiguousarray(value, np.float32).view(np.uint32)
        short = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
        return short.view(np.uint8), (short.astype(np.uint32) << 16).view(np.float32)
    return random_blocks(kind, value.shape, seed, float(np.sqrt(np.mean(np.square(value)))))


def write_gguf(
    path: Path,
    config: Mapping[str, Any],
    tensors: Tensors,
    kinds: Kinds = all_f32,
    *,
    fused: bool = False,
    head: bool = True,
    tokenizer: Mapping[str, Any] | None = None,
    split: int = 0,
    more: Callable[[GGUFWriter], None] | None = None,
) -> Tensors:
    """Write the text model, and return the Hugging Face tensors that the file stands for.

    kinds: the type of a tensor by its GGUF name; head: with the MTP layer, where there is one; tokenizer: a
    tokenizer.json to write the metadata of; split: tensors a file.
    """
    text = config["text_config"]
    moe = "num_experts" in text
    arch = "qwen35moe" if moe else "qwen35"
    writer = GGUFWriter(path, arch, split_max_tensors=split)
    keys_of(writer, arch, text, head)
    if tokenizer is not None:
        vocabulary_of(writer, tokenizer, text["vocab_size"])
    if more:
        more(writer)
    meant, halves = dict(tensors), {}
    for number, (theirs, (ours, value)) in enumerate(gguf_names(config, tensors, fused).items()):
        if not head and theirs.startswith(f"blk.{text['num_hidden_layers']}."):
            continue
        kind = kinds(theirs)
        data, value = encoded(kind, theirs, value, number)
        writer.add_tensor(theirs, data, raw_dtype=GGMLQuantizationType[kind])
        if kind == "F32":
            continue
        if fused and theirs.endswith("attn_qkv.weight") and not ours:
            sizes = [2 * text["num_attention_heads"] * text["head_dim"], text["num_key_value_heads"] * text["head_dim"]]
            number = int(theirs.split(".")[1])
            stem = f"model.language_model.layers.{number}.self_attn." if number < text["num_hidden_layers"] else (
                f"mtp.layers.{number - text['num_hidden_layers']}.self_attn."
            )  # fmt: skip
            for letter, part in zip("qkv", np.split(value, [sizes[0], sum(sizes)]), strict=True):
                meant[f"{stem}{letter}_proj.weight"] = part
            continue
        value = to_gguf(theirs, value, text, back=True)
        if _SHIFTED.search(theirs):
            value = value - np.float32(1)
        if theirs.endswith("ssm_conv1d.weight"):
            value = value[:, None]
        if "_exps" in theirs and ours.endswith("gate_up_proj") and not fused:
            halves.setdefault(ours, {})[theirs] = value
            continue
        meant[ours] = value
    for ours, parts in halves.items():
        meant[ours] = np.concatenate([parts[name] for name in sorted(parts)], axis=1)  # gate before up
    finish(writer)
    return meant


def finish(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def keys_of(writer: GGUFWriter, arch: str, text: Mapping[str, Any], head: bool = True) -> None:
    rope, heads = text["rope_parameters"], text.get("mtp_num_hidden_layers", 0) if head else 0
    keys = {
        "block_count": text["num_hidden_layers"] + heads, "context_length": text["max_position_embeddings"],
        "embedding_length": text["hidden_size"], "attention.head_count": text["num_attention_heads"],
        "attention.head_count_kv": text["num_key_value_heads"], "attention.key_length": text["head_dim"],
        "attention.value_length": text["head_dim"], "ssm.conv_kernel": text["linear_conv_kernel_dim"],
        "ssm.state_size": text["linear_key_head_dim"], "ssm.group_count": text["linear_num_key_heads"],
        "ssm.time_step_rank": text["linear_num_value_heads"],
        "ssm.inner_size": text["linear_num_value_heads"] * text["linear_value_head_dim"],
        "full_attention_interval": text["full_attention_interval"],
        "rope.dimension_count": int(text["head_dim"] * rope["partial_rotary_factor"]),
    }  # fmt: skip
    if heads:
        keys["nextn_predict_layers"] = heads
    if "num_experts" in text:
        keys |= {"expert_count": text["num_experts"], "expert_used_count": text["num_experts_per_tok"],
                 "expert_feed_forward_length": text["moe_intermediate_size"],
                 "expert_shared_feed_forward_length": text["shared_expert_intermediate_size"]}  # fmt: skip
    else:
        keys["feed_forward_length"] = text["intermediate_size"]
    for key, value in keys.items():
        writer.add_uint32(f"{arch}.{key}", value)
    writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", text["rms_norm_eps"])
    writer.add_float32(f"{arch}.rope.freq_base", float(rope["rope_theta"]))
    writer.add_array(f"{arch}.rope.dimension_sections", [*rope["mrope_section"], 0])
    if rope.get("rope_type") == "yarn":
        writer.add_string(f"{arch}.rope.scaling.type", "yarn")
        writer.add_float32(f"{arch}.rope.scaling.factor", rope["factor"])
        writer.add_uint32(f"{arch}.rope.scaling.original_context_length", rope["original_max_position_embeddings"])


def vocabulary_of(writer: GGUFWriter, tokenizer: Mapping[str, Any], size: int, template: str | None = SEEING) -> None:
    """A tokenizer.json as llama.cpp's converter writes it; looks like <|...|>: CONTROL; padded up to `size`."""
    tokens = {number: (token, 1) for token, number in tokenizer["model"]["vocab"].items()}
    for added in tokenizer["added_tokens"]:
        kind = 3 if re.fullmatch(r"<\|.*\|>", added["content"]) or added["special"] else 4
        tokens[added["id"]] = added["content"], kind
    pairs = [tokens.get(number, (f"[PAD{number}]", 5)) for number in range(size)]
    ids = {token: number for number, (token, _) in enumerate(pairs)}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen35")
    writer.add_token_list([token for token, _ in pairs])
    writer.add_token_types([kind for _, kind in pairs])
    merges = tokenizer["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_eos_token_id(ids["<|im_end|>"])
    writer.add_pad_token_id(ids["<|endoftext|>"])
    writer.add_add_bos_token(False)
    if template:
        writer.add_chat_template(template)


def write_projector(path: Path, config: Mapping[str, Any], tensors: Tensors, kind: str = "F32") -> Tensors:
    """Write the vision tower as a file of its own (mmproj), and return the tensors that it stands for."""
    vision = config["vision_config"]
    writer = GGUFWriter(path, "clip")
    writer.add_string("general.type", "mmproj")
    writer.add_string("clip.projector_type", "qwen3vl_merger")
    writer.add_bool("clip.has_vision_encoder", True)
    sizes = {"block_count": "depth", "embedding_length": "hidden_size", "feed_forward_length": "intermediate_size",
             "attention.head_count": "num_heads", "projection_dim": "out_hidden_size", "patch_size": "patch_size",
             "spatial_merge_size": "spatial_merge_size"}  # fmt: skip
    for theirs, ours in sizes.items():
        writer.add_uint32(f"clip.vision.{theirs}", vision[ours])
    writer.add_uint32("clip.vision.image_size", 16)
    writer.add_array("clip.vision.image_mean", [0.5, 0.5, 0.5])
    writer.add_array("clip.vision.image_std", [0.5, 0.5, 0.5])
    writer.add_array("clip.vision.is_deepstack_layers", [False] * vision["depth"])
    meant = {}
    for name, value in tower_names(tensors).items():
        own = kind if name.endswith("weight") and value.ndim == 2 and "position" not in name else "F32"
        if "patch_embd.weight" in name and kind == "F16":
            own = "F16"
        data, meant[name] = encoded(own, name, value, 0)
        writer.add_tensor(name, data, raw_dtype=GGMLQuantizationType[own])
    finish(writer)
    back = {"model.visual.patch_embed.proj.weight": np.stack(
        [meant["v.patch_embd.weight"], meant["v.patch_embd.weight.1"]], axis=2)}  # fmt: skip
    for name in tensors:
        if name.startswith("model.visual.") and name not in back:
            (theirs,) = tower_names({name: tensors[name]})
            back[name] = meant[theirs]
    return back


def tiny_tokenizer() -> dict[str, Any]:
    """A byte-level tokenizer with the tokens that the family's config.json names, under other numbers."""
    made = tokenizer_json()
    last = made["added_tokens"][-1]
    made["added_tokens"].append({**last, "id": last["id"] + 1, "content": "<|video_pad|>", "special": True})
    return made

