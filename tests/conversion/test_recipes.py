"""Recipes over every published size: roles are told apart, steering is spared, names of others mean what they mean."""

import itertools
from typing import Any

import mlx.core as mx
import pytest

from mlx_qwen35.checkpoint.inventory import Shape, is_linear, text_tensors
from mlx_qwen35.config import BITS, USUAL, ModelConfig, QuantSpec
from mlx_qwen35.conversion import recipes
from mlx_qwen35.conversion.recipes import RECIPES, assign, role, sensitivities
from mlx_qwen35.errors import CheckpointError
from tests.checkpoints import tiny_config

# hidden, layers, heads, key/value heads, value heads, then the dense feed-forward size or (experts, size)
SIZES: dict[str, tuple[Any, ...]] = {
    "0.8B": (1024, 24, 8, 2, 16, 3584), "2B": (2048, 24, 8, 2, 16, 6144), "4B": (2560, 32, 16, 4, 32, 9216),
    "9B": (4096, 32, 16, 4, 32, 12288), "27B": (5120, 64, 24, 4, 48, 17408), "35B": (2048, 40, 16, 2, 32, (256, 512)),
    "122B": (3072, 48, 32, 2, 64, (256, 1024)), "397B": (4096, 60, 32, 2, 64, (512, 1024)),
}  # fmt: skip
SMALL = ("0.8B", "2B", "4B")  # whose head is tied
ROLES = {"attention", "delta_net", "embedding", "steering"}

sizes = pytest.mark.parametrize("size", SIZES)
modes = pytest.mark.parametrize("mode", BITS)


def published(size: str) -> ModelConfig:
    hidden, layers, heads, kv_heads, value_heads, ffn = SIZES[size]
    moe = isinstance(ffn, tuple)
    own: dict[str, Any] = {"intermediate_size": ffn}
    if moe:
        own = {"num_experts": ffn[0], "moe_intermediate_size": ffn[1], "shared_expert_intermediate_size": ffn[1]}
    config = tiny_config(
        "moe" if moe else "dense", hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, linear_num_value_heads=value_heads, linear_num_key_heads=16, head_dim=256,
        linear_key_head_dim=128, linear_value_head_dim=128, vocab_size=248320, tie_word_embeddings=size in SMALL,
        rope_parameters={"partial_rotary_factor": 0.25, "mrope_section": [11, 11, 10]}, **own,
    )  # fmt: skip
    return ModelConfig.from_dict(config)


def assigned(size: str, recipe: str | None, bits: int = 4, mode: str = "affine") -> dict[str, QuantSpec | None]:
    config = published(size)
    group = 64 if mode == "affine" else USUAL[mode][1]
    return assign(recipe, text_tensors(config), QuantSpec(bits, group, mode), config)


def average(found: dict[str, QuantSpec | None], shapes: dict[str, Shape]) -> float:
    """Bits a weight, without scales."""
    sizes = {module: mx.prod(mx.array(shapes[f"{module}.weight"], dtype=mx.float32)).item() for module in found}
    return sum(sizes[module] * spec.bits for module, spec in found.items()) / sum(sizes.values())


@sizes
@pytest.mark.parametrize("recipe", [None, *RECIPES])
@modes
def test_every_recipe_for_every_size(size: str, recipe: str | None, mode: str) -> None:
    """Each linear module has a form that MLX has, and none that steers has fewer than 8 bits in integers."""
    for bits in BITS[mode]:
        if recipe in RECIPES and recipe.startswith("mixed_") and mode != "affine":
            with pytest.raises(CheckpointError, match="give only one"):
                assigned(size, recipe, bits, mode)
            continue
        found = assigned(size, recipe, bits, mode)
        shapes = text_tensors(published(size))
        assert set(found) == {name.removesuffix(".weight") for name, shape in shapes.items() if is_linear(name, shape)}
        ffn = {"experts", "shared_expert"} if isinstance(SIZES[size][-1], tuple) else {"mlp"}
        assert set(map(role, found)) == ROLES | ffn | (set() if size in SMALL else {"head"})
        for module, spec in found.items():
            assert spec.bits in BITS[spec.mode] and spec.group_size in (16, 32, 64)
            if role(module) == "steering":
                assert (spec.bits, spec.mode) == (8, "affine")


@pytest.mark.parametrize(
    ("module", "meant"),
    [
        ("embed_tokens", "embedding"), ("lm_head", "head"), ("layers.0.mlp.gate", "steering"),
        ("layers.0.mlp.gate_proj", "mlp"), ("layers.0.mlp.experts.gate_proj", "experts"),
        ("layers.0.mlp.shared_expert.gate_proj", "shared_expert"), ("layers.0.mlp.shared_expert_gate", "steering"),
        ("layers.11.self_attn.q_proj", "attention"), ("layers.0.linear_attn.in_proj_qkv", "delta_net"),
        ("layers.0.linear_attn.in_proj_a", "steering"), ("layers.0.linear_attn.in_proj_b", "steering"),
        ("layers.0.linear_attn.in_proj_z", "delta_net"), ("layers.0.linear_attn.out_proj", "delta_net"),
    ],
)  # fmt: skip
def test_roles(module: str, meant: str) -> None:
    assert role(module) == meant


