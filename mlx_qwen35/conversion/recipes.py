"""Recipes: how many bits each module gets, by its role in the model and its layer.

Knows the roles of our modules and what was measured of them (docs/QUANTIZATION.md). Knows no files and no arrays.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from mlx_qwen35.checkpoint.inventory import Shape, is_linear
from mlx_qwen35.config import BITS, GROUP_SIZES, ModelConfig, QuantSpec
from mlx_qwen35.errors import CheckpointError

# mlx-lm's and mlx-vlm's names for (low bits, high bits).
_MIXED = {f"mixed_{low}_{high}": (low, high) for low, high in ((2, 6), (3, 4), (3, 5), (3, 6), (3, 8), (4, 6), (4, 8))}

RECIPES = {
    "default": "--q-bits for the experts' (or dense) gate_proj and up_proj, more where a byte more saves more",
    "uniform": "--q-bits everywhere, rounded to nearest: the form that mlx_lm.convert gives without a recipe",
} | {
    name: f"mlx-lm's: {low} bits; {high} for the head and, in some layers, v_proj and down_proj"
    for name, (low, high) in _MIXED.items()
}

# Parts in a hundred of what the same relative error in every module changes in what the model says, by kind of module;
# of kinds in many layers all together. Measured on the demo (docs/QUANTIZATION.md), in_proj_a and in_proj_b as one.
# Dense feed-forward maps, which it does not have, are taken to be what its experts are together.
SENSITIVITY = {
    "experts.gate_proj": 0.8, "experts.up_proj": 0.9, "experts.down_proj": 7.2,
    "mlp.gate_proj": 0.8, "mlp.up_proj": 0.9, "mlp.down_proj": 7.2,
    "shared_expert.gate_proj": 0.2, "shared_expert.up_proj": 0.3, "shared_expert.down_proj": 0.4,
    "attention.q_proj": 3.2, "attention.k_proj": 5.8, "attention.v_proj": 3.9, "attention.o_proj": 2.2,
    "delta_net.in_proj_qkv": 10.4, "delta_net.in_proj_z": 4.4, "delta_net.out_proj": 10.0,
    "steering.in_proj_a": 0.25, "steering.in_proj_b": 0.25,
    "embedding.embed_tokens": 30.8, "head.lm_head": 19.3,
}  # fmt: skip

_BULK = ("experts", "mlp")  # most of a model

# Tiny, and they steer everything after them: who is chosen, what is kept, how fast it fades. No recipe gives them fewer
# than 8 bits, and those that choose experts have 8 whatever the target size.
_CHOOSING = ("mlp.gate", "mlp.shared_expert_gate")
_STEERING = (*_CHOOSING, "linear_attn.in_proj_a", "linear_attn.in_proj_b")


def role(module: str) -> str:
    """What one of our linear modules is for: "experts", "shared_expert", "mlp", "attention", "delta_net",
    "embedding", "head" or "steering" (router, gates, in_proj_a and in_proj_b)."""
    if module.endswith(_STEERING):
        return "steering"
    for part, name in (
        (".mlp.experts.", "experts"), (".mlp.shared_expert.", "shared_expert"), (".mlp.", "mlp"),
        (".self_attn.", "attention"), (".linear_attn.", "delta_net"),
    ):  # fmt: skip
        if part in module:
            return name
    return {"embed_tokens": "embedding", "lm_head": "head"}[module]


def kind(module: str) -> str:
    """Role and projection, as SENSITIVITY names them."""
    return f"{role(module)}.{module.rpartition('.')[2]}"


def assign(
    recipe: str | None, shapes: Mapping[str, Shape], default: QuantSpec, config: ModelConfig
) -> dict[str, QuantSpec | None]:
    """How each linear module of `shapes` (all of text_tensors()) is quantized.

    recipe: a name of RECIPES; None is "default". default: what the conversion was asked for; a recipe named mixed_*
    takes its group size only. Where its groups do not divide a module's rows, smaller ones are taken; None: no group of
    that mode does, and the module stays as it is. Raises CheckpointError for a recipe that is not known or does not go
    with default.mode.
    """
    recipe = recipe or "default"
    if recipe not in RECIPES:
        raise CheckpointError(f"recipe is {recipe!r}; choose {', '.join(RECIPES)}")
    if recipe in _MIXED and default.mode != "affine":
        raise CheckpointError(f"recipe {recipe} is made of affine bits, and the mode is {default.mode}: give only one")
    modules = {name.removesuffix(".weight"): shape for name, shape in shapes.items() if is_linear(name, shape)}
    more = dict.fromkeys(modules, 0.0)
    if recipe in _MIXED:
        low, high = _MIXED[recipe]
        default = replace(default, bits=low)
        layers = config.text.num_hidden_layers
        more = {module: high - low if _is_raised(module, layers) else 0.0 for module in modules}
    elif recipe == "default":
        by_kind = _more_by_kind(modules)
        more = {module: by_kind.get(kind(module), 0.0) for module in modules}
        if default.mode != "affine":  # the bulk stays in the mode that was asked for
            more = {module: 0.0 if role(module) in _BULK else value for module, value in more.items()}
    return {module: fitted(_spec(module, default, more[module]), shape) for module, shape in modules.items()}


def searches(recipe: str | None) -> bool:
    """Whether a recipe looks for better scales than mx.quantize's (quantize.pack's `search`)."""
    return recipe != "uniform"


def is_fixed(module: str) -> bool:
    """Whether a module has 8 bits whatever the size: router and shared_expert_gate."""
    return module.endswith(_CHOOSING)


def sensitivities(modules: Mapping[str, Shape]) -> dict[str, float]:
    """Each module's share of the sensitivity of its kind; 0 for router and shared_expert_gate, which have 8 bits."""
    peers = Counter(map(kind, modules))
    found = {module: SENSITIVITY.get(kind(module), 0.0) / peers[kind(module)] for module in modules}
    if "lm_head" not in modules:
        found["embed_tokens"] += SENSITIVITY["head.lm_head"]  # they are the head as well
    return found


