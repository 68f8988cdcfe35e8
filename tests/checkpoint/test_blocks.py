"""Block drafters in folders: the kind is known, the geometry held against the target, what is wrong is refused."""

import json

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35 import convert, estimate, load_draft_model
from mlx_qwen35.blocks.config import DFLASH, DFLASH2, BlockConfig, is_block_drafter
from mlx_qwen35.blocks.drafter import BlockDraftModel
from mlx_qwen35.checkpoint.blocks import is_blocks, load_blocks, open_blocks
from mlx_qwen35.config import ModelConfig
from mlx_qwen35.errors import CheckpointError
from mlx_qwen35.library import find
from tests.blocks import SELECTING, published, random_blocks, tensors, write
from tests.checkpoints import random_tensors, tiny_config, write_checkpoint
from tests.talkers import random_model

TARGET = ModelConfig.from_dict(tiny_config())
PUBLISHED = {  # z-lab/Qwen3.8-27B-DFlash2
    "architectures": ["DFlash2DraftModel"], "model_type": "qwen3", "dtype": "bfloat16", "hidden_size": 5120,
    "num_hidden_layers": 5, "vocab_size": 248320, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "intermediate_size": 17408, "rms_norm_eps": 1e-6, "max_position_embeddings": 262144, "use_sliding_window": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000000}, "sliding_window": 2048, "is_causal": False,
    "layer_types": ["sliding_attention"] * 5, "tie_word_embeddings": False,
    "dflash_config": {"block_size": 8, "conv_group_size": 16, "conv_kernel_size": 2, "mask_token_id": 248070,
                      "selector_rank": 256, "selector_top_k": 16, "target_layer_ids": [5, 19, 33, 47, 61]},
}  # fmt: skip


def test_a_published_config():
    config = BlockConfig.from_dict({**PUBLISHED, "num_target_layers": 64}, "config.json")
    assert (config.kind, config.rows, config.usual_rows, config.mask) == (DFLASH2, 8, 8, 248070)
    assert config.taps == (5, 19, 33, 47, 61) and config.windows == (2047,) * 5 and config.reach == 2047
    assert config.convolution == (2, 16) and config.selector == (256, 16) and config.rope_theta == 1e7
    older = published("DFlash", section={"runtime_block_size": 5, "draft_window_size": 9})
    config = BlockConfig.from_dict(older, "config.json")
    assert (config.kind, config.rows, config.usual_rows, config.windows) == (DFLASH, 16, 5, (9, 9, 9))
    assert BlockConfig.from_dict(published(), "config.json").windows == (11, None, 11)
    assert is_block_drafter(older) and not is_block_drafter(tiny_config()) and not is_block_drafter([])


def test_sizes_of_a_published_drafter():
    """1.924 billion weights, as its file has them."""
    from mlx_qwen35.checkpoint.blocks import blocks_tensors

    shapes = blocks_tensors(BlockConfig.from_dict(PUBLISHED, "config.json"))
    assert round(sum(np.prod(shape, dtype=np.int64) for shape in shapes.values()) / 1e9, 3) == 1.924


WRONG = [
    ({"architectures": ["DSparkDraftModel"]}, {}, "a DSpark drafter, which this package does not compute"),
    ({}, {"markov_rank": 256}, "markov_rank is that of a DSpark drafter"),
    ({}, {"layer_fusion": True}, "layer_fusion is that of a DFly drafter"),
    ({"architectures": ["LlamaForCausalLM"]}, {}, "architectures is .*computes DFlashDraftModel and DFlash2DraftModel"),
    ({}, SELECTING, "conv_kernel_size belongs to a DFlash2, and architectures says DFlashDraftModel"),
    ({}, {"sharpening": 2}, "dflash_config.sharpening is not known to this package"),
    ({}, {"target_layer_ids": []}, "target_layer_ids is .*must name layers"),
    ({}, {"target_layer_ids": [1, 4]}, "names layer 4 of a model of 4"),
    ({}, {"mask_token_id": 96}, "mask_token_id is 96"),
    ({"block_size": 1}, {}, "block_size is 1"),
    ({"model_type": "llama"}, {}, "model_type is 'llama'"),
    ({"draft_vocab_size": 40}, {}, "draft_vocab_size is 40"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4}}, {}, "rope_scaling.rope_type is 'yarn'"),
    ({"attention_bias": True}, {}, "attention_bias is True"),
    ({"layer_types": ["full_attention"]}, {}, "layer_types must name"),
    ({"num_key_value_heads": 3}, {}, "num_attention_heads is 4"),
]


