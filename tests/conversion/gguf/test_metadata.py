"""The metadata of a GGUF file, as gguf-py reads them: geometry, vocabulary, sampling, what the file is called."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader, GGUFValueType

from mlx_qwen35.config import ModelConfig
from mlx_qwen35.conversion.convert import convert
from mlx_qwen35.conversion.gguf.metadata import size_label, text_metadata, vision_metadata
from mlx_qwen35.conversion.gguf.vocabulary import vocabulary
from mlx_qwen35.errors import CheckpointError
from tests.conversion.gguf.expected import SPLITTING, write_companions
from tests.conversion.gguf.test_values import config_of, source_of
from tests.published import published_config

U32, F32, STRING = GGUFValueType.UINT32, GGUFValueType.FLOAT32, GGUFValueType.STRING


def fields_of(path: Path) -> dict[str, tuple[list[GGUFValueType], Any]]:
    """key -> (its types, its value)."""
    fields = GGUFReader(path).fields.items()
    return {key: (field.types, field.contents()) for key, field in fields if not key.startswith("GGUF.")}


def test_all_keys_of_a_text_model(tmp_path: Path) -> None:
    """Every key with its type, and no other, as llama.cpp's converter writes them."""
    config = config_of("moe", rope_parameters={
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024, "beta_fast": 16.0,
        "attention_factor": 1.25})  # fmt: skip
    source_of(tmp_path / "a", config)
    found = fields_of(convert(tmp_path / "a", tmp_path / "mine-Q8_0.gguf"))
    whole = {
        "block_count": 5, "nextn_predict_layers": 1, "context_length": 4096, "embedding_length": 64,
        "attention.head_count": 6, "attention.head_count_kv": 3, "attention.key_length": 16,
        "attention.value_length": 16, "rope.dimension_count": 8, "ssm.conv_kernel": 4, "ssm.state_size": 32,
        "ssm.group_count": 2, "ssm.time_step_rank": 6, "ssm.inner_size": 192, "full_attention_interval": 4,
        "expert_count": 8, "expert_used_count": 3, "expert_feed_forward_length": 96,
        "expert_shared_feed_forward_length": 40, "rope.scaling.original_context_length": 1024,
    }  # fmt: skip
    single = {
        "attention.layer_norm_rms_epsilon": 1e-6, "rope.freq_base": 1e7, "rope.scaling.factor": 4,
        "rope.scaling.yarn_beta_fast": 16, "rope.scaling.yarn_attn_factor": 1.25,
    }  # fmt: skip
    meant = {f"qwen35moe.{key}": ([U32], value) for key, value in whole.items()}
    meant |= {f"qwen35moe.{key}": ([F32], pytest.approx(value)) for key, value in single.items()}
    array = GGUFValueType.ARRAY
    meant |= {
        "qwen35moe.attention.recurrent_layers": ([array, GGUFValueType.BOOL], [True, True, True, False, False]),
        "qwen35moe.rope.dimension_sections": ([array, GGUFValueType.INT32], [2, 1, 1, 0]),
        "qwen35moe.rope.scaling.type": ([STRING], "yarn"),
        "general.architecture": ([STRING], "qwen35moe"),
        "general.type": ([STRING], "model"),
        "general.name": ([STRING], "mine"),
        "general.size_label": ([STRING], found["general.size_label"][1]),
        "general.file_type": ([U32], 7),
        "general.quantization_version": ([U32], 2),
        "general.sampling.top_k": ([GGUFValueType.INT32], 20),
        "general.sampling.top_p": ([F32], pytest.approx(0.95)),
        "general.sampling.temp": ([F32], pytest.approx(0.6)),
        "tokenizer.ggml.model": ([STRING], "gpt2"),
        "tokenizer.ggml.pre": ([STRING], "qwen35"),
        "tokenizer.ggml.eos_token_id": ([U32], 259),
        "tokenizer.ggml.padding_token_id": ([U32], 258),
        "tokenizer.ggml.add_bos_token": ([GGUFValueType.BOOL], False),
        "tokenizer.ggml.merges": ([array, STRING], ["t h", "Ġ th"]),
        "tokenizer.chat_template": ([STRING], "{% for m in messages %}{{ m.content }}{% endfor %}"),
    }
    arrays = {key: found.pop(f"tokenizer.ggml.{key}") for key in ("tokens", "token_type")}
    assert found == meant
    assert arrays["tokens"][0] == [array, STRING]
    assert arrays["token_type"][0] == [array, GGUFValueType.INT32]
    tokens, kinds = arrays["tokens"][1], arrays["token_type"][1]
    assert len(tokens) == len(kinds) == 270
    assert tokens[254:266] == [*tokens[254:256], "th", "Ġth", "<|endoftext|>", "<|im_end|>", "<think>", "<|fim_pad|>",
                               "<tts_pad>", "[PAD263]", "[PAD264]", "[PAD265]"]  # fmt: skip
    assert kinds == [1] * 258 + [3, 3, 4, 3, 3] + [5] * 7


