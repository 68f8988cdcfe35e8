"""PEFT's adapters, as transformers' trainers write them, in our terms.

Knows adapter_config.json of peft_type LORA and the names in adapter_model.safetensors. Knows no Model.

    base_model.model.PATH.lora_A.weight  [r, in]       PATH.lora_B.weight  [out, r]       y = W x + scale * B A x
    PATH.lora_magnitude_vector[.weight]  [out]         the length of each row of the sum (DoRA)
    PATH.lora_embedding_A  [r, vocab]                  PATH.lora_embedding_B  [H, r]
    experts[.base_layer].lora_A.weight   [E * r, in]   experts[.base_layer].lora_B.weight  [out, r * E]
    PATH.weight                                        the whole of a module (modules_to_save)
    PATH.base_layer.weight                             the embeddings below an adapter, which PEFT saves with it

scale is lora_alpha / r, or / sqrt(r) (use_rslora); both may differ from module to module. Of a tensor of all experts,
A has a block for each expert and B a column for each expert within each rank. Which tensor is meant, its name does not
say: its sizes do, and whether `in` is what goes into the product or, as PEFT had it first, what comes out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from mlx_qwen35.checkpoint.inventory import Shape
from mlx_qwen35.checkpoint.names import bare, is_centred

_ROOT = "base_model.model."
_LEAF = re.compile(r"(.+?)(\.base_layer)?\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)(\.default)?(\.weight)?")
_SAVED = re.compile(r"(.+?)(\.modules_to_save|\.base_layer)?(\.default)?\.weight")
# What changes the weights that an adapter belongs to.
_OTHER_BASE = ("pissa", "olora", "corda", "loftq")
_MOST_REPEATS, _LONGEST = 4, 200  # of a pattern: a config comes from anywhere

Leaves = dict[str, mx.array]


@dataclass(frozen=True)
class Translated:
    """tensors: by our module, then leaf, as mlx-lm's trainer has them; scales: of each; whole: our weights that are
    replaced."""

    tensors: dict[str, Leaves] = field(default_factory=dict)
    scales: dict[str, float] = field(default_factory=dict)
    whole: dict[str, mx.array] = field(default_factory=dict)


def translate(
    config: Mapping[str, Any], values: Mapping[str, mx.array], shapes: Mapping[str, Shape]
) -> Translated:
    """A PEFT adapter in our terms. shapes: of all weights of the model that it is for, by our names.

    Raises ValueError, in words, for what is not read and what is not of this model.
    """
    _check(config)
    found, pairs = Translated(), {}
    for name, value in values.items():
        if not name.startswith(_ROOT):
            raise ValueError(f"{name} is no name of PEFT's")
        path = name.removeprefix(_ROOT)
        leaf = _LEAF.fullmatch(path)
        if leaf:
            pairs.setdefault((leaf[1], bool(leaf[2])), {})[leaf[3]] = value
            continue
        saved = _SAVED.fullmatch(path)
        ours = bare(saved[1]) + ".weight" if saved else ""
        if ours not in shapes:
            raise ValueError(f"{name} is no weight of this model")
        if value.shape != shapes[ours]:
            raise ValueError(f"{name} is {list(value.shape)}, the model needs {list(shapes[ours])}")
        found.whole[ours] = value.astype(mx.float32) + 1 if is_centred(ours) else value
    experts: dict[str, dict[int, Leaves]] = {}
    for (path, nested), leaves in pairs.items():
        module = bare(path)
        numbered = re.fullmatch(r"(.*\.mlp\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)", module)
        if module.endswith(".mlp.experts"):
            _of_all_experts(config, path, module, leaves, shapes, found)
        elif numbered:
            at = f"{numbered[1]}.{numbered[3]}"
            experts.setdefault(at, {})[int(numbered[2])] = leaves
            found.scales[at] = _scale(config, path, leaves)
        else:
            if nested:
                raise ValueError(f"{path} has an adapter inside another, which only experts have")
            found.tensors[module] = _leaves(path, leaves)
            found.scales[module] = _scale(config, path, leaves)
    for module, each in experts.items():
        count = shapes.get(f"{module}.weight", (0,))[0]
        if sorted(each) != list(range(count)) or len({leaves["A"].shape for leaves in each.values()}) != 1:
            raise ValueError(f"{module} has adapters of {len(each)} of {count} experts, or of several ranks")
        stacked = [_leaves(module, each[number]) for number in range(count)]
        if any("m" in leaves for leaves in stacked):
            raise ValueError(f"{module} has DoRA on experts, which is not computed")
        found.tensors[module] = {
            kind: mx.stack([leaves[kind].T for leaves in stacked]) for kind in ("lora_a", "lora_b")
        }
    return found


def _check(config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise ValueError(f"peft_type is {config.get('peft_type')!r:.40}, and only LORA is read")
    for key in ("use_qalora", "lora_bias", "fan_in_fan_out", "layer_replication", "alora_invocation_tokens"):
        if config.get(key):
            raise ValueError(f"{key} is set, which is not computed")
    if config.get("bias", "none") != "none":
        raise ValueError(f"bias is {config['bias']!r:.40}, and these models have none")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_OTHER_BASE):
        raise ValueError(
            f"init_lora_weights is {start!r:.40}, which changed the weights below the adapter: convert it in PEFT "
            "(path_initial_model_for_weight_conversion)"
        )


def _leaves(path: str, leaves: Leaves) -> Leaves:
    """As mlx-lm's layers have them: lora_a [in, r], lora_b [r, out]."""
    if {"embedding_A", "embedding_B"} == set(leaves):
        return {"lora_a": leaves["embedding_A"].T, "lora_b": leaves["embedding_B"].T}
    if not {"A", "B"} <= set(leaves) <= {"A", "B", "magnitude_vector"}:
        there = ", ".join(f"lora_{kind}" for kind in sorted(leaves))
        raise ValueError(f"{path} has {there}, which do not fit together")
    if any(leaves[kind].ndim != 2 for kind in ("A", "B")):
        raise ValueError(f"{path} has adapters that are no matrices")
    made = {"lora_a": leaves["A"].T, "lora_b": leaves["B"].T}
    return made | ({"m": leaves["magnitude_vector"].flatten()} if "magnitude_vector" in leaves else {})