@pytest.mark.parametrize("top, section, why", WRONG, ids=[why for *_, why in WRONG])
def test_what_is_not_computed_is_refused(top, section, why):
    with pytest.raises(CheckpointError, match=why):
        BlockConfig.from_dict(published(section=section, **top), "config.json")


def test_a_second_kind_needs_all_its_keys():
    for key in SELECTING:
        config = published("DFlash2")
        del config["dflash_config"][key]
        with pytest.raises(CheckpointError, match=f"{key} is missing"):
            BlockConfig.from_dict(config, "config.json")
    with pytest.raises(CheckpointError, match="conv_group_size is 24, which does not divide hidden_size 64"):
        BlockConfig.from_dict(published("DFlash2", section={"conv_group_size": 24}), "config.json")


def test_another_models_is_refused_before_a_weight_is_read(tmp_path):
    folder = write(tmp_path / "d", published(), {})
    (folder / "model.safetensors").unlink()
    others = [("hidden_size", 96), ("vocab_size", 97), ("num_hidden_layers", 8)]
    for key, value in others:
        with pytest.raises(CheckpointError, match=r"does not draft for this model.* where it has "):
            load_blocks(folder, ModelConfig.from_dict(tiny_config(**{key: value})))


@pytest.mark.parametrize("kind", ["DFlash", "DFlash2"])
@pytest.mark.parametrize("prefix", ["", "model."])
def test_weights_are_those_of_the_file(tmp_path, kind, prefix):
    config = published(kind, section={"attention_sink_bias": True})
    arrays = {prefix + name: value for name, value in tensors(config).items()}
    arrays[f"{prefix}embed_tokens.weight"] = np.zeros((96, 64), np.float32)
    folder = write(tmp_path / "d", config, arrays)
    model = load_draft_model(folder, random_model("dense"))
    assert isinstance(model, BlockDraftModel)
    held = dict(_flat(model))
    named = {(f"{n}.weight" if n.endswith("codebook") else n): value for n, value in tensors(config).items()}
    assert held.keys() == named.keys()
    assert all(np.array_equal(np.array(held[name]), value) for name, value in named.items())


def _flat(model):
    from mlx.utils import tree_flatten

    return tree_flatten(model.parameters())


@pytest.mark.parametrize("change, why", [
    (lambda arrays: arrays.pop("layers.1.mlp.up_proj.weight"), "layers.1.mlp.up_proj.weight is missing"),
    (lambda arrays: arrays.update(extra=np.zeros(3, np.float32)), "extra in model.safetensors is left over"),
    (lambda arrays: arrays.update({"norm.weight": np.zeros(63, np.float32)}), r"norm.weight .*\[63\], not \[64\]"),
    (lambda arrays: arrays.update({"fc.scales": np.zeros((64, 2), np.float32)}), "fc is quantized|does not say how fc"),
])  # fmt: skip
def test_tensors_that_do_not_fit_are_refused(tmp_path, change, why):
    arrays = tensors(published())
    change(arrays)
    with pytest.raises(CheckpointError, match=why):
        load_blocks(write(tmp_path / "d", published(), arrays), TARGET)


