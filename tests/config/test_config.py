"""config.json: every published form is read, everything else is refused by file and key."""

import copy
import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_qwen35.config import ModelConfig, MoE, QuantSpec, Rope, VisionConfig, Yarn
from mlx_qwen35.errors import CheckpointError
from tests.checkpoints import tiny_config
from tests.published import published_config
from tests.soak import examples

ROPE = {"mrope_interleaved": True, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5, "rope_theta": 10000000}
TEXT_SIZES = [
    "head_dim",
    "hidden_size",
    "linear_conv_kernel_dim",
    "linear_key_head_dim",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "linear_value_head_dim",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "vocab_size",
]
MOE_SIZES = ["num_experts", "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size"]


def read(config, **where):
    return ModelConfig.from_dict(config, **where)


def changed(kind="dense", *, flat=True, **keys):
    """tiny_config with keys of the text replaced; ... (Ellipsis) removes one."""
    config = tiny_config(kind, flat=flat)
    text = config if flat else config["text_config"]
    for key, value in keys.items():
        text[key] = value
        if value is ...:
            del text[key]
    return config


def refused(config, *words):
    with pytest.raises(CheckpointError) as error:
        read(config, where="DIR/config.json")
    for word in ("DIR/config.json", *words):
        assert word in str(error.value)


@pytest.mark.parametrize(
    "name, hidden, layers, heads, values, tied, ffn",
    [
        ("0.8B", 1024, 24, (8, 2), 16, True, 3584),
        ("2B", 2048, 24, (8, 2), 16, True, 6144),
        ("4B", 2560, 32, (16, 4), 32, True, 9216),
        ("9B", 4096, 32, (16, 4), 32, False, 12288),
        ("27B", 5120, 64, (24, 4), 48, False, 17408),
        ("35B-A3B", 2048, 40, (16, 2), 32, False, MoE(256, 8, 512, 512)),
        ("122B-A10B", 3072, 48, (32, 2), 64, False, MoE(256, 8, 1024, 1024)),
        ("397B-A17B", 4096, 60, (32, 2), 64, False, MoE(512, 10, 1024, 1024)),
    ],
)
def test_published_sizes(name, hidden, layers, heads, values, tied, ffn):
    config = read(published_config(f"Qwen3.5-{name}"))
    text = config.text
    assert (text.hidden_size, text.num_hidden_layers, text.vocab_size) == (hidden, layers, 248320)
    assert (text.num_attention_heads, text.num_key_value_heads) == heads
    assert (text.linear_num_key_heads, text.linear_num_value_heads) == (16, values)
    assert text.rope == Rope(1e7, 64, (11, 11, 10), None)
    assert text.tie_word_embeddings is tied
    assert ffn == (text.moe if text.intermediate_size is None else text.intermediate_size)
    assert text.layer_types.count("full_attention") * 4 == layers == len(text.layer_types)
    assert config.vision.out_hidden_size == hidden and config.vision.num_position_embeddings == 2304
    assert (config.image_token_id, config.video_token_id) == (248056, 248057)
    assert config.eos_token_ids == (248044,) and text.mtp_num_hidden_layers == 1
    assert config.quantization is None and config.source_quantization is None


@pytest.mark.parametrize(
    "name",
    ["Qwen3.6-27B", "Qwen3.6-35B-A3B", "Qwen3.8-27B", "Qwen3.8-2.4T-A95B", "Intel_Qwen3.6-27B-int4-mlx-AutoRound"],
)
def test_successors(shared_dir, name):
    config = read(json.loads((shared_dir / "model_data/configs" / f"{name}.json").read_text()))
    assert config.text.rope == Rope(1e7, 64, (11, 11, 10), None) and config.text.vocab_size == 248320
    assert (config.vision is None) == ("2.4T" in name) and config.text.mtp_num_hidden_layers == 1
    if name.startswith("Intel"):
        assert config.quantization.default == QuantSpec(4, 128, "affine")
        assert config.quantization.overrides["model.visual.pos_embed"] is None


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_nested_and_flat_are_the_same_model(kind):
    nested, flat = (read(tiny_config(kind, flat=f)) for f in (False, True))
    assert nested.text == flat.text
    assert (nested.model_type, flat.model_type) == tuple(f"qwen3_5{'_moe' * (kind == 'moe')}{t}" for t in ("", "_text"))
    assert nested.vision is None and flat.image_token_id is None and nested.image_token_id == 80


