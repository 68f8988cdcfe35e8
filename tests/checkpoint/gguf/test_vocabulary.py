"""The tokenizer that a GGUF's metadata makes, against the tokenizer.json that the metadata was made of."""

import gzip
import json
import random

import pytest
import tokenizers

from mlx_qwen35.checkpoint.gguf.container import read_gguf
from mlx_qwen35.checkpoint.gguf.metadata import generation_of
from mlx_qwen35.checkpoint.gguf.vocabulary import Vocabulary
from mlx_qwen35.errors import CheckpointError
from tests.checkpoint.gguf.building import SEEING, GGUFWriter, finish, tiny_tokenizer, vocabulary_of
from tests.soak import examples

SIZE = 248_320


def written(path, tokenizer, size, more=None, **kwargs) -> Vocabulary:
    writer = GGUFWriter(path, "qwen35")
    vocabulary_of(writer, tokenizer, size, **kwargs)
    if more:
        more(writer)
    finish(writer)
    return Vocabulary(read_gguf(path))


@pytest.fixture(scope="module")
def family(shared_dir_module) -> dict:
    packed = (shared_dir_module / "model_data/qwen35_tokenizer_reconstructed.json.gz").read_bytes()
    return json.loads(gzip.decompress(packed))


@pytest.fixture(scope="module")
def shared_dir_module(request):
    from tests.conftest import CHECKOUT

    folder = CHECKOUT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("no folder 'shared' with the reference material beside the checkout")
    return folder


@pytest.fixture(scope="module")
def pair(family, tmp_path_factory) -> tuple[tokenizers.Tokenizer, tokenizers.Tokenizer, Vocabulary]:
    """(the original, the one that was made of the metadata, what made it)."""
    words = written(tmp_path_factory.mktemp("family") / "v.gguf", family, SIZE, template=None)
    made = tokenizers.Tokenizer.from_str(words.tokenizer_json().decode())
    return tokenizers.Tokenizer.from_str(json.dumps(family)), made, words


def test_the_familys_vocabulary_comes_back(family, pair):
    _, _, words = pair
    made = json.loads(words.tokenizer_json())
    assert len(words.tokens) == SIZE
    assert made["model"]["vocab"] == family["model"]["vocab"] and len(made["model"]["vocab"]) == 248_044
    merges = [m.split(" ") if isinstance(m, str) else m for m in family["model"]["merges"]]
    assert made["model"]["merges"] == merges and len(merges) == 247_587
    assert made["added_tokens"] == family["added_tokens"] and len(made["added_tokens"]) == 33
    assert words.named["<|im_end|>"] == 248_046 and words.named["<|image_pad|>"] == 248_056
    assert generation_of(words.gguf, words.named)["eos_token_id"] == [248_046, 248_044]


@pytest.mark.parametrize("text", ["small", "mixed", "utf8"])
def test_ids_of_texts_are_the_originals(shared_dir_module, pair, text):
    theirs, made, _ = pair
    place = shared_dir_module / "model_data/kitoken"
    words = (place / f"{text}_input.txt").read_text(encoding="utf-8")
    ids = made.encode(words, add_special_tokens=False).ids
    assert ids == theirs.encode(words, add_special_tokens=False).ids
    assert len(ids) == {"small": 3_328, "mixed": 23_287, "utf8": 5_991}[text]


def test_ids_of_random_characters_are_the_originals(pair):
    """A million of them, and in every run a fifth of that."""
    theirs, made, _ = pair
    rng = random.Random(3)
    ranges = [(0x20, 0x7F), (0x20, 0x7F), (0xA0, 0x24F), (0x300, 0x370), (0x3040, 0x30FF), (0x4E00, 0x9FFF),
              (0x1F300, 0x1FAFF), (0x9, 0xE), (0x600, 0x6FF), (0x2000, 0x206F)]  # fmt: skip
    letters = [chr(rng.randrange(*chosen)) for chosen in ranges for _ in range(400)] + [" "] * 600
    texts = ["".join(rng.choices(letters, k=1_000)) for _ in range(examples(999, 5))]
    texts.append("<|im_start|><think>e\u0301\u1100\u1161<|fim_pad|> <tool_call>" * 20)
    ids = [encoding.ids for encoding in made.encode_batch(texts, add_special_tokens=False)]
    assert ids == [encoding.ids for encoding in theirs.encode_batch(texts, add_special_tokens=False)]
    skipped = [made.decode(each) for each in ids[-3:]]
    assert skipped == [theirs.decode(each) for each in ids[-3:]]


def test_a_small_tokenizer_and_its_companions(tmp_path):
    plain = tiny_tokenizer()
    words = written(tmp_path / "v.gguf", plain, 290)
    made = json.loads(words.tokenizer_json())
    for key in ("added_tokens", "normalizer"):
        assert made[key] == plain[key], key
    assert made["model"]["vocab"] == plain["model"]["vocab"]
    assert words.template() == SEEING
    assert words.tokenizer_config()["eos_token"] == "<|im_end|>"


def test_sampling_is_that_of_the_file(tmp_path):
    def more(writer):
        writer.add_float32("general.sampling.temp", 0.6)
        writer.add_int32("general.sampling.top_k", 20)
        writer.add_float32("general.sampling.top_p", 0.95)

    words = written(tmp_path / "v.gguf", tiny_tokenizer(), 290, more)
    found = generation_of(words.gguf, words.named)
    assert {key: found[key] for key in ("temperature", "top_k", "top_p", "do_sample")} == {
        "temperature": 0.6, "top_k": 20, "top_p": 0.95, "do_sample": True,
    }  # fmt: skip


def test_other_tokenizers_are_refused(tmp_path):
    writer = GGUFWriter(tmp_path / "a.gguf", "qwen35")
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    finish(writer)
    with pytest.raises(CheckpointError, match="'llama' with the rule 'default'"):
        Vocabulary(read_gguf(tmp_path / "a.gguf")).tokenizer_json()
    writer = GGUFWriter(tmp_path / "b.gguf", "qwen35")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen35")
    finish(writer)
    with pytest.raises(CheckpointError, match="tokenizer.ggml.tokens is missing"):
        Vocabulary(read_gguf(tmp_path / "b.gguf")).tokenizer_json()
