"""What a GGUF file holds of a checkpoint, as llama.cpp's converter makes it: written down once more, from the tensors
under their published names.

Knows nothing of this package.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

# As published, and shortened to what a tiny vocabulary needs.
SPLITTING = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "post_attention_norm",
          "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
_PLAIN = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
          "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
          "mlp.down_proj": "ffn_down", "mlp.gate": "ffn_gate_inp", "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
          "mlp.shared_expert.gate_proj": "ffn_gate_shexp", "mlp.shared_expert.up_proj": "ffn_up_shexp",
          "mlp.shared_expert.down_proj": "ffn_down_shexp"}
_MTP = {"pre_fc_norm_embedding": "enorm", "pre_fc_norm_hidden": "hnorm", "norm": "shared_head_norm"}
_TOWER = {"attn.qkv": "attn_qkv", "attn.proj": "attn_out", "mlp.linear_fc1": "ffn_up", "mlp.linear_fc2": "ffn_down",
          "norm1": "ln1", "norm2": "ln2"}


def text_tensors(tensors: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """GGUF name -> float32, of the text model and its MTP layer. tensors: as random_tensors() gives them."""
    text = config.get("text_config", config)
    found: dict[str, np.ndarray] = {}
    for name, value in tensors.items():
        if ".visual." in name:
            continue
        short = name.removeprefix("model.language_model.").removeprefix("model.")
        if short.startswith("mtp.") and ".layers." not in short:
            module = short.removeprefix("mtp.").removesuffix(".weight")
            at = f"blk.{text['num_hidden_layers']}.nextn."
            if module == "fc":
                found[f"{at}eh_proj.weight"] = value
            else:
                found[f"{at}{_MTP[module]}.weight"] = value + np.float32(1)
        elif short == "embed_tokens.weight":
            found["token_embd.weight"] = value
        elif short == "norm.weight":
            found["output_norm.weight"] = value + np.float32(1)
        elif short == "lm_head.weight":
            found["output.weight"] = value
        else:
            *_, number, rest = short.removeprefix("mtp.").split(".", 2)
            at = int(number) + (text["num_hidden_layers"] if short.startswith("mtp.") else 0)
            found |= {f"blk.{at}.{key}": value for key, value in _layer(rest, value, text).items()}
    return found


def tower_tensors(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same of the vision tower."""
    found = {}
    for name, value in tensors.items():
        if ".visual." not in name:
            continue
        short, _, end = name.removeprefix("model.visual.").rpartition(".")
        if short == "patch_embed.proj":
            if end == "bias":
                found["v.patch_embd.bias"] = value
            else:
                found |= {"v.patch_embd.weight": value[:, :, 0], "v.patch_embd.weight.1": value[:, :, 1]}
        elif short.startswith("blocks."):
            _, number, module = short.split(".", 2)
            found[f"v.blk.{number}.{_TOWER[module]}.{end}"] = value
        else:
            at = {"pos_embed": "v.position_embd", "merger.norm": "v.post_ln", "merger.linear_fc1": "mm.0",
                  "merger.linear_fc2": "mm.2"}[short]  # fmt: skip
            found[f"{at}.{end}"] = value
    return found


def _layer(rest: str, value: np.ndarray, text: Mapping[str, Any]) -> dict[str, np.ndarray]:
    keys, values, width = (text[f"linear_{name}"] for name in ("num_key_heads", "num_value_heads", "value_head_dim"))
    before = 2 * keys * text["linear_key_head_dim"]

    def tiled(x: np.ndarray, axis: int, size: int) -> np.ndarray:
        shape = x.shape
        x = x.reshape(*shape[:axis], keys, values // keys, size, *shape[axis + 1 :])
        return np.ascontiguousarray(x.swapaxes(axis, axis + 1)).reshape(shape)

    def tail(x: np.ndarray) -> np.ndarray:
        return np.concatenate([x[:before], tiled(x[before:], 0, width)])

    module = rest.removesuffix(".weight")
    if module in _NORMS:
        return {f"{_NORMS[module]}.weight": value + np.float32(1)}
    if module in _PLAIN:
        return {f"{_PLAIN[module]}.weight": value}
    if module == "mlp.experts.gate_up_proj":
        gate, up = np.split(value, 2, axis=1)
        return {"ffn_gate_exps.weight": gate, "ffn_up_exps.weight": up}
    if module == "mlp.experts.down_proj":
        return {"ffn_down_exps.weight": value}
    made = {
        "linear_attn.in_proj_qkv": lambda: ("attn_qkv.weight", tail(value)),
        "linear_attn.in_proj_z": lambda: ("attn_gate.weight", tiled(value, 0, width)),
        "linear_attn.in_proj_a": lambda: ("ssm_alpha.weight", tiled(value, 0, 1)),
        "linear_attn.in_proj_b": lambda: ("ssm_beta.weight", tiled(value, 0, 1)),
        "linear_attn.conv1d": lambda: ("ssm_conv1d.weight", tail(value[:, 0])),
        "linear_attn.A_log": lambda: ("ssm_a", -np.exp(tiled(value, 0, 1).astype(np.float64)).astype(np.float32)),
        "linear_attn.dt_bias": lambda: ("ssm_dt.bias", tiled(value, 0, 1)),
        "linear_attn.norm": lambda: ("ssm_norm.weight", value),
        "linear_attn.out_proj": lambda: ("ssm_out.weight", tiled(value, 1, width)),
    }[module]()
    return dict([made])


def write_companions(folder: Path, vocab_size: int) -> None:
    """A byte-level tokenizer of this family with a few merges and added tokens, a template, sampling defaults.

    Ids: 256 bytes, two merged tokens, then what is added: 258 to 261 in both files, 262 in tokenizer_config.json only.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = [chr(byte) for byte in printable] + [chr(0x100 + i) for i in range(len(others))]
    vocab = {letter: number for number, letter in enumerate([*letters, "th", "Ġth"])}
    texts = [("<|endoftext|>", True), ("<|im_end|>", True), ("<think>", False), ("<|fim_pad|>", False)]
    added = [(258 + i, *token) for i, token in enumerate(texts)]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": {"type": "NFC"},
        "added_tokens": [{"id": i, "content": text, "special": special, **flags} for i, text, special in added],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": SPLITTING}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": vocab, "merges": [["t", "h"], ["Ġ", "th"]]},
    }  # fmt: skip
    settings = {
        "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": None, "add_bos_token": False,
        "tokenizer_class": "Qwen2Tokenizer", "chat_template": "{{ 'not the file' }}",
        "added_tokens_decoder": {
            str(i): {"content": text, "special": special, **flags}
            for i, text, special in [*added, (262, "<tts_pad>", True)]
        },
    }  # fmt: skip
    assert vocab_size > 262
    generation = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": [259, 258]}
    for name, value in (("tokenizer", tokenizer), ("tokenizer_config", settings), ("generation_config", generation)):
        (folder / f"{name}.json").write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}", encoding="utf-8")
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.25, 0.5]}')
