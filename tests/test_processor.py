"""What a user asks becomes a prompt, or an error that says what to write instead."""

import json
from dataclasses import replace
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35.errors import CheckpointError, PromptError
from mlx_qwen35.processor import Processor
from tests.text import folders

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


def config(vocab_size=512, context=1000, eos=(5,)):
    """What the processor reads of a model's configuration."""
    text = SimpleNamespace(vocab_size=vocab_size, max_position_embeddings=context)
    return SimpleNamespace(text=text, vision=None, eos_token_ids=eos)


@pytest.fixture(scope="module")
def processor(tmp_path_factory) -> Processor:
    return Processor.from_folder(folders.write_text_files(tmp_path_factory.mktemp("processor")), config())


def user(content):
    return {"role": "user", "content": content}


def test_a_text_is_one_user_message(processor):
    prompt = processor.prompt("hello")
    assert prompt.text == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n<think>\n"
    assert prompt.tokens == processor.encode(prompt.text) and processor.decode(prompt.tokens) == prompt.text
    assert prompt == processor.prompt([user("hello")]) == processor.prompt([user([{"type": "text", "text": "hello"}])])


def test_system_thinking_and_tools(processor):
    prompt = processor.prompt("hello", system="Be brief.", enable_thinking=False)
    assert prompt.text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
    assert prompt.text.endswith("<think>\n\n</think>\n\n") and not prompt.thinking
    assert json.dumps(TOOL) in processor.prompt("hello", tools=[TOOL]).text
    assert processor.prompt("hello", enable_thinking=True).thinking


def test_ids_are_taken_as_they_are(processor):
    ids = processor.prompt("hello").tokens
    assert processor.prompt(ids) == processor.prompt(tuple(ids), tools=[TOOL], enable_thinking=False)
    assert processor.prompt(ids).tokens == ids and processor.prompt(ids).text is None
    assert processor.prompt(np.array(ids)) == processor.prompt(mx.array(ids)) == processor.prompt(ids)
    assert processor.prompt(ids).thinking
    assert not processor.prompt(processor.prompt("hello", enable_thinking=False).tokens).thinking
    assert not processor.prompt([1, 2, 3]).thinking
    assert not processor.prompt(processor.encode("<think>\n<|im_end|>\n<|im_start|>assistant\n")).thinking


def test_tool_calls_in_openai_form(processor):
    arguments = {"city": "Rome", "tags": ["a"], "deep": None}
    calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": json.dumps(arguments)}}]
    messages = [user("hello"), {"role": "assistant", "content": None, "tool_calls": calls},
                {"role": "tool", "tool_call_id": "1", "content": "sunny"}]  # fmt: skip
    before = json.dumps(messages)
    text = processor.prompt(messages).text
    assert '<parameter=city>\nRome\n</parameter>\n<parameter=tags>\n["a"]\n</parameter>\n' in text
    assert "<parameter=deep>\nNone\n</parameter>" in text and "sunny" in text
    assert json.dumps(messages) == before, "the caller's messages were changed"
    calls[0]["function"]["arguments"] = arguments
    assert processor.prompt(messages).text == text
    messages[1]["tool_calls"] = [calls[0]["function"]]
    assert processor.prompt(messages).text == text


def test_a_call_without_arguments(processor):
    for call in ({"name": "f"}, {"name": "f", "arguments": ""}, {"function": {"name": "f", "arguments": None}}):
        prompt = processor.prompt([user("x"), {"role": "assistant", "content": "", "tool_calls": [call]}])
        assert "<function=f>\n</function>" in prompt.text


