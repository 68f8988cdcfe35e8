"""Recipes: how many bits each module gets, by its role in the model and its layer.

Knows the roles of our modules and what was measured of them (docs/QUANTIZATION.md). Knows no files and no arrays.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from mlx_qwen35.checkpoint.inventory import Shape, is_linear
from mlx_qwen35.config import BITS, GROUP_SIZES, ModelConfig, QuantSpec
from mlx_qwen35.errors import CheckpointError

# mlx-lm's and mlx-vlm's names for (low bits, high bits).
_MIXED = {f"mixed_{low}_{high}": (low, high) for low, high in ((2, 6), (3, 4), (3, 5), (3, 6), (3, 8), (4, 6), (4, 8))}

RECIPES = {
    "default": "more bits where they pay most for their size; the experts, or the feed-forward maps, get --q-bits",
    "uniform": "--q-bits everywhere, as mlx_lm.convert without a recipe",
} | {
    name: f"mlx-lm's: {low} bits; {high} for the head and, in some layers, v_proj and down_proj"
    for name, (low, high) in _MIXED.items()
}

# Tiny, and they steer everything after them: who is chosen, what is kept, how fast it fades. Never under 8 bits.
_STEERING = ("mlp.gate", "mlp.shared_expert_gate", "linear_attn.in_proj_a", "linear_attn.in_proj_b")


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


def assign(
    recipe: str | None, shapes: Mapping[str, Shape], default: QuantSpec, config: ModelConfig
) -> dict[str, QuantSpec | None]:
    """How each linear module of `shapes` (our weight names -> shapes, as text_tensors() gives them) is quantized.

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
    found = {}
    for name, shape in shapes.items():
        if is_linear(name, shape) and not name.startswith("vision."):
            module = name.removesuffix(".weight")
            found[module] = fitted(_wanted(recipe, module, default, config.text.num_hidden_layers), shape)
    return found


def fitted(spec: QuantSpec, shape: Shape) -> QuantSpec | None:
    """`spec` with the largest group, not above its own, that divides the rows of a weight [.., in]; None: none does."""
    sizes = (size for size in reversed(GROUP_SIZES[spec.mode]) if size <= spec.group_size)
    return next((replace(spec, group_size=size) for size in sizes if shape[-1] % size == 0), None)


def _wanted(recipe: str, module: str, default: QuantSpec, layers: int) -> QuantSpec:
    kind = role(module)
    group = default.group_size if default.mode == "affine" else 64
    if recipe in _MIXED:
        low, high = _MIXED[recipe]
        raised = module == "lm_head" or (module.endswith(("v_proj", "down_proj")) and _spared(_layer(module), layers))
        default = QuantSpec(high if raised else low, group, "affine")
    if kind == "steering" and default.bits < 8:
        return QuantSpec(8, group, "affine")
    return default


def _layer(module: str) -> int:
    return int(module.split(".")[1])


def _spared(layer: int, layers: int) -> bool:
    """Whether mixed_* spares a layer's v_proj and down_proj: the first and last eighth, and every third between."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def more(bits: int, steps: int) -> int:
    """So many steps up the bits that MLX's affine mode has; the top is 8."""
    ladder = BITS["affine"]
    return ladder[min(ladder.index(bits) + steps, len(ladder) - 1)]
