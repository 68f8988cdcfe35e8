"""LM Studio's own interface: what is asked, the events of a stream in their order, chats that go on, and the lists."""

from __future__ import annotations

import asyncio
import json
import math
from typing import Any

import pytest

from mlx_qwen35.serving.apis.lmstudio import LMStudioChat
from mlx_qwen35.serving.exchange import Alive
from mlx_qwen35.serving.lmstudio_lists import questions
from mlx_qwen35.serving.refusal import Refusal
from tests.serving.fake import ID, Fake, answered, calls, ends, events, read, says, streamed, thinks
from tests.serving.shelf import Shelf

HELLO = {"model": "demo", "input": "Hello"}
PICTURE = "data:image/png;base64,iVBORw0KGgo="


def ask(method: str, path: str, body: dict[str, Any] | None = None, shelf: Shelf | None = None, **parts: str) -> Any:
    """The answer to a question of a catalogue, after a turn through JSON."""
    one = next(each for each in questions(shelf or Shelf()) if (each.method, each.path) == (method, path))
    return json.loads(json.dumps(asyncio.run(one.answer(body or {}, parts))))


def told(items: list[Any], body: dict[str, Any] | None = None, load: float = 0.0) -> list[tuple[str, dict[str, Any]]]:
    """The events of a stream; each has its name in it too."""
    api, played = LMStudioChat(), Fake(items)
    played.load_seconds = load
    found = events(streamed(api, read(api, body or {**HELLO, "stream": True}), played))
    assert all(name == data["type"] for name, data in found)
    return found


def test_a_question_becomes_a_prompt() -> None:
    body = {
        **HELLO, "system_prompt": "Be brief.", "temperature": 0, "top_p": 0.9, "top_k": 20, "min_p": 0.1,
        "repeat_penalty": 1.1, "max_output_tokens": 50, "reasoning": "off", "context_length": 8000, "ttl": 60,
        "draft_model": "x",
    }  # fmt: skip
    asked = read(LMStudioChat(), body)
    assert asked.prompt == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    assert asked.options == {"max_tokens": 50, "enable_thinking": False} and asked.ttl == 60 and not asked.stream
    assert asked.sampling == {"temperature": 0, "top_p": 0.9, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.1}
    assert asked.unread == ["draft_model"]
    assert read(LMStudioChat(), {**HELLO, "reasoning": "low"}).options == {"reasoning_effort": "low"}
    assert read(LMStudioChat(), {**HELLO, "reasoning": None}).options == {}


def test_pictures_come_as_data_and_in_no_other_way() -> None:
    asked = read(
        LMStudioChat(), {"input": [{"type": "text", "content": "Look"}, {"type": "image", "data_url": PICTURE}]}
    )
    assert asked.prompt[0]["content"] == [
        {"type": "text", "text": "Look"},
        {"type": "image_url", "image_url": {"url": PICTURE}},
    ]
    for url in ("/etc/passwd", "http://a/b.png", "file:///etc/passwd", ""):
        with pytest.raises(Refusal, match="data_url"):
            read(LMStudioChat(), {"input": [{"type": "image", "data_url": url}]})


def test_an_answer_has_items_and_stats() -> None:
    api = LMStudioChat()
    made = answered(api, read(api, HELLO), Fake([thinks("Hm."), says("Yes"), ends()]))
    assert made == {
        "model_instance_id": "demo",
        "output": [{"type": "reasoning", "content": "Hm."}, {"type": "message", "content": "Yes"}],
        "stats": {
            "input_tokens": 11,
            "total_output_tokens": 3,
            "reasoning_output_tokens": 1,
            "tokens_per_second": 6.0,
            "time_to_first_token_seconds": 0.25,
        },
        "response_id": f"resp_{ID}",
    }