@pytest.mark.parametrize("kind, model_type", [("dense", "qwen3_5"), ("moe", "qwen3_5_moe")])
def test_a_flat_config_of_the_outer_type(kind, model_type):
    assert read(changed(kind, model_type=model_type)).text == read(tiny_config(kind)).text


def test_vision_is_read():
    config = tiny_config(vision=True)
    for model_type in ("qwen3_5", "qwen3_5_vision", "qwen3_5_moe_vision"):
        config["vision_config"]["model_type"] = model_type
        assert read(config).vision == VisionConfig(2, 24, 36, 2, 3, 4, 2, 2, 16, 64)
    config["vision_config"]["deepstack_visual_indexes"] = [1]
    refused(config, "vision_config.deepstack_visual_indexes")
    config = tiny_config(vision=True)
    config["vision_config"]["out_hidden_size"] = 63
    refused(config, "vision_config.out_hidden_size", "64")


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("section", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("type_key", ["type", "rope_type"])
def test_rope_by_either_name(flat, section, type_key):
    config = changed(flat=flat, **{"rope_parameters": ..., section: {**ROPE, type_key: "default"}})
    assert read(config).text.rope == Rope(1e7, 8, (2, 1, 1), None)


def test_rope_keys_beside_the_section():
    config = changed(rope_parameters=..., rope_theta=500, partial_rotary_factor=0.25)
    assert read(config).text.rope == Rope(500.0, 4, (2, 0, 0), None)  # no section: text alone, one axis


def test_rope_scaling_goes_over_rope_parameters():
    scaling = {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 1024}
    assert read(changed(rope_scaling=scaling)).text.rope == Rope(1e7, 8, (2, 1, 1), Yarn(2.0, 1024))


def test_yarn_as_transformers_reads_it():
    rope = {**ROPE, "rope_type": "yarn", "factor": 4.0}
    assert read(changed(rope_parameters=rope)).text.rope.yarn == Yarn(4.0, 4096)  # the context before, where not given
    rope |= {"original_max_position_embeddings": 99, "beta_fast": 16, "beta_slow": 0, "mscale": 0.5, "truncate": False}
    assert read(changed(rope_parameters=rope)).text.rope.yarn == Yarn(4.0, 99, 16.0, mscale=0.5, truncate=False)
    del rope["factor"]
    refused(changed(rope_parameters=rope), "rope_parameters.factor", "missing")


@pytest.mark.parametrize(
    "change, key",
    [
        ({"rope_type": "linear"}, "rope_type"),
        ({"mrope_interleaved": False}, "mrope_interleaved"),
        ({"mrope_section": [2, 1, 2]}, "mrope_section"),
        ({"mrope_section": [4]}, "mrope_section"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor"),
        ({"partial_rotary_factor": 0.2}, "partial_rotary_factor"),
        ({"rope_theta": float("nan")}, "rope_theta"),
        ({"rope_theta": None}, "rope_theta"),
    ],
)
def test_other_ropes_are_refused(change, key):
    refused(changed(rope_parameters=ROPE | change), f"rope_parameters.{key}")


def test_a_picture_model_needs_its_sections():
    config = tiny_config(vision=True)
    del config["text_config"]["rope_parameters"]["mrope_section"]
    refused(config, "text_config.rope_parameters.mrope_section")


def test_layer_types_from_the_interval():
    config = read(changed(layer_types=..., num_hidden_layers=7, full_attention_interval=3))
    assert [kind[0] for kind in config.text.layer_types] == list("llfllfl")
    refused(changed(layer_types=..., full_attention_interval=...), "layer_types", "full_attention_interval")


@pytest.mark.parametrize("kinds", [["full_attention"] * 3, "full", [1, 2, 3, 4], ["full_attention"] * 3 + ["sliding"]])
def test_other_layer_types_are_refused(kinds):
    refused(changed(layer_types=kinds), "layer_types")


@pytest.mark.parametrize("model_type", ["qwen3_next", "qwen3_vl", "llama", 7, ["qwen3_5"]])
def test_other_architectures_are_refused_by_name(model_type):
    refused(changed(model_type=model_type), str(model_type), "mlx-lm")


@pytest.mark.parametrize("model_type", ["qwen4_exp", "qwen3_8_flash_next"])
def test_flash_next_is_another_architecture(model_type):
    refused(changed(model_type=model_type), "Qwen3.8-Flash-Next is another architecture", "mlx-vlm")
    try:
        read(changed(model_type=model_type))
    except CheckpointError as error:
        assert "\n" not in str(error)


def test_no_model_type():
    refused(changed(model_type=...), "model_type")


def test_halves_of_different_models_are_refused():
    config = tiny_config("moe")
    config["text_config"]["model_type"] = "qwen3_5_text"
    refused(config, "text_config.model_type", "qwen3_5_moe")


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize(
    "kind, key", [("dense", key) for key in [*TEXT_SIZES, "intermediate_size"]] + [("moe", key) for key in MOE_SIZES]
)
def test_a_missing_size_is_named(kind, key, flat):
    for absent in (..., None):
        refused(changed(kind, flat=flat, **{key: absent}), ("" if flat else "text_config.") + key, "missing")


@pytest.mark.parametrize("value", ["64", 64.0, True, [64], 0, -1, 2**40])
@pytest.mark.parametrize("key", ["hidden_size", "num_experts", "vocab_size"])
def test_an_ill_typed_size_is_named(key, value):
    refused(changed("moe", **{key: value}), key)


@pytest.mark.parametrize(
    "keys",
    [
        {"num_attention_heads": 7},
        {"linear_num_value_heads": 7},
        {"num_experts_per_tok": 9},
        {"hidden_act": "gelu"},
        {"output_gate_type": "sigmoid"},
        {"attention_bias": True},
        {"rms_norm_eps": "1e-6"},
        {"tie_word_embeddings": "yes"},
        {"linear_num_value_heads": 2**18, "linear_value_head_dim": 2**18},
    ],
)
def test_unsupported_values_are_named(keys):
    refused(changed("moe", **keys), next(iter(keys)))


def test_heads_are_tied_by_the_outer_key_first():
    for outer, inner, tied in ((True, False, True), (False, True, False), (None, True, True), (None, None, False)):
        config = changed(flat=False, tie_word_embeddings=inner) | {"tie_word_embeddings": outer}
        assert read(config).text.tie_word_embeddings is tied


def test_eos_of_both_levels():
    config = changed(flat=False, eos_token_id=[7, 3]) | {"eos_token_id": 3}
    assert read(config).eos_token_ids == (3, 7)
    assert read(changed(eos_token_id=...)).eos_token_ids == ()
    refused(changed(eos_token_id=["<|im_end|>"]), "eos_token_id")


def test_mlx_quantization():
    quantization = {
        "group_size": 32,
        "bits": 8,
        "mode": "mxfp8",
        "language_model.model.layers.0.mlp.gate": {"group_size": 64, "bits": 8},
        "language_model.model.embed_tokens": True,
        "lm_head": False,
        "norm": {"group_size": None, "bits": None},
    }
    for key in ("quantization", "quantization_config"):
        found = read(tiny_config() | {key: quantization}).quantization
        assert found.default == QuantSpec(8, 32, "mxfp8")
        assert found.overrides == {
            "language_model.model.layers.0.mlp.gate": QuantSpec(8, 64, "affine"),
            "language_model.model.embed_tokens": QuantSpec(8, 32, "mxfp8"),
            "lm_head": None,
            "norm": QuantSpec(4, 64, "affine"),
        }


def test_words_in_quantization_that_are_no_modules():
    """Writers leave notes there: calibration, versions, settings of a cache."""
    notes = {"calibration": "x", "version": 2, "imatrix": True, "sizes": [1, 2], "kv": {"bits": 8}, "o.q": {"by": "w"}}
    found = read(tiny_config() | {"quantization": {"group_size": 32, "bits": 8} | notes}).quantization
    assert {path: spec for path, spec in found.overrides.items() if spec != found.default} == {}


def test_an_entry_may_leave_out_its_groups():
    entries = {"a.b": {"bits": 6}, "a.c": {"group_size": 32}, "a.d": {"bits": 4, "mode": "nvfp4"}}
    found = read(tiny_config() | {"quantization": {"group_size": 128, "bits": 8} | entries}).quantization
    assert found.overrides == {"a.b": QuantSpec(6, 128, "affine"), "a.c": QuantSpec(8, 32, "affine"),
                               "a.d": QuantSpec(4, 16, "nvfp4")}  # fmt: skip
    assert found.unsaid == {"a.b": ("group_size",), "a.c": ("bits",), "a.d": ("group_size",)}


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "in both places"])
@pytest.mark.parametrize("vision", [False, True])
def test_rope_keys_straight_in_the_text(beside, vision):
    """As auto-round's MLX export writes them."""
    config, meant = tiny_config(vision=vision), read(tiny_config(vision=vision)).text.rope
    text = config["text_config"]
    text |= text["rope_parameters"]
    if not beside:
        del text["rope_parameters"]
    assert read(config).text.rope == meant
    text["rope_scaling"] = {"type": "yarn", "factor": 2.0}  # goes over both
    assert read(config).text.rope.yarn == Yarn(2.0, 4096)


