"""Damaged GGUFs of whole models: metadata, names, shapes and offsets that say something else. Errors with a name, or a
model; never anything else."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from gguf import GGUFWriter

from mlx_qwen35.checkpoint.contents import read_config
from mlx_qwen35.checkpoint.gguf.opened import _kept, open_model
from mlx_qwen35.checkpoint.source import open_source
from mlx_qwen35.errors import CheckpointError
from tests.checkpoint.gguf.building import matrices, tiny_tokenizer, write_gguf
from tests.checkpoints import random_tensors, tiny_config
from tests.soak import examples


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(a model of experts with its head and tokenizer as bytes, where its header ends)."""
    path = tmp_path_factory.mktemp("whole") / "a.gguf"
    config = tiny_config("moe", mtp_num_hidden_layers=1, vocab_size=290)
    write_gguf(path, config, random_tensors(config), lambda name: "F32", tokenizer=tiny_tokenizer())
    data = path.read_bytes()
    return data, min(tensor.offset for tensor in open_model(path).gguf.tensors.values())


@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=examples(250), deadline=None)
def test_any_damage_of_the_header_is_named_or_harmless(whole, tmp_path_factory, data):
    original, header = whole
    made = bytearray(original)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(8, header - 9))
        kind = data.draw(st.sampled_from(["byte", "u32", "u64", "swap"]))
        if kind == "byte":
            made[at] = data.draw(st.integers(0, 255))
        elif kind == "swap":
            to = data.draw(st.integers(8, header - 9))
            made[at : at + 8], made[to : to + 8] = made[to : to + 8], made[at : at + 8]
        else:
            size = 4 if kind == "u32" else 8
            odd = st.sampled_from([0, 1, 3, 1 << 20, (1 << 31) - 1, (1 << 63) + 5])
            value = data.draw(odd | st.integers(0, 1 << 33))
            made[at : at + size] = (value % (1 << 8 * size)).to_bytes(size, "little")
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    path.write_bytes(made)
    _kept.cache_clear()
    try:
        source = open_source(path)
        open_model(path).companions()
    except CheckpointError as error:
        assert "damaged.gguf" in str(error)
    else:
        assert source.parts


@pytest.mark.parametrize(
    "key, value",
    [
        ("block_count", 0), ("block_count", 1 << 31), ("embedding_length", 7), ("attention.head_count", 5),
        ("attention.key_length", 0), ("ssm.time_step_rank", 0), ("ssm.inner_size", 71), ("rope.dimension_count", 3),
        ("expert_used_count", 99), ("context_length", 0), ("ssm.group_count", 4),
    ],
)  # fmt: skip
def test_sizes_that_cannot_be(tmp_path, key, value):
    config = tiny_config("moe", vocab_size=290)

    def more(writer: GGUFWriter) -> None:
        writer.kv_data[0][f"qwen35moe.{key}"].value = value

    write_gguf(tmp_path / "a.gguf", config, random_tensors(config), lambda name: "F32", more=more)
    with pytest.raises(CheckpointError, match="a.gguf"):
        open_source(tmp_path / "a.gguf")


def test_keys_of_another_kind(tmp_path):
    config = tiny_config("dense", vocab_size=290)
    for key, value in (("embedding_length", "64"), ("rope.freq_base", "x"), ("rope.dimension_sections", 3)):

        def more(writer, key=key, value=value):
            del writer.kv_data[0][f"qwen35.{key}"]
            (writer.add_string if isinstance(value, str) else writer.add_uint32)(f"qwen35.{key}", value)

        write_gguf(tmp_path / "a.gguf", config, random_tensors(config), lambda name: "F32", more=more)
        _kept.cache_clear()
        with pytest.raises(CheckpointError, match=f"a.gguf: qwen35.{key}"):
            read_config(tmp_path / "a.gguf")


def test_a_tensor_that_is_missing_or_of_another_shape(tmp_path):
    config = tiny_config("dense", vocab_size=290)
    tensors = random_tensors(config)
    write_gguf(
        tmp_path / "a.gguf", config,
        {name: value for name, value in tensors.items() if "layers.1.mlp.up_proj" not in name}, lambda name: "F32",
    )  # fmt: skip
    with pytest.raises(CheckpointError, match="layers.1.mlp.up_proj.weight is in none of the files"):
        open_source(tmp_path / "a.gguf")
    odd = {**tensors, "model.language_model.layers.1.mlp.up_proj.weight": np.zeros((64, 64), np.float32)}
    write_gguf(tmp_path / "b.gguf", config, odd, lambda name: "F32")
    with pytest.raises(CheckpointError, match=r"blk.1.ffn_up.weight in b.gguf has shape \[64, 64\] as layers.1"):
        open_source(tmp_path / "b.gguf")
    rule = {"more": lambda writer: writer.add_string("tokenizer.ggml.pre", "x")}
    write_gguf(tmp_path / "c.gguf", config, tensors, matrices("F16"), **rule)
    with pytest.raises(CheckpointError, match="c.gguf.*rule 'x'"):
        open_model(tmp_path / "c.gguf").companions()