@sizes
def test_uniform(size: str) -> None:
    assert {s for m, s in assigned(size, "uniform").items() if role(m) != "steering"} == {QuantSpec(4, 64, "affine")}
    assert not recipes.searches("uniform") and recipes.searches(None)


@sizes
@pytest.mark.parametrize("bits", BITS["affine"])
def test_default(size: str, bits: int) -> None:
    """What the recipe is named for has the bits that were asked for; nothing has fewer, and it stays in reach of them:
    the more of the model is experts, the closer."""
    found = assigned(size, None, bits)
    assert found == assigned(size, "default", bits)
    main = {s.bits for m, s in found.items() if role(m) in ("experts", "mlp")}
    assert min(main) == bits and all(spec.bits >= bits for spec in found.values())
    over = average(found, text_tensors(published(size))) - bits
    assert over <= (0.75 if isinstance(SIZES[size][-1], tuple) else 1.75)
    if bits == 4:
        assert over > 0.05


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
def test_default_of_other_modes(mode: str) -> None:
    """The bulk keeps the mode; who needs more has it in affine."""
    found = assigned("35B", None, USUAL[mode][0], mode)
    assert {s.mode for m, s in found.items() if role(m) == "experts"} == {mode}
    assert {s.mode for m, s in found.items() if role(m) in ("attention", "embedding", "head")} == {"affine"}


def test_more_where_a_role_matters_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of sensitivities is what decides: 16 times as sensitive is two bits more."""
    before = assigned("27B", None, 2)["lm_head"].bits
    monkeypatch.setitem(recipes.SENSITIVITY, "head.lm_head", recipes.SENSITIVITY["head.lm_head"] / 16)
    assert assigned("27B", None, 2)["lm_head"].bits == max(2, before - 2)


@pytest.mark.parametrize(("low", "high"), [(2, 6), (3, 4), (3, 6), (4, 6), (3, 5), (3, 8), (4, 8)])
def test_mixed_is_mlx_lms(low: int, high: int) -> None:
    """Against mlx-lm's own predicate, but for what steers; the names that only mlx-vlm has follow the same rule."""
    convert = pytest.importorskip("mlx_lm.convert")
    config = published("35B")
    layers = range(config.text.num_hidden_layers)

    class Stub:
        """As much of a model as the predicate looks at."""

        def __init__(self) -> None:
            self.layers = [*layers]

        def named_modules(self) -> list[tuple[str, None]]:
            return [("language_model.model.layers.0.mlp.shared_expert.down_proj", None)]

    name = f"mixed_{low}_{high}"
    known = name if name in convert.QUANT_RECIPES else "mixed_2_6"
    predicate = convert.mixed_quant_predicate_builder(known, Stub(), 64)
    meant = {2: low, 6: high} if known != name else {low: low, high: high}
    found = assign(name, text_tensors(config), QuantSpec(4, 64, "affine"), config)
    for module, spec in found.items():
        path = "language_model.lm_head" if module == "lm_head" else f"language_model.model.{module}"
        theirs = predicate(path.replace("mlp.experts", "mlp.switch_mlp"), None)
        if role(module) != "steering":
            assert spec == QuantSpec(meant[theirs["bits"]], 64, "affine"), module


def test_groups_that_do_not_divide() -> None:
    """A smaller group is taken before a module stays as it is."""
    config = ModelConfig.from_dict(tiny_config("dense", hidden_size=96, intermediate_size=112))
    found = assign("uniform", text_tensors(config), QuantSpec(4, 128, "affine"), config)
    assert found["layers.0.mlp.up_proj"] == QuantSpec(4, 32, "affine")  # rows of 96
    assert found["layers.0.mlp.down_proj"] is None  # rows of 112
    assert found["layers.3.self_attn.o_proj"] == QuantSpec(4, 32, "affine")


def test_unknown_recipe() -> None:
    with pytest.raises(CheckpointError, match="recipe is 'q4_k_m'; choose default, uniform, mixed_2_6"):
        assigned("35B", "q4_k_m")


def test_names_are_described() -> None:
    assert all(description and len(description) < 110 for description in RECIPES.values())
    assert {f"mixed_{a}_{b}" for a, b in itertools.product((2, 3, 4), (4, 6))} & set(RECIPES)


def test_an_embedding_that_is_the_head_too_counts_for_both() -> None:
    apart = sensitivities({"embed_tokens": (8, 4), "lm_head": (8, 4)})
    tied = sensitivities({"embed_tokens": (8, 4)})
    assert tied["embed_tokens"] == apart["embed_tokens"] + apart["lm_head"] > apart["embed_tokens"] > 0
