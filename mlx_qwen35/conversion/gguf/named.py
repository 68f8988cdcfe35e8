"""What llama.cpp calls our tensors, and what it changes in their values (architectures qwen35, qwen35moe, clip).

Knows names, the order of heads and the few changes of value. Knows neither types nor files.

Value heads: a key head serves r of them. We have them grouped by key head, llama.cpp tiles them, so that a repetition
of the key heads meets them. With two key heads of three each:

    ours        k0v0 k0v1 k0v2 k1v0 k1v1 k1v2
    llama.cpp   k0v0 k1v0 k0v1 k1v1 k0v2 k1v2
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mlx_qwen35.checkpoint.gguf.origins import HEAD, PLAIN, TOWER_BLOCK
from mlx_qwen35.checkpoint.inventory import PATCH_EMBEDDING
from mlx_qwen35.config import TextConfig

Change = Callable[[np.ndarray], np.ndarray]

_ROOT = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
_LAYER = {ours: theirs for theirs, ours in PLAIN.items()} | {
    "linear_attn.in_proj_qkv": "attn_qkv", "linear_attn.in_proj_z": "attn_gate", "linear_attn.in_proj_a": "ssm_alpha",
    "linear_attn.in_proj_b": "ssm_beta", "linear_attn.conv1d": "ssm_conv1d", "linear_attn.out_proj": "ssm_out",
}  # fmt: skip
_MTP = {ours: theirs for theirs, ours in HEAD.items()}
_VISION = {
    "patch_embed.proj": "v.patch_embd", "pos_embed": "v.position_embd", "merger.norm": "v.post_ln",
    "merger.linear_fc1": "mm.0", "merger.linear_fc2": "mm.2",
}  # fmt: skip
_BLOCK = {ours: theirs for theirs, ours in TOWER_BLOCK.items()}
_HEADED = ("in_proj_qkv.weight", "in_proj_z.weight", "in_proj_a.weight", "in_proj_b.weight", "conv1d.weight", "A_log",
           "dt_bias")  # fmt: skip


@dataclass(frozen=True)
class Named:
    """A tensor of llama.cpp's that is made of one of ours.

    rows: where on its axis 0 each of our rows lies; None: where it was. columns: which of our columns each of its
    columns is. change: of float32 values, [rows of ours, ..] -> [the same rows, ..].
    """

    name: str
    rows: np.ndarray | None = None
    columns: np.ndarray | None = None
    change: Change | None = None


def named(ours: str, text: TextConfig) -> tuple[Named, ...]:
    """What holds one of our tensors: one of llama.cpp's, and for the patch embedding one for each of two frames."""
    if ours == PATCH_EMBEDDING:
        return tuple(
            Named(f"v.patch_embd.weight{'.1' if frame else ''}", change=_frame(frame)) for frame in range(2)
        )
    rows = columns = change = None
    if ours.endswith(_HEADED) and ".linear_attn." in ours:
        rows = _rows(ours, text)
    elif ours.endswith("linear_attn.out_proj.weight") and text.linear_num_key_heads != text.linear_num_value_heads:
        columns = np.argsort(_tiled(text, text.linear_value_head_dim))
    if ours.endswith("A_log"):
        change = _decay
    elif ours.endswith("conv1d.weight"):
        change = _squeezed
    return (Named(_name(ours, text.num_hidden_layers), rows, columns, change),)


def _name(ours: str, layers: int) -> str:
    module, _, end = ours.rpartition(".")
    if ours.startswith("vision."):
        module = module.removeprefix("vision.")
        if module in _VISION:
            return f"{_VISION[module]}.{end}"
        _, number, module = module.split(".", 2)
        return f"v.blk.{number}.{_BLOCK[module]}.{end}"
    if ours in (f"mtp.{name}.weight" for name in _MTP):
        return f"blk.{layers}.nextn.{_MTP[module.removeprefix('mtp.')]}.weight"
    if module in _ROOT:
        return f"{_ROOT[module]}.{end}"
    mtp, number, module, end = re.fullmatch(r"(mtp\.)?layers\.(\d+)\.(.+)\.(\w+)", ours).groups()
    layer = f"blk.{layers + int(number) if mtp else int(number)}."
    if end == "A_log":
        return f"{layer}ssm_a"
    return f"{layer}ssm_dt.bias" if end == "dt_bias" else f"{layer}{_LAYER[module]}.{end}"


def _tiled(text: TextConfig, width: int) -> np.ndarray:
    """Where each row of the value heads, `width` rows a head, lies in llama.cpp's order."""
    keys, values = text.linear_num_key_heads, text.linear_num_value_heads
    heads = np.arange(values).reshape(-1, keys).T.reshape(-1)  # of ours -> its place
    return (heads[:, None] * width + np.arange(width)).reshape(-1)


def _rows(ours: str, text: TextConfig) -> np.ndarray | None:
    if text.linear_num_key_heads == text.linear_num_value_heads:
        return None
    if ours.endswith(("in_proj_qkv.weight", "conv1d.weight")):
        before = 2 * text.linear_num_key_heads * text.linear_key_head_dim  # queries and keys stay
        return np.concatenate([np.arange(before), before + _tiled(text, text.linear_value_head_dim)])
    return _tiled(text, text.linear_value_head_dim if ours.endswith("in_proj_z.weight") else 1)


def _decay(values: np.ndarray) -> np.ndarray:
    """A_log -> -exp(A_log), rounded once."""
    return -np.exp(values.astype(np.float64)).astype(np.float32)


def _squeezed(values: np.ndarray) -> np.ndarray:
    return values[..., 0]  # [C, K, 1] -> [C, K]


def _frame(number: int) -> Change:
    return lambda values: values[:, number].transpose(0, 3, 1, 2)  # [V, T, P, P, C] -> [V, C, P, P]