def test_events_come_in_their_order() -> None:
    found = told([Alive(loading=0.5), Alive(3, 9), thinks("Hm"), thinks("."), says("Yes"), says("!"), ends()], load=1.5)
    assert [name for name, _ in found] == [
        "chat.start", "model_load.start", "model_load.progress", "model_load.end", "prompt_processing.start",
        "prompt_processing.progress", "prompt_processing.end", "reasoning.start", "reasoning.delta", "reasoning.delta",
        "reasoning.end", "message.start", "message.delta", "message.delta", "message.end", "chat.end",
    ]  # fmt: skip
    by_name = dict(found)
    assert by_name["model_load.progress"]["progress"] == 0.5 and by_name["model_load.end"]["load_time_seconds"] == 1.5
    assert by_name["prompt_processing.progress"]["progress"] == pytest.approx(1 / 3)
    result = by_name["chat.end"]["result"]
    assert result["output"] == [{"type": "reasoning", "content": "Hm."}, {"type": "message", "content": "Yes!"}]
    assert result["stats"]["model_load_time_seconds"] == 1.5 and result["response_id"] == f"resp_{ID}"


def test_a_load_that_nobody_waited_for_is_told_too() -> None:
    names = [name for name, _ in told([says("Yes"), ends()], load=0.1)]
    assert names[:5] == [
        "chat.start",
        "model_load.start",
        "model_load.end",
        "prompt_processing.start",
        "prompt_processing.end",
    ]
    assert "model_load.start" not in [name for name, _ in told([says("Yes"), ends()])]


def test_an_answer_that_pauses_goes_on_in_the_text_that_is_open() -> None:
    found = told([says("Yes"), Alive(9, 9), says("!"), ends()])
    assert [data["content"] for name, data in found if name == "message.delta"] == ["Yes", "", "!"]
    assert [name for name, _ in found].count("message.start") == 1


def test_a_call_of_a_tool_that_nobody_gave_is_told_as_none() -> None:
    found = told([calls("look", {"at": 1}), ends()])
    assert ("tool_call.failure", {
        "type": "tool_call.failure",
        "reason": "there is no tool of the name look",
        "metadata": {"type": "invalid_name", "tool_name": "look", "arguments": {"at": 1}},
    }) in found  # fmt: skip
    assert [each["type"] for each in found[-1][1]["result"]["output"]] == ["invalid_tool_call"]


def test_an_error_is_told_and_then_what_there_is_of_the_answer() -> None:
    found = told([says("Ye"), Refusal("unavailable", "the server is closing: ask again")])
    assert [name for name, _ in found[-3:]] == ["message.end", "error", "chat.end"]
    assert found[-2][1]["error"] == {"type": "unknown", "message": "the server is closing: ask again"}
    assert found[-1][1]["result"]["output"] == [{"type": "message", "content": "Ye"}]
    assert "response_id" not in found[-1][1]["result"]
    assert LMStudioChat().refused(Refusal("not_found", "no", "model")) == {
        "error": {"type": "model_not_found", "message": "no", "param": "model"}
    }


def chat(api: LMStudioChat, name: str, body: dict[str, Any], says_what: str) -> tuple[list[Any], str | None]:
    """One turn -> the prompt as it was asked, the id of the response."""
    asked = read(api, {**HELLO, **body})
    played = Fake([thinks("Hm."), says(says_what), ends()])
    played.id = name
    made = answered(api, asked, played)
    return list(asked.prompt), made.get("response_id")


def test_a_chat_goes_on_from_any_response_of_it() -> None:
    api = LMStudioChat()
    _, first = chat(api, "a", {"system_prompt": "S", "input": "1"}, "one")
    prompt, second = chat(api, "b", {"input": "2", "previous_response_id": first}, "two")
    said = {"role": "assistant", "content": "one", "reasoning_content": "Hm."}
    begun = [{"role": "system", "content": "S"}, {"role": "user", "content": "1"}, said]
    assert prompt == [*begun, {"role": "user", "content": "2"}]
    branch, _ = chat(api, "c", {"input": "other", "previous_response_id": first}, "x")
    assert branch == [*begun, {"role": "user", "content": "other"}]
    third, _ = chat(api, "d", {"input": "3", "previous_response_id": second, "system_prompt": "T"}, "three")
    assert [each["content"] for each in third] == ["T", "1", "one", "2", "two", "3"]