def test_flat_yarn():
    text = {**ROPE, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 99}
    assert read(changed(rope_parameters=..., **text)).text.rope.yarn == Yarn(4.0, 99)


@pytest.mark.parametrize(
    "key, other", [("rope_theta", 10000), ("mrope_section", [1, 2, 1]), ("partial_rotary_factor", 0.25)]
)
def test_rope_said_twice_and_differently(key, other):
    refused(changed(flat=False, **{key: other}), f"text_config.{key}", "rope_parameters", "keep the one")


@pytest.mark.parametrize(
    "quantization",
    [
        {"group_size": 64},
        {"group_size": 64, "bits": 7},
        {"group_size": 48, "bits": 4},
        {"group_size": 64, "bits": 4, "mode": "mxfp4"},
        {"group_size": 64, "bits": 4, "mode": "fp5"},
        {"group_size": 64, "bits": 4, "lm_head": 8},
        {"group_size": 64, "bits": 4, "lm_head": {"bits": 7}},
        {"group_size": 64, "bits": 4, "a.b": 8.0},
        {"group_size": 64, "bits": 4, "a.b": {"bits": 4, "mode": ["affine"]}},
        4,
    ],
)
def test_other_quantizations_are_refused(quantization):
    refused(tiny_config() | {"quantization": quantization}, "quantization")