def test_all_keys_of_a_vision_tower(tmp_path: Path) -> None:
    source_of(tmp_path / "a", config_of("dense"))
    convert(tmp_path / "a", tmp_path / "mine.gguf")
    found = fields_of(tmp_path / "mine-mmproj.gguf")
    text = fields_of(tmp_path / "mine.gguf")
    assert (text["general.architecture"][1], text["general.file_type"][1]) == ("qwen35", 32)
    assert text["qwen35.feed_forward_length"] == ([U32], 160)
    whole = {"projection_dim": 64, "image_size": 16, "patch_size": 4, "embedding_length": 24,
             "feed_forward_length": 36, "block_count": 2, "attention.head_count": 2, "spatial_merge_size": 2}
    meant = {f"clip.vision.{key}": ([U32], value) for key, value in whole.items()}
    array, flag = GGUFValueType.ARRAY, GGUFValueType.BOOL
    assert found == meant | {
        "clip.vision.image_mean": ([array, F32], pytest.approx([0.5, 0.4, 0.3])),
        "clip.vision.image_std": ([array, F32], [0.5, 0.25, 0.5]),
        "clip.vision.attention.layer_norm_epsilon": ([F32], pytest.approx(1e-6)),
        "clip.vision.is_deepstack_layers": ([array, flag], [False, False]),
        "clip.has_vision_encoder": ([flag], True),
        "clip.use_gelu": ([flag], True),
        "clip.projector_type": ([STRING], "qwen3vl_merger"),
        "general.architecture": ([STRING], "clip"),
        "general.type": ([STRING], "mmproj"),
        "general.name": ([STRING], "mine"),
        "general.size_label": ([STRING], found["general.size_label"][1]),
        "general.file_type": ([U32], 32),
        "general.quantization_version": ([U32], 2),
    }


def test_irregular_layers_and_no_mtp() -> None:
    kinds = ["linear_attention", "full_attention", "full_attention", "linear_attention", "linear_attention"]
    config = config_of("dense", layer_types=kinds, full_attention_interval=None)
    found = text_metadata(ModelConfig.from_dict(config), 0)
    assert found["qwen35.attention.recurrent_layers"].value == [True, False, False, True, True]
    assert found["qwen35.full_attention_interval"].value == 2
    assert found["qwen35.block_count"].value == 5
    assert "qwen35.nextn_predict_layers" not in found


@pytest.mark.parametrize("name", ["Qwen3.5-0.8B", "Qwen3.5-35B-A3B", "Qwen3.6-27B", "Qwen3.8-27B"])
def test_published_configs(name: str) -> None:
    config = ModelConfig.from_dict(published_config(name))
    found = text_metadata(config, 1)
    arch = "qwen35moe" if config.text.moe else "qwen35"
    sizes = [found[f"{arch}.{key}"].value for key in ("ssm.state_size", "rope.dimension_count", "block_count")]
    assert sizes == [128, 64, config.text.num_hidden_layers + 1]
    assert found[f"{arch}.rope.dimension_sections"].value == [11, 11, 10, 0]
    tower = vision_metadata(config, {})
    assert (tower["clip.vision.image_size"].value, tower["clip.vision.image_mean"].value) == (768, [0.5] * 3)


