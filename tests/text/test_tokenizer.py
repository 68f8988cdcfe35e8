"""The tokenizer of a checkpoint: ids, bytes, streams, and files that are wrong."""

import hypothesis
import hypothesis.strategies as st
import pytest

from mlx_qwen35.errors import CheckpointError, PromptError
from mlx_qwen35.text.tokenizer import Detokenizer, Tokenizer
from tests.text import folders


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return Tokenizer.from_folder(folders.write_text_files(tmp_path_factory.mktemp("tokenizer")))


def test_text_to_ids_and_back(tokenizer):
    assert tokenizer.encode("hello the") == [tokenizer.token_id("hello"), tokenizer.token_id("Ġthe")]
    assert tokenizer.decode(tokenizer.encode("héllo\n\n日本 12")) == "héllo\n\n日本 12"
    assert tokenizer.encode("") == [] and tokenizer.decode([]) == ""


def test_text_is_composed_before_it_is_cut(tokenizer):
    assert tokenizer.encode("e\u0301") == tokenizer.encode("\u00e9")


def test_added_tokens_are_one_id_each(tokenizer):
    for token in folders.SPECIAL + folders.PLAIN + folders.LATE:
        assert tokenizer.encode(f"a{token}b")[1:-1] == [tokenizer.token_id(token)]
    assert tokenizer.token_id("<|none|>") is None


def test_special_tokens_can_be_left_out(tokenizer):
    ids = tokenizer.encode("<|im_start|>hello<think><|audio_end|>")
    assert tokenizer.decode(ids) == "<|im_start|>hello<think><|audio_end|>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hello<think>"


def test_the_tokens_of_tokenizer_config_are_added(tokenizer):
    late = [tokenizer.token_id(token) for token in folders.LATE]
    assert late == [tokenizer.vocab_size - 2, tokenizer.vocab_size - 1]


def test_eos_is_the_tokenizers_own_and_the_end_of_a_turn(tmp_path):
    config = folders.tokenizer_config(folders.tokenizer_json()) | {"eos_token": {"content": "<|endoftext|>"}}
    tokenizer = Tokenizer.from_folder(folders.write_text_files(tmp_path, tokenizer_config=config))
    assert tokenizer.eos_token_ids == {tokenizer.token_id("<|endoftext|>"), tokenizer.token_id("<|im_end|>")}


def test_a_folder_without_tokenizer_config_works(tmp_path):
    tokenizer = Tokenizer.from_folder(folders.write_text_files(tmp_path, tokenizer_config=None))
    assert tokenizer.eos_token_ids == {tokenizer.token_id("<|im_end|>")}
    assert tokenizer.token_id(folders.LATE[0]) is None


def test_saved_truncation_and_padding_are_switched_off(tmp_path):
    json = folders.tokenizer_json()
    json["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    json["padding"] = {
        "strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "!",
    }  # fmt: skip
    tokenizer = Tokenizer.from_folder(folders.write_text_files(tmp_path, tokenizer=json))
    assert len(tokenizer.encode("abcdefghijkl")) == 12 and len(tokenizer.encode("a")) == 1


def test_a_lone_surrogate_is_a_prompt_error(tokenizer):
    with pytest.raises(PromptError, match="character 1"):
        tokenizer.encode("a\ud800")


# Streams


@hypothesis.given(st.text())
def test_streamed_text_is_whole_characters(tokenizer, text):
    text = tokenizer.decode(tokenizer.encode(text))
    stream = Detokenizer(tokenizer)
    pieces = [stream.add(token) for token in tokenizer.encode(text)]
    assert "".join(pieces) == text and stream.finish() == ""
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


@hypothesis.given(st.data(), st.booleans())
def test_any_ids_stream_as_they_decode(tokenizer, data, skip):
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 5)))
    stream = Detokenizer(tokenizer, skip_special_tokens=skip)
    streamed = "".join([*map(stream.add, ids), stream.finish()])
    assert streamed == tokenizer.decode(ids, skip_special_tokens=skip)


def test_a_character_is_shown_with_its_last_byte(tokenizer):
    stream = Detokenizer(tokenizer)
    assert [stream.add(token) for token in tokenizer.encode("😀")] == ["", "", "", "😀"]


def test_an_added_token_outside_the_byte_alphabet_streams_as_it_decodes(tmp_path):
    json = folders.tokenizer_json()
    last = json["added_tokens"][-1]
    names = ["<日本>", "<é>", "Ġ<x>"]
    json["added_tokens"] += [last | {"id": last["id"] + 1 + i, "content": name} for i, name in enumerate(names)]
    files = folders.write_text_files(tmp_path, tokenizer=json, tokenizer_config=None)
    tokenizer = Tokenizer.from_folder(files)
    stream = Detokenizer(tokenizer)
    ids = [token for name in names for token in tokenizer.encode(f"a{name}")]
    assert "".join([*map(stream.add, ids), stream.finish()]) == tokenizer.decode(ids)


# Files that are wrong


def refused(folder, match):
    with pytest.raises(CheckpointError, match=match) as caught:
        Tokenizer.from_folder(folder)
    assert str(folder) in str(caught.value)


