"""Where each of our tensors lies in a GGUF: which tensor, which of its rows, and what was changed of its values.

Knows llama.cpp's names for this family and what its converter does: value heads in tiled order, -exp(A_log), the 1 of
the norms added, fused and split tensors, the MTP head as layers at the end. Reads no weight.

Value heads: Hugging Face (and this package) groups them by key head, GGUF tiles them. With 2 key and 6 value heads,
where a digit names a value head of ours:

    ours   key head 0: 0 1 2   key head 1: 3 4 5
    GGUF   0 3 | 1 4 | 2 5

Rows of the projections into value heads, channels of the convolution, and columns of the projection out of them are
ordered so; where there are as many key heads there is no difference.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

import numpy as np

from mlx_qwen35.checkpoint.gguf.container import Gguf, GgufTensor
from mlx_qwen35.config import ModelConfig, TextConfig
from mlx_qwen35.errors import CheckpointError

Runs = tuple[tuple[int, int], ...]

# llama.cpp's names of what is stored as we have it, and ours; writing (conversion/gguf/named.py) turns them round.
PLAIN = {
    "attn_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm", "ssm_norm": "linear_attn.norm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj", "ffn_gate_inp": "mlp.gate",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate", "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj", "ffn_down_shexp": "mlp.shared_expert.down_proj",
    "ffn_gate_exps": "mlp.experts.gate_proj", "ffn_up_exps": "mlp.experts.up_proj",
    "ffn_down_exps": "mlp.experts.down_proj",
}  # fmt: skip
HEAD = {
    "eh_proj": "fc", "enorm": "pre_fc_norm_embedding", "hnorm": "pre_fc_norm_hidden", "shared_head_norm": "norm",
}  # fmt: skip
_TOWER = {
    "v.patch_embd.bias": "patch_embed.proj.bias", "v.position_embd.weight": "pos_embed.weight",
    "v.post_ln.weight": "merger.norm.weight", "v.post_ln.bias": "merger.norm.bias",
    "mm.0.weight": "merger.linear_fc1.weight", "mm.0.bias": "merger.linear_fc1.bias",
    "mm.2.weight": "merger.linear_fc2.weight", "mm.2.bias": "merger.linear_fc2.bias",
}  # fmt: skip
TOWER_BLOCK = {
    "attn_qkv": "attn.qkv", "attn_out": "attn.proj", "ffn_up": "mlp.linear_fc1", "ffn_down": "mlp.linear_fc2",
    "ln1": "norm1", "ln2": "norm2",
}  # fmt: skip
_BLOCK = re.compile(r"blk\.(\d{1,5})\.(.+)")
_TOWER_NAME = re.compile(r"v\.blk\.(\d{1,5})\.(\w+)\.(weight|bias)")
PATCHES = ("v.patch_embd.weight", "v.patch_embd.weight.1")  # of the first and the second of two frames


@dataclass(frozen=True)
class Origin:
    """What one of our tensors is made of.

    tensor: the blocks; shape: of ours, as far as the file tells; runs: (first row, rows) of the tensor's rows, in our
    order, None: all as they lie; heads: (key heads, value heads, width of one) where columns are in tiled order;
    log: the values are -exp() of ours; scale: a tensor whose values multiply all of it, or each expert of it.
    """

    tensor: GgufTensor
    shape: tuple[int, ...]
    runs: Runs | None = None
    heads: tuple[int, int, int] | None = None
    log: bool = False
    scale: GgufTensor | None = None

    @property
    def is_plain(self) -> bool:
        """Whether the values lie in the file as we have them."""
        bare = self.runs is None and self.heads is None and not self.log and self.scale is None
        return bare and self.tensor.kind.name in ("F32", "F16", "BF16")

    @property
    def width(self) -> int:
        """Values in a row of the tensor; one where it is a vector, so that it may be taken apart."""
        return 1 if len(self.tensor.shape) < 2 and len(self.shape) < 2 else self.tensor.shape[-1]

    @property
    def row_bytes(self) -> int:
        return self.width // self.tensor.kind.values * self.tensor.kind.nbytes

    @property
    def inner(self) -> int:
        """Rows of the tensor in one of axis 0 of ours."""
        return math.prod(self.shape[1:]) // self.width

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape[:1]) * self.inner * self.row_bytes


def tiled(keys: int, values: int) -> np.ndarray:
    """For each value head of ours, which of the file's it is."""
    return np.arange(values).reshape(values // keys, keys).T.reshape(-1)


def text_origins(gguf: Gguf, config: ModelConfig) -> dict[str, Origin]:
    """Our names for the text model and its MTP head, and where each lies; raises CheckpointError for other tensors."""
    return _Text(gguf, config.text).origins()


class _Text:
    def __init__(self, gguf: Gguf, text: TextConfig):
        self.gguf, self.text = gguf, text
        self.keys, self.values = text.linear_num_key_heads, text.linear_num_value_heads
        self.width = text.linear_value_head_dim
        self.same = self.keys == self.values
        self.key_rows = 2 * self.keys * text.linear_key_head_dim

    def origins(self) -> dict[str, Origin]:
        made: dict[str, Origin] = {}
        for name, tensor in self.gguf.tensors.items():
            if name.endswith(".input_scale"):  # of activations, where NVFP4 is computed with as such
                continue
            if name.endswith(".scale"):
                if name.removesuffix("scale") + "weight" not in self.gguf.tensors:
                    raise self.unknown(tensor)
                continue
            found = self.of(name, tensor)
            scale = self.gguf.tensors.get(name.removesuffix(".weight") + ".scale")
            for ours, origin in found.items():
                if ours in made:
                    raise CheckpointError(f"{tensor} holds {ours} again: download the file again")
                made[ours] = replace(origin, scale=scale) if scale is not None else origin
        return made

    def of(self, name: str, tensor: GgufTensor) -> dict[str, Origin]:
        whole = {"token_embd.weight": "embed_tokens.weight", "output.weight": "lm_head.weight",
                 "output_norm.weight": "norm.weight"}.get(name)  # fmt: skip
        if whole:
            return {whole: Origin(tensor, tensor.shape)}
        found = _BLOCK.fullmatch(name)
        if found is None:
            raise self.unknown(tensor)
        number, rest = int(found[1]), found[2]
        kind = rest.removesuffix(".weight").removesuffix(".bias")
        trunk = self.text.num_hidden_layers
        stem = f"layers.{number}." if number < trunk else f"mtp.layers.{number - trunk}."
        if kind.startswith("nextn.") and number >= trunk and kind[6:] in HEAD:
            return {f"mtp.{HEAD[kind[6:]]}.weight": Origin(tensor, tensor.shape)}
        delta = number < trunk and self.text.layer_types[number] == "linear_attention"
        if delta and kind in ("attn_qkv", "attn_gate") or kind.startswith("ssm_"):
            return {stem + ours: origin for ours, origin in self.delta(kind, tensor).items()}
        if kind == "attn_qkv":
            return {stem + ours: origin for ours, origin in self.fused_attention(tensor).items()}
        if kind == "ffn_gate_up_exps":
            return {stem + ours: origin for ours, origin in self.fused_experts(tensor).items()}
        if kind not in PLAIN:
            raise self.unknown(tensor)
        shape = (1, *tensor.shape) if kind == "ffn_gate_inp_shexp" and len(tensor.shape) == 1 else tensor.shape
        return {f"{stem}{PLAIN[kind]}.weight": Origin(tensor, shape)}

    def delta(self, kind: str, tensor: GgufTensor) -> dict[str, Origin]:
        """The tensors of a delta net."""
        shape = tensor.shape
        if kind == "attn_qkv":
            runs = self.by_heads(self.key_rows, self.width)
            return {"linear_attn.in_proj_qkv.weight": Origin(tensor, shape, runs)}
        if kind == "attn_gate":
            return {"linear_attn.in_proj_z.weight": Origin(tensor, shape, self.by_heads(0, self.width))}
        if kind in ("ssm_alpha", "ssm_beta"):
            ours = f"linear_attn.in_proj_{'a' if kind == 'ssm_alpha' else 'b'}.weight"
            return {ours: Origin(tensor, shape, self.by_heads(0, 1))}
        if kind == "ssm_conv1d":
            runs = self.by_heads(self.key_rows, self.width)
            return {"linear_attn.conv1d.weight": Origin(tensor, (*shape, 1), runs)}
        if kind == "ssm_a":
            return {"linear_attn.A_log": Origin(tensor, shape, self.by_heads(0, 1), log=True)}
        if kind == "ssm_dt":
            return {"linear_attn.dt_bias": Origin(tensor, shape, self.by_heads(0, 1))}
        if kind == "ssm_out":
            heads = None if self.same else (self.keys, self.values, self.width)
            return {"linear_attn.out_proj.weight": Origin(tensor, shape, heads=heads)}
        if kind == "ssm_norm":  # the one norm that had no 1 added
            return {"linear_attn.norm.weight": Origin(tensor, shape)}
        raise self.unknown(tensor)

    def by_heads(self, first: int, width: int) -> Runs | None:
        """Rows from `first` on, `width` of them a value head, in our order; those before as they lie."""
        if self.same:
            return None
        heads = tuple((first + int(head) * width, width) for head in tiled(self.keys, self.values))
        return joined(((0, first), *heads) if first else heads)

    def fused_attention(self, tensor: GgufTensor) -> dict[str, Origin]:
        """q with its gates, k and v, one below the other."""
        text = self.text
        sizes = {"q": 2 * text.num_attention_heads * text.head_dim}
        sizes |= dict.fromkeys("kv", text.num_key_value_heads * text.head_dim)
        if len(tensor.shape) != 2 or tensor.shape[0] != sum(sizes.values()):
            wanted = sum(sizes.values())
            raise CheckpointError(f"{tensor} has {tensor.shape[0]} rows, expected {wanted}: download the file again")
        made, first = {}, 0
        for letter, size in sizes.items():
            made[f"self_attn.{letter}_proj.weight"] = Origin(tensor, (size, *tensor.shape[1:]), ((first, size),))
            first += size
        return made

    def fused_experts(self, tensor: GgufTensor) -> dict[str, Origin]:
        """Each expert's gate rows, then its up rows."""
        if len(tensor.shape) != 3 or tensor.shape[1] % 2:
            raise CheckpointError(f"{tensor} has shape {list(tensor.shape)}: download the file again")
        experts, half, width = tensor.shape[0], tensor.shape[1] // 2, tensor.shape[2]
        return {
            f"mlp.experts.{name}_proj.weight": Origin(
                tensor, (experts, half, width), tuple(((2 * e + part) * half, half) for e in range(experts))
            )
            for part, name in enumerate(("gate", "up"))
        }

    def unknown(self, tensor: GgufTensor) -> CheckpointError:
        hint = "no part of this model has that name"
        if tensor.name.startswith(("v.", "mm.", "mtp.")):
            hint = "files that Ollama's own converter wrote are not read: take one that llama.cpp's converter wrote"
        if ".ssm_in." in tensor.name or ".ssm_ba." in tensor.name:
            hint = "this is Qwen3-Next, another architecture"
        return CheckpointError(f"{tensor} ({tensor.kind.name} {list(tensor.shape)}) is left over: {hint}")


def joined(runs: Runs) -> Runs:
    """The same rows in as few runs as there can be."""
    made: list[tuple[int, int]] = []
    for first, count in runs:
        if made and sum(made[-1]) == first:
            made[-1] = made[-1][0], made[-1][1] + count
        else:
            made.append((first, count))
    return tuple(made)


def tower_origins(projector: Gguf) -> dict[str, Origin]:
    """Our names for the tensors of a vision tower but its patch embedding, which lies in two tensors (PATCHES)."""
    made: dict[str, Origin] = {}
    for name, tensor in projector.tensors.items():
        if name in PATCHES:
            continue
        found = _TOWER_NAME.fullmatch(name)
        ours = _TOWER.get(name)
        if found and found[2] in TOWER_BLOCK:
            ours = f"blocks.{int(found[1])}.{TOWER_BLOCK[found[2]]}.{found[3]}"
        if ours is None:
            raise CheckpointError(
                f"{tensor} ({tensor.kind.name} {list(tensor.shape)}) is left over: no part of this family's vision "
                "tower has that name"
            )
        made[f"vision.{ours}"] = Origin(tensor, tensor.shape)
    return made


def mtp_layers(gguf: Gguf, trunk: int) -> int:
    """How many layers of an MTP head there are in the tensors, whatever block_count announces."""
    numbers = {int(found[1]) for name in gguf.tensors if (found := _BLOCK.fullmatch(name))}
    return len({number for number in numbers if number >= trunk})

