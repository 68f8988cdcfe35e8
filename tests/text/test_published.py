"""The published files: templates, tokenizer and encodings as users have them."""

import json
import unicodedata
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest

from mlx_qwen35.config import ModelConfig
from mlx_qwen35.processor import Processor
from mlx_qwen35.text.reply import parse_reply
from mlx_qwen35.text.template import ChatTemplate
from mlx_qwen35.text.tokenizer import Detokenizer
from tests.published import write_published_files

TEMPLATES = ("chat_template.jinja", "chat_template.0.8B-2B.jinja")
CASES = ("plain", "system_nothink", "history", "tools", "tool_turn", "image", "video")
ENCODINGS = {
    "Hola mundo": [65717, 27429],
    "C'est déjà l'été": [34, 16811, 44311, 324, 6, 37500],
    "日本語のテキスト": [247359, 15303, 210342],
    "emoji 😀 ok": [36280, 87209, 5226],
    "x=12345; y = 3.14159": [87, 28, 16, 17, 18, 19, 20, 26, 374, 283, 220, 18, 13, 16, 19, 16, 20, 24],
    "I'm here, they've gone, it's OK": [40, 2688, 1532, 11, 781, 2908, 7795, 11, 424, 579, 10092],
    "<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n<think>\n": [
        248045, 846, 198, 9419, 0, 248046, 198, 248045, 74455, 198, 248068, 198,
    ],
}  # fmt: skip


@pytest.fixture(scope="session")
def model_data(shared_dir) -> Path:
    return shared_dir / "model_data"


@pytest.fixture(scope="session")
def processor(model_data, tmp_path_factory) -> Processor:
    folder = write_published_files(model_data, tmp_path_factory.mktemp("published"))
    return Processor.from_folder(folder, ModelConfig.from_folder(folder))


@pytest.fixture(scope="session")
def render_cases(model_data):
    return json.loads((model_data / "hf/render_cases.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("file", TEMPLATES)
@pytest.mark.parametrize("name", CASES)
def test_rendered_prompts_and_ids(model_data, processor, render_cases, file, name):
    case = render_cases[f"{file}:{name}"]
    template = ChatTemplate((model_data / "hf" / file).read_text(encoding="utf-8"))
    assert template.render(**case["input"]) == case["prompt"]
    assert processor.encode(case["prompt"]) == case["ids"]


def test_every_render_case_is_tested(render_cases):
    assert set(render_cases) == {f"{file}:{name}" for file in TEMPLATES for name in CASES}


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("image", "video")])
def test_prompts(processor, render_cases, name):
    case = render_cases[f"chat_template.jinja:{name}"]
    given = dict(case["input"])
    prompt = processor.prompt(given.pop("messages"), **given)
    assert (prompt.text, prompt.tokens) == (case["prompt"], case["ids"])
    assert prompt.thinking == (name != "system_nothink")


def test_arguments_as_json_text_render_as_the_dict_does(processor, render_cases):
    case = render_cases["chat_template.jinja:tool_turn"]
    messages = json.loads(json.dumps(case["input"]["messages"]))
    function = messages[1]["tool_calls"][0]["function"]
    function["arguments"] = json.dumps(function["arguments"])
    messages[1]["reasoning"] = messages[1].pop("reasoning_content")
    assert processor.prompt(messages, tools=case["input"]["tools"]).tokens == case["ids"]


WORDS = st.sampled_from(["a < b", "\n", "\n\n", " ", "```\n  x\n```", "</b>", "日本", "12"])
TEXTS = st.lists(WORDS, max_size=4).map("".join)
VALUES = {
    "string": TEXTS,
    "integer": st.integers(),
    "boolean": st.booleans(),
    "array": st.lists(TEXTS),
    "null": st.none(),
}
TOOL = {"name": "f", "parameters": {"properties": {kind: {"type": kind} for kind in VALUES}}}


@hypothesis.given(TEXTS.map(str.strip), TEXTS.map(str.strip), st.lists(st.fixed_dictionaries({}, optional=VALUES)))
def test_a_turn_that_the_template_wrote_is_read_back(processor, reasoning, content, calls):
    question = {"role": "user", "content": "?"}
    answer = {"role": "assistant", "reasoning_content": reasoning, "content": content}
    answer["tool_calls"] = [{"function": {"name": "f", "arguments": arguments}} for arguments in calls]
    before = processor.template.render([question], tools=[TOOL])
    whole = processor.template.render([question, answer], tools=[TOOL], add_generation_prompt=False)
    assert whole.startswith(before)
    reply = parse_reply(whole[len(before) :].removesuffix("<|im_end|>\n"), thinking=True, tools=[TOOL])
    assert (reply.reasoning, reply.content) == (reasoning, content)
    assert [call.arguments for call in reply.tool_calls] == calls and reply.incomplete_call is None


@pytest.mark.parametrize("file", ["small", "mixed"])
def test_encodings_line_by_line(model_data, processor, file):
    """One text a line, in which \\n, \\r and \\s stand for a line end and a space at its end."""
    folder = model_data / "kitoken"
    texts = (folder / f"{file}_input.txt").read_text(encoding="utf-8").removesuffix("\n").split("\n")
    ids = (folder / f"{file}_tokens_qwen35.txt").read_text().removesuffix("\n").split("\n")
    for text, wanted in zip(texts, ids, strict=True):
        wanted = [int(token) for token in wanted.split(",")]
        assert processor.encode(text.replace("\\n", "\n").replace("\\r", "\r").replace("\\s", " ")) == wanted
        assert processor.encode(processor.decode(wanted)) == wanted


def test_encoding_of_a_whole_file_and_its_stream(model_data, processor):
    text = (model_data / "kitoken/utf8_input.txt").read_bytes().decode()
    ids = [int(token) for token in (model_data / "kitoken/utf8_tokens_qwen35.txt").read_text().split(",")]
    assert processor.encode(text) == ids
    stream = Detokenizer(processor.tokenizer)
    assert "".join(map(stream.add, ids)) == processor.decode(ids) == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize("text", ENCODINGS)
def test_sample_encodings(processor, text):
    assert processor.encode(text) == ENCODINGS[text]


def test_added_tokens_and_ends(processor):
    assert processor.tokenizer.vocab_size == 248_077
    assert processor.tokenizer.token_id("<|audio_pad|>") == 248_076
    assert processor.encode("<tts_pad>") == [248_072]
    assert processor.eos_token_ids == {248_044, 248_046}
    assert processor.generation_config["top_k"] == 20