def test_quantizations_of_other_tools_are_handed_on():
    source = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    config = read(tiny_config() | {"quantization_config": source})
    assert config.quantization is None and config.source_quantization == source


def test_from_folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    assert ModelConfig.from_folder(tmp_path).text == read(tiny_config()).text


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\xff", "[" * 100_000, '{"model_type": "qwen3_5"}'])
def test_unreadable_files_are_named(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match="config.json"):
        ModelConfig.from_folder(tmp_path)


def test_missing_files_are_named(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(CheckpointError, match="config.json does not exist"):
            ModelConfig.from_folder(folder)
    (tmp_path / "adapter_config.json").touch()
    with pytest.raises(CheckpointError, match="holds an adapter; give the folder of the model"):
        ModelConfig.from_folder(tmp_path)
    (tmp_path / "Qwen3.5-4B-Q4_K_M.gguf").touch()
    with pytest.raises(CheckpointError, match="none is a model's by its name; give the .gguf file"):
        ModelConfig.from_folder(tmp_path)
    (tmp_path / "config.json").mkdir()
    with pytest.raises(CheckpointError, match="cannot be read"):
        ModelConfig.from_folder(tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=examples(300))
@given(st.data())
def test_any_value_anywhere_is_read_or_refused(data):
    """A config with values swapped for any JSON is a CheckpointError or a config; never another exception."""
    config = copy.deepcopy(tiny_config(data.draw(st.sampled_from(["dense", "moe"])), vision=True))
    config["quantization"] = {"group_size": 64, "bits": 4, "lm_head": {"group_size": 32, "bits": 8}}
    for _ in range(data.draw(st.integers(1, 3))):
        place = config
        while True:
            key = data.draw(st.sampled_from(sorted(place)))
            if not isinstance(place[key], dict) or not place[key] or data.draw(st.booleans()):
                break
            place = place[key]
        place[key] = data.draw(JSON)
    try:
        read(config)
    except CheckpointError as error:
        assert "config.json" in str(error) and len(str(error)) < 500


def test_config_needs_no_mlx():
    code = "import sys, mlx_qwen35.config; sys.exit(any(m.split('.')[0] == 'mlx' for m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