def test_reasoning_has_two_names(processor):
    for name in ("reasoning", "reasoning_content"):
        text = processor.prompt([user("x"), {"role": "assistant", "content": "y", name: "why"}]).text
        assert "<think>\nwhy\n</think>\n\ny" in text


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ("", "empty"),
        ([], "empty"),
        (5, "not int"),
        (b"abc", "not bytes"),
        ({"role": "user"}, "not dict"),
        (["hello"], r"messages\[0\] is no message"),
        ([{"content": "x"}], r"messages\[0\] is no message"),
        ([{"role": "user", "content": 5}], r"messages\[0\]\.content is of type int"),
        ([{"role": "user", "content": {"a": 1}}], "json.dumps"),
        ([{"role": "robot", "content": "x"}], "Unexpected message role"),
        ([{"role": "user", "content": [5]}], r"messages\[0\]\.content\[0\] is no part"),
        ([{"role": "user", "content": [{"type": "text"}]}], "has no text"),
        ([{"role": "user", "content": [{"type": "image", "image": "a.png"}]}], "no vision tower"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "no vision tower"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"detail": "x"}}]}], "has no url"),
        ([{"role": "user", "content": [{"type": "image"}]}], r"1 image parts .* images= holds 0"),
        ([{"role": "user", "content": [{"type": "image", "image": "a", "url": "b"}]}], "give one"),
        ([{"role": "user", "content": [{"type": "video", "video": "a", "fps": 0}]}], "fps is 0"),
        ([{"role": "user", "content": [{"type": "audio", "audio": "a"}]}], "is of type 'audio'"),
        ([{"role": "user", "content": "a\ud800"}], "surrogate"),
        ([{"role": "assistant", "content": "", "tool_calls": {}}], r"tool_calls is of type dict"),
        ([{"role": "assistant", "content": "", "tool_calls": [5]}], r"tool_calls\[0\] is no call"),
        ([{"role": "assistant", "content": "", "tool_calls": [{"function": 5}]}], r"tool_calls\[0\] is no call"),
        ([{"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": "{a"}]}], "not valid JSON"),
        ([{"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": "[]"}]}], "are a list"),
        ([1, 512], r"prompt\[1\] is 512"),
        ([1, -1], r"prompt\[1\] is -1"),
        ([1, True], r"prompt\[1\] is True"),
        ([1, "a"], r"prompt\[1\] is 'a'"),
    ],
)
def test_what_is_no_prompt(processor, messages, match):
    with pytest.raises(PromptError, match=match):
        processor.prompt(messages)


@pytest.mark.parametrize("tools", [[5], [{}], [{"function": {"description": "x"}}], "f", [print]])
def test_what_is_no_tool(processor, tools):
    with pytest.raises(PromptError, match=r"tools\[0\] is no tool"):
        processor.prompt("hello", tools=tools)


def test_a_tool_that_is_not_json(processor):
    with pytest.raises(PromptError, match="not JSON serializable"):
        processor.prompt("hello", tools=[{"name": "f", "parameters": {"x": {1, 2}}}])


def test_system_given_twice(processor):
    with pytest.raises(PromptError, match="use one of the two"):
        processor.prompt([{"role": "system", "content": "a"}, user("x")], system="b")
    with pytest.raises(PromptError, match="token ids"):
        processor.prompt([1, 2], system="b")


def test_a_prompt_over_the_context(processor):
    small = replace(processor, context_length=10)
    with pytest.raises(PromptError, match=r"has \d+ tokens, the context 10"):
        small.prompt("a long text, longer than that")
    assert len(small.prompt([1] * 10).tokens) == 10
    with pytest.raises(PromptError):
        small.prompt([1] * 11)


# Files


def test_ends_come_from_every_file(tmp_path):
    folder = folders.write_text_files(tmp_path)
    end = Processor.from_folder(folder, config()).tokenizer.token_id("<|im_end|>")
    assert Processor.from_folder(folder, config(eos=(5,))).eos_token_ids == {5, end}
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 8], "temperature": 0.6}')
    processor = Processor.from_folder(folder, config(eos=()))
    assert processor.eos_token_ids == {7, 8, end} and processor.generation_config["temperature"] == 0.6
    (folder / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert Processor.from_folder(folder, config(eos=())).eos_token_ids == {7, end}


@pytest.mark.parametrize("text", ["{", "[]", '{"eos_token_id": "x"}', '{"eos_token_id": [true]}'])
def test_a_damaged_generation_config(tmp_path, text):
    folder = folders.write_text_files(tmp_path)
    (folder / "generation_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        Processor.from_folder(folder, config())


def test_a_tokenizer_larger_than_the_model(tmp_path):
    with pytest.raises(CheckpointError, match="embeddings up to 99"):
        Processor.from_folder(folders.write_text_files(tmp_path), config(vocab_size=100))


def test_no_end_of_text_anywhere(tmp_path):
    json = folders.tokenizer_json()
    json["added_tokens"] = []
    folders.write_text_files(tmp_path, tokenizer=json, tokenizer_config=None)
    with pytest.raises(CheckpointError, match="end-of-text"):
        Processor.from_folder(tmp_path, config(eos=()))


def test_context_length_may_be_chosen(tmp_path):
    folder = folders.write_text_files(tmp_path)
    assert Processor.from_folder(folder, config()).context_length == 1000
    assert Processor.from_folder(folder, config(), context_length=77).context_length == 77