@pytest.mark.parametrize(("shapes", "label"), [
    ([("a", (2_000_000_000, 2)), ("b", (220_000_000,))], "4.2B"),
    ([("a", (751, 1000, 1000))], "751M"),
    ([("a", (1_000_000_001,)), ("blk.0.ffn_up_exps.weight", (256, 1000, 2000))], "256x1.0B"),
    ([("a", (96, 1000))], "96K"),
])  # fmt: skip
def test_size_label(shapes: list[tuple[str, tuple[int, ...]]], label: str) -> None:
    assert size_label(shapes) == label


def reading(folder: Path):
    return lambda name: (folder / name).read_bytes() if (folder / name).is_file() else None


def test_the_published_vocabulary(shared_dir: Path) -> None:
    data = shared_dir / "model_data"
    tokenizer = gzip.decompress((data / "qwen35_tokenizer_reconstructed.json.gz").read_bytes())
    template = (data / "hf/chat_template.jinja").read_bytes()
    files = {"tokenizer.json": tokenizer, "chat_template.jinja": template,
             "tokenizer_config.json": (data / "hf/tokenizer_config.rebuilt.json").read_bytes()}  # fmt: skip
    found = {key.removeprefix("tokenizer."): value.value
             for key, value in vocabulary(files.get, 248320, {}, "here").items()}  # fmt: skip
    kinds = np.bincount(found["ggml.token_type"], minlength=6).tolist()
    assert kinds == [0, 248044, 0, 27, 6, 243]
    original = json.loads(tokenizer)
    assert found["ggml.merges"] == [" ".join(pair) for pair in original["model"]["merges"]]
    assert {token: i for i, token in enumerate(found["ggml.tokens"][:248044])} == original["model"]["vocab"]
    added = {token["id"]: token["content"] for token in original["added_tokens"]}
    assert found["ggml.tokens"][248044:248077] == [added[i] for i in range(248044, 248077)]
    assert (found["ggml.eos_token_id"], found["ggml.padding_token_id"]) == (248046, 248044)
    assert "ggml.bos_token_id" not in found
    assert found["chat_template"] == template.decode()


def test_a_beginning_that_config_json_names(tmp_path: Path) -> None:
    """As in Qwen3.6; tokenizer_config.json says null."""
    write_companions(tmp_path, 270)
    for config in ({"bos_token_id": 258}, {"bos_token_id": None, "text_config": {"bos_token_id": 258}}):
        assert vocabulary(reading(tmp_path), 270, config, "")["tokenizer.ggml.bos_token_id"].value == 258


def changed(tmp_path: Path, name: str, change: Any) -> Path:
    write_companions(tmp_path, 270)
    if change is None:
        (tmp_path / name).unlink()
        return tmp_path
    value = json.loads((tmp_path / name).read_text(encoding="utf-8"))
    change(value)
    (tmp_path / name).write_text(json.dumps(value), encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(("change", "message"), [
    (None, "has no tokenizer.json"),
    (lambda t: t["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=SPLITTING[:-5]), "splits a text by"),
    (lambda t: t["pre_tokenizer"]["pretokenizers"].pop(1), "no byte-level BPE"),
    (lambda t: t["model"].update(type="Unigram"), "no byte-level BPE"),
    (lambda t: t["added_tokens"].append({"id": 270, "content": "<more>", "special": True}), "goes up to id 270"),
    (lambda t: t["model"].pop("merges"), "is damaged"),
], ids=["none", "split", "bytes", "unigram", "more", "merges"])  # fmt: skip
def test_tokenizers_that_llama_cpp_does_not_know(tmp_path: Path, change: Any, message: str) -> None:
    folder = changed(tmp_path, "tokenizer.json", change)
    with pytest.raises(CheckpointError, match=message):
        vocabulary(reading(folder), 270, {}, "here")


def test_the_template_of_tokenizer_config_where_there_is_no_file(tmp_path: Path) -> None:
    folder = changed(tmp_path, "chat_template.jinja", None)
    assert vocabulary(reading(folder), 270, {}, "")["tokenizer.chat_template"].value == "{{ 'not the file' }}"
    several = [{"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}]
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"chat_template": several}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert vocabulary(reading(folder), 270, {}, "")["tokenizer.chat_template"].value == "b"