@pytest.mark.parametrize("kind", ["DFlash", "DFlash2"])
@pytest.mark.parametrize("mode", ["affine", "mxfp8"])
def test_converted_and_quantized(tmp_path, kind, mode):
    config = published(kind)
    source = write(tmp_path / "a", config, tensors(config))
    seen = []
    folder = convert(source, tmp_path / "b", bits=8, group_size=32, mode=mode, on_progress=lambda *at: seen.append(at))
    assert seen[0][0] == 0 and seen[-1][0] == seen[-1][1] > 0
    raw = json.loads((folder / "config.json").read_text())
    assert raw["quantization"] == {"group_size": 32, "bits": 8, "mode": mode}
    assert raw["dflash_config"] == config["dflash_config"] and is_blocks(folder)
    opened = open_blocks(folder)
    packable = {name for name, value in tensors(config).items() if value.ndim == 2 and value.shape[1] % 32 == 0}
    assert opened.specs.keys() == {name.removesuffix(".weight") for name in packable}
    meant, few = random_blocks(kind), load_blocks(folder, TARGET)
    files, how = mx.load(str(folder / "model.safetensors")), {"group_size": 32, "bits": 8, "mode": mode}
    for name in opened.specs:
        weight, *rest = (
            files[f"{name}.{kind}"] for kind in ("weight", "scales", "biases") if f"{name}.{kind}" in files
        )
        values = mx.dequantize(weight, *rest, **how, dtype=mx.float32)
        assert 0 < np.abs(np.array(values) - tensors(config)[f"{name}.weight"]).mean() < 0.06
        meant.load_weights([(f"{name}.weight", values)], strict=False)
    context = mx.array(np.random.default_rng(1).standard_normal((1, 5, 128)).astype(np.float32))
    found = []
    for model in (meant, few):
        windows = model.make_windows()
        model.remember(context, windows)
        found.append(np.array(model(context[..., :64], windows)))
    np.testing.assert_allclose(*found, atol=2e-3)
    with pytest.raises(CheckpointError, match="is quantized already"):
        convert(folder, tmp_path / "c", bits=4)


def test_what_a_conversion_of_a_drafter_cannot_be(tmp_path):
    source = write(tmp_path / "a", published(), tensors(published()))
    with pytest.raises(CheckpointError, match="would be copied as it is"):
        convert(source, tmp_path / "b", bits=None)
    with pytest.raises(CheckpointError, match="a drafter, for which recipe means nothing"):
        convert(source, tmp_path / "b", recipe="uniform")
    with pytest.raises(CheckpointError, match="no GGUF file is made: give a folder"):
        convert(source, tmp_path / "b-Q8_0.gguf", bits=None)
    half = convert(source, tmp_path / "b", bits=None, dtype="bfloat16")
    kept = mx.load(str(half / "model.safetensors"))
    assert {array.dtype for array in kept.values()} == {mx.bfloat16} and kept.keys() == tensors(published()).keys()
    broken = tensors(published())
    broken["fc.weight"][3, 4] = np.nan
    with pytest.raises(CheckpointError, match="fc.weight in model.safetensors has values that are NaN"):
        convert(write(tmp_path / "c", published(), broken), tmp_path / "d")
    assert not (tmp_path / "d").exists()
    with pytest.raises(CheckpointError, match="exists already"):
        convert(source, half)
    convert(source, half, overwrite=True, group_size=32)


def test_it_is_named_where_it_is_no_model(tmp_path):
    folder = write(tmp_path / "d", published(), tensors(published()))
    assert find(folder) == folder
    with pytest.raises(CheckpointError, match="that of a drafter, which answers nothing itself. Give the model"):
        estimate(folder)
    config = tiny_config()
    model = write_checkpoint(tmp_path / "m", config, random_tensors(config))
    held = sum(value.nbytes for value in tensors(published()).values())
    assert held < estimate(model, "8GB", 64, draft_model=folder).drafting < 1.6 * held
    with pytest.raises(CheckpointError, match="does not draft for this model"):
        estimate("demo", draft_model=folder)