def fitted(spec: QuantSpec, shape: Shape) -> QuantSpec | None:
    """`spec` with the largest group, not above its own, that divides the rows of a weight [.., in]; None: none does.
    Rows of nvfp4 are whole pairs of its groups, or MLX 0.32.4 refuses them."""
    sizes = (size for size in reversed(GROUP_SIZES[spec.mode]) if size <= spec.group_size)
    return next((replace(spec, group_size=size) for size in sizes if shape[-1] % max(size, 32) == 0), None)


def _spec(module: str, default: QuantSpec, more: float) -> QuantSpec:
    """`default` with so many more bits, as far as there are such; under half a bit is none."""
    if role(module) == "steering":
        more = max(more, 8 - default.bits, 0.5)
    if more < 0.5:
        return default
    # Of the other modes each has one number of bits: who needs more goes to affine, also from 8 bits of mxfp8.
    bits = max(bits for bits in BITS["affine"] if bits <= default.bits + more + 0.5)
    return QuantSpec(bits, default.group_size if default.mode == "affine" else 64, "affine")


def _more_by_kind(modules: Mapping[str, Shape]) -> dict[str, float]:
    """How many bits more than all experts (or dense feed-forward maps) together each kind of module is to have, so that
    a byte more saves the same everywhere.

    A bit more takes an error to a quarter. So if a kind of n weights and sensitivity s has b bits, a byte more saves
    s 4^-b / n: equal for all where b grows with log4(s / n).
    """
    sizes: Counter[str] = Counter()
    worth: Counter[str] = Counter()
    for (module, shape), sensitivity in zip(modules.items(), sensitivities(modules).values(), strict=True):
        for name in (kind(module), "bulk") if role(module) in _BULK else (kind(module),):
            sizes[name] += math.prod(shape)
            worth[name] += sensitivity
    density = {name: worth[name] / sizes[name] for name in sizes}
    return {name: math.log(density[name] / density["bulk"], 4) for name in SENSITIVITY.keys() & sizes.keys()}


def _is_raised(module: str, layers: int) -> bool:
    """Whether mixed_* gives a module its high bits: the head, and v_proj and down_proj of the first and last eighth of
    the layers and of every third between."""
    if module == "lm_head" or not module.endswith(("v_proj", "down_proj")):
        return module == "lm_head"
    layer, eighth = int(module.split(".")[1]), layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