def _scale(config: Mapping[str, Any], path: str, leaves: Leaves, rank: int | None = None) -> float:
    first = leaves.get("A", leaves.get("embedding_A"))
    rank = rank or (first.shape[0] if first is not None else 0)
    told = _of_pattern(config, "rank_pattern", path, config.get("r"))
    if told != rank:
        raise ValueError(f"{path} has rank {rank}, adapter_config.json says {told!r:.40}")
    alpha = _of_pattern(config, "alpha_pattern", path, config.get("lora_alpha"))
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise ValueError(f"lora_alpha is {alpha!r:.40}, which is no number")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _of_pattern(config: Mapping[str, Any], key: str, path: str, default: Any) -> Any:
    """What rank_pattern or alpha_pattern says of a module: its first key that ends the path, as a name or a pattern."""
    for pattern, value in (config.get(key) or {}).items():
        risky = len(re.findall(r"[*+{]", pattern)) > _MOST_REPEATS or re.search(r"\)[*+{?]", pattern)
        if risky or len(pattern) > _LONGEST:
            raise ValueError(f"{key} has a pattern of a kind that is not read: {pattern:.80}")
        try:
            if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", path):
                return value
        except re.error:
            raise ValueError(f"{key} has {pattern!r:.80}, which is no pattern") from None
    return default


def _of_all_experts(
    config: Mapping[str, Any], path: str, module: str, leaves: Leaves, shapes: Mapping[str, Shape], found: Translated
) -> None:
    """An adapter of gate_up_proj [E, 2M, H] or down_proj [E, H, M], by its sizes."""
    gate, down = (shapes.get(f"{module}.{name}.weight") for name in ("gate_proj", "down_proj"))
    if gate is None or not {"A", "B"} == set(leaves):
        raise ValueError(f"{path} is no tensor of experts that takes an adapter")
    count, (a, b) = gate[0], (leaves["A"], leaves["B"])
    rank, rest = divmod(a.shape[0], count)
    sizes = {"gate_up": (2 * gate[1], gate[2]), "down": down[1:]}
    fits = [
        (which, turned)
        for which, (out, inner) in sizes.items()
        for turned in (False, True)
        if (b.shape[0], a.shape[1]) == ((inner, out) if turned else (out, inner))
    ]
    if rest or not rank or b.shape[1] != a.shape[0] or not fits:
        raise ValueError(f"{path} has adapters of {list(a.shape)} and {list(b.shape)}, which fit no tensor of experts")
    if len(fits) > 1:
        raise ValueError(f"{path} has adapters of {list(a.shape)} and {list(b.shape)}: which way they lie is not told")
    which, turned = fits[0]
    scale = _scale(config, path, leaves, rank)
    a = a.reshape(count, rank, -1)  # [E, r, in]
    b = b.reshape(b.shape[0], rank, count).transpose(2, 0, 1)  # [E, out, r]
    if turned:
        a, b = b.swapaxes(-1, -2), a.swapaxes(-1, -2)
    half = gate[1]
    parts = {"down_proj": b} if which == "down" else {"gate_proj": b[:, :half], "up_proj": b[:, half:]}
    for name, rows in parts.items():
        found.tensors[f"{module}.{name}"] = {"lora_a": a, "lora_b": mx.contiguous(rows)}
        found.scales[f"{module}.{name}"] = scale
