"""What OpenAI's interfaces have in common: the list of models, files in messages."""

import asyncio
import base64
from types import SimpleNamespace
from typing import Any

import pytest

from mlx_qwen35.serving import openai_words as words
from mlx_qwen35.serving.catalogue import Listed
from mlx_qwen35.serving.messages_given import file_text, given_messages
from mlx_qwen35.serving.refusal import STATUS, Refusal

STORED: Any = None
MODELS = [
    Listed("org/Qwen3.5-4B", STORED, state="loaded", since=12.7, context_length=4096),
    Listed("org/Qwen3.5-9B", STORED),
]


def asked(path: str, **placed: str) -> Any:
    [question] = [each for each in words.questions(SimpleNamespace(models=lambda: MODELS)) if each.path == path]
    assert question.method == "GET"
    return asyncio.run(question.answer({}, placed))


def test_the_list_of_models() -> None:
    made = asked("/v1/models")
    assert made["object"] == "list" and [one["id"] for one in made["data"]] == [one.name for one in MODELS]
    assert made["data"][0] == {
        "id": "org/Qwen3.5-4B", "object": "model", "created": 12, "owned_by": "local", "context_length": 4096,
        "max_model_len": 4096,
    }  # fmt: skip
    assert made["data"][1]["created"] == 0 and "context_length" not in made["data"][1]


def test_one_model() -> None:
    assert asked("/v1/models/{name:path}", name="org/Qwen3.5-9B")["id"] == "org/Qwen3.5-9B"
    with pytest.raises(Refusal) as error:
        asked("/v1/models/{name:path}", name="gpt-9")
    told = words.error(error.value)["error"]
    assert error.value.status == 404 and told["code"] == "model_not_found" and "org/Qwen3.5-4B" in told["message"]


@pytest.mark.parametrize("kind", STATUS)
def test_each_kind_of_error_has_its_words(kind: str) -> None:
    told = words.error(Refusal(kind, "No.", "field"))["error"]
    assert isinstance(told["type"], str) and told["message"] == "No." and told["param"] == "field"


def test_files_are_pictures_or_texts() -> None:
    sent = base64.b64encode("Grüße".encode()).decode()
    assert file_text("a.md", sent, "x")["text"] == '<file name="a.md">\nGrüße\n</file>'
    assert file_text(None, f"data:application/json;base64,{sent}", "x")["text"] == '<file name="file">\nGrüße\n</file>'
    assert file_text("a", "data:text/plain,Gr%C3%BC%C3%9Fe", "x")["text"] == '<file name="a">\nGrüße\n</file>'
    shown = f"data:image/png;base64,{sent}"
    assert file_text("a.png", shown, "x") == {"type": "image", "url": shown}
    assert file_text("a.png", sent, "x", "image/png") == {"type": "image", "url": shown}
    nothing = base64.b64encode(b"\xff\xfe").decode()
    for data, kind in ((sent, "application/pdf"), ("%%%", None), (nothing, None)):
        with pytest.raises(Refusal) as error:
            file_text("a.pdf", data, "messages[0].content[1]", kind)
        assert error.value.param == "messages[0].content[1]" and "a.pdf" in error.value.message


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ('{"a": 1}', {"a": 1}),
        ("", {}),
        ("{'a': True,}", {"a": True}),
        ("[1]", {"arguments": "[1]"}),
        ("{", {"arguments": "{"}),
    ],
)
def test_arguments_that_are_broken_go_on(written: str, read: dict[str, Any]) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": written}}
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [call]}]
    assert given_messages(messages)[1]["tool_calls"][0]["function"]["arguments"] == read
    older = {"role": "assistant", "function_call": call["function"]}
    assert given_messages([older])[0]["tool_calls"][0]["arguments"] == read
    assert call["function"]["arguments"] == written


def test_a_file_that_is_not_sent_along_is_refused() -> None:
    for part in ({"type": "file", "file": {"file_id": "file-1"}}, {"type": "input_file", "file_url": "https://x/y"}):
        with pytest.raises(Refusal, match="send the file along"):
            given_messages([{"role": "user", "content": [part]}])
