"""Files cut short and with bits flipped: a CheckpointError that names the file, or a tokenizer that works."""

import random

import pytest

from mlx_qwen35.errors import CheckpointError, PromptError
from mlx_qwen35.text.template import ChatTemplate
from mlx_qwen35.text.tokenizer import Detokenizer, Tokenizer
from tests.text import folders

ROUNDS = 100
FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
TEXT = "hello, <|im_start|>the\n\n 日本 déjà 12 <think>"

pytestmark = pytest.mark.filterwarnings("ignore:invalid escape sequence:DeprecationWarning")  # in a flipped template


@pytest.fixture
def folder(tmp_path):
    return folders.write_text_files(tmp_path)


def use(folder):
    """What every session does with the files; True if they still load."""
    try:
        tokenizer, template = Tokenizer.from_folder(folder), ChatTemplate.from_folder(folder)
    except CheckpointError as error:
        assert any(name in str(error) for name in FILES) or str(folder) in str(error)
        return False
    try:
        ids = tokenizer.encode(TEXT)
    except CheckpointError:
        return False
    assert all(0 <= token < tokenizer.vocab_size for token in ids)
    stream = Detokenizer(tokenizer)
    assert "".join([*map(stream.add, ids), stream.finish()]) == tokenizer.decode(ids)
    try:
        assert isinstance(template.render([{"role": "user", "content": "x"}], tools=[{"name": "f"}]), str)
    except PromptError:
        pass  # a flip inside the branch for tools, which the load does not try
    return True


@pytest.mark.parametrize("name", FILES)
def test_cut_short(folder, name):
    whole = (folder / name).read_bytes()
    draw = random.Random(name)
    for length in [0, 1, len(whole) - 1, *(draw.randrange(len(whole)) for _ in range(ROUNDS))]:
        (folder / name).write_bytes(whole[:length])
        assert not use(folder) or name == "chat_template.jinja"


@pytest.mark.parametrize("name", FILES)
def test_bits_flipped(folder, name):
    whole = (folder / name).read_bytes()
    draw = random.Random(name)
    loaded = 0
    for _ in range(ROUNDS):
        damaged = bytearray(whole)
        for _ in range(draw.choice([1, 1, 1, 2, 8])):
            damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        (folder / name).write_bytes(damaged)
        loaded += use(folder)
    assert 0 < loaded < ROUNDS, "either nothing loads any more, or nothing is noticed"


@pytest.mark.parametrize("name", FILES)
def test_pieces_removed_and_doubled(folder, name):
    whole = (folder / name).read_bytes()
    draw = random.Random(name)
    for _ in range(ROUNDS // 2):
        a, b = sorted(draw.randrange(len(whole)) for _ in range(2))
        b = min(b, a + draw.choice([1, 4, 40, 400]))
        (folder / name).write_bytes(whole[:a] + whole[a:b] * draw.choice([0, 2]) + whole[b:])
        use(folder)


def test_a_panic_in_the_library_is_a_checkpoint_error(folder, monkeypatch):
    class PanicException(BaseException):
        pass

    def panic(text):
        raise PanicException("index out of bounds")

    monkeypatch.setattr("tokenizers.Tokenizer.from_str", panic)
    with pytest.raises(CheckpointError, match="index out of bounds"):
        Tokenizer.from_folder(folder)