def test_what_is_not_stored_or_not_kept_any_more_is_refused() -> None:
    api = LMStudioChat(most=2)
    assert chat(api, "a", {"store": False}, "one")[1] is None
    for name in "abc":
        chat(api, name, {}, "one")
    chat(api, "d", {"previous_response_id": "resp_b"}, "x")  # b was used last: c goes before it
    for gone in ("resp_a", "resp_c", "resp_x"):
        with pytest.raises(Refusal, match="not kept"):
            read(api, {**HELLO, "previous_response_id": gone})
    assert len(read(api, {**HELLO, "previous_response_id": "resp_d"}).prompt) == 5
    assert chat(LMStudioChat(most_bytes=300), "a", {"input": "x" * 400}, "one")[1] is None


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({}, "input"), ({"input": []}, "input"), ({"input": 3}, "input"), ({"input": [3]}, r"input\[0\]"),
        ({"input": [{"type": "video"}]}, "type"), ({"input": [{"type": "text"}]}, "content"),
        ({**HELLO, "reasoning": "much"}, "reasoning"), ({**HELLO, "integrations": ["mcp/x"]}, "integrations"),
        ({**HELLO, "previous_response_id": 3}, "previous_response_id"), ({**HELLO, "temperature": -1}, "temperature"),
        ({**HELLO, "max_output_tokens": 1.5}, "max_output_tokens"), ({**HELLO, "store": "yes"}, "store"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_is_refused_by_name(body: dict[str, Any], word: str) -> None:
    with pytest.raises(Refusal, match=word):
        read(LMStudioChat(), body)


def test_models_are_listed_with_what_is_loaded() -> None:
    shelf = Shelf()
    first, second = ask("GET", "/api/v1/models", shelf=shelf)["models"]
    assert (
        first["key"] == "org/Qwen3.5-35B-A3B-4bit" and first["publisher"] == "org" and first["params_string"] == "35.1B"
    )
    assert first["quantization"] == {"name": "4bit", "bits_per_weight": 4.5} and first["architecture"] == "qwen3_5_moe"
    assert first["capabilities"]["vision"] and not second["capabilities"]["vision"] and not first["loaded_instances"]
    loaded = ask(
        "POST", "/api/v1/models/load", {"model": first["key"], "context_length": 4096, "echo_load_config": True}, shelf
    )
    assert loaded.pop("load_time_seconds") >= 0
    assert loaded == {
        "type": "llm",
        "instance_id": first["key"],
        "status": "loaded",
        "load_config": {"context_length": 4096, "parallel": 8},
    }
    assert shelf.asked == [("load", first["key"], math.inf, 4096)]
    (instance,) = ask("GET", "/api/v1/models", shelf=shelf)["models"][0]["loaded_instances"]
    assert ask("POST", "/api/v1/models/unload", {"instance_id": instance["id"]}, shelf) == {"instance_id": first["key"]}
    assert shelf.asked[-1] == ("unload", first["key"])


def test_the_older_lists_have_states() -> None:
    shelf = Shelf()
    asyncio.run(shelf.load("org/Qwen3.5-2B-4bit"))
    first, second = ask("GET", "/api/v0/models", shelf=shelf)["data"]
    assert (first["type"], first["state"]) == ("vlm", "not-loaded") and "loaded_context_length" not in first
    assert (second["type"], second["state"], second["loaded_context_length"]) == ("llm", "loaded", 262_144)
    assert ask("GET", "/api/v0/models/{name:path}", shelf=shelf, name="org/Qwen3.5-2B-4bit") == second
    with pytest.raises(Refusal) as caught:
        ask("GET", "/api/v0/models/{name:path}", name="other")
    assert caught.value.status == 404


def test_downloads_are_for_the_command_line() -> None:
    with pytest.raises(Refusal, match="mlx-qwen35 generate --model") as caught:
        ask("POST", "/api/v1/models/download", {"model": "x"})
    assert caught.value.status == 400