def test_missing_and_unreadable_files(tmp_path):
    refused(tmp_path, r"tokenizer\.json is missing")
    (tmp_path / "tokenizer.json").write_bytes(b'{"a": "\xff"}')
    refused(tmp_path, "not UTF-8")
    (tmp_path / "tokenizer.json").write_text("[1]")
    refused(tmp_path, "list where an object belongs")
    (tmp_path / "tokenizer.json").write_text("[" * 100_000)
    refused(tmp_path, "not valid JSON")
    (tmp_path / "tokenizer.json").write_text("{}")
    refused(tmp_path, "no working tokenizer")
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.json").mkdir()
    refused(tmp_path, "cannot be read")


def test_added_ids_that_disagree(tmp_path):
    json = folders.tokenizer_json()
    json["added_tokens"][-1]["id"] += 3
    refused(folders.write_text_files(tmp_path, tokenizer=json), "</think>.*is declared with id")


def test_tokenizer_config_that_disagrees(tmp_path):
    config = folders.tokenizer_config(folders.tokenizer_json())
    added = config["added_tokens_decoder"]
    first, second = list(added)[:2]
    added[first], added[second] = added[second], added[first]
    refused(folders.write_text_files(tmp_path, tokenizer_config=config), "take both files from one checkpoint")


@pytest.mark.parametrize("added", [[], 5, {"x": {}}, {"3": 4}, {"280": {"content": 7}}, {"281": {"content": ""}}])
def test_tokenizer_config_with_a_damaged_table(tmp_path, added):
    refused(folders.write_text_files(tmp_path, tokenizer_config={"added_tokens_decoder": added}), "added_tokens_decode")


def test_an_eos_token_outside_the_vocabulary(tmp_path):
    refused(folders.write_text_files(tmp_path, tokenizer_config={"eos_token": "</s>"}), "eos_token '</s>'")


def test_a_byte_without_a_token(tmp_path):
    json = folders.tokenizer_json()
    json["model"]["vocab"] = {token: i for token, i in json["model"]["vocab"].items() if token != "z"}
    json["added_tokens"] = []
    refused(folders.write_text_files(tmp_path, tokenizer=json, tokenizer_config=None), r"first: 122")


def test_two_tokens_with_one_id(tmp_path):
    json = folders.tokenizer_json()
    json["model"]["vocab"]["a"] = json["model"]["vocab"]["b"]
    json["added_tokens"] = []
    refused(folders.write_text_files(tmp_path, tokenizer=json, tokenizer_config=None), "same id")


def test_another_kind_of_tokenizer(tmp_path):
    json = folders.tokenizer_json() | {"decoder": {"type": "Fuse"}}
    refused(folders.write_text_files(tmp_path, tokenizer=json), "not a byte-level BPE")


def test_a_tokenizer_that_changes_the_text(tmp_path):
    json = folders.tokenizer_json()
    json["normalizer"] = {"type": "Lowercase"}
    refused(folders.write_text_files(tmp_path, tokenizer=json), "does not give a text back")


PIECES = st.sampled_from(
    [
        *folders.SPECIAL,
        *folders.PLAIN,
        " ",
        "\n\n",
        "é",
        "e\u0301",
        "kite ",
        "  x = 1\n" * 40,
        "stone owl " * 60,
        "日本" * 150,
    ]
)


@hypothesis.given(st.lists(PIECES, max_size=12))
def test_what_lies_between_control_tokens_is_encoded_once_and_alike(tokenizer, pieces):
    text = "".join(pieces)
    expected = tokenizer._rust.encode(text, add_special_tokens=False).ids
    for _ in range(2):
        assert tokenizer.encode(text) == expected


def test_a_long_stretch_is_kept_and_the_oldest_goes(tokenizer, monkeypatch):
    made = Tokenizer(tokenizer._rust, eos_token_ids=frozenset(), vocab_size=tokenizer.vocab_size)
    monkeypatch.setattr("mlx_qwen35.text.tokenizer._KEPT", 2000)
    first, second, third = ("kite " * 200, "stone " * 150, "owl " * 40)
    asked = []
    ids = made._ids
    monkeypatch.setattr(made, "_ids", lambda text: asked.append(text) or ids(text))
    mark = "<|im_end|>"
    assert made.encode(first + mark + second + mark) == tokenizer.encode(first + mark + second + mark)
    assert [*made._kept] == [first, second]
    made.encode(first + mark + third)  # the third is short, and is not kept
    assert asked.count(first) == 1 and asked.count(third) == 0 and [*made._kept] == [second, first]
    made.encode("violin " * 100)
    assert [*made._kept] == [first, "violin " * 100] and made._kept_characters == 1700


def test_where_control_tokens_take_white_space_nothing_is_cut(tokenizer):
    import tokenizers

    rust = tokenizers.Tokenizer.from_str(tokenizer._rust.to_str())
    rust.add_special_tokens([tokenizers.AddedToken("<|greedy|>", lstrip=True, rstrip=True, special=True)])
    made = Tokenizer(rust, eos_token_ids=frozenset(), vocab_size=tokenizer.vocab_size)
    text = "kite " * 100 + " <|greedy|>  " + "owl " * 100
    assert made.encode(text) == rust.encode(text, add_special_tokens=False).ids and not made._kept
