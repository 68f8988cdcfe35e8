"""Ollama's interface: what its clients send is read, and what they need is answered, by a model that plays."""

from __future__ import annotations

import asyncio
import json
import math
from typing import Any

import ollama
import pytest
from ollama import ChatResponse, GenerateResponse, ListResponse, ProcessResponse, ShowResponse

from mlx_qwen35.serving.apis.ollama import OllamaChat, OllamaGenerate
from mlx_qwen35.serving.exchange import Alive
from mlx_qwen35.serving.fields import Fields
from mlx_qwen35.serving.ollama_lists import questions
from mlx_qwen35.serving.refusal import Refusal
from tests.serving.fake import Fake, answered, calls, ends, lines, part, read, says, streamed, thinks
from tests.serving.shelf import Shelf

HELLO = {"model": "demo", "messages": [{"role": "user", "content": "Hello"}]}
PNG = "iVBORw0KGgo="


def ask(path: str, body: dict[str, Any] | None = None, shelf: Shelf | None = None) -> Any:
    """The answer to a question of a catalogue, after a turn through JSON."""
    one = next(each for each in questions(shelf or Shelf()) if each.path == path)
    return json.loads(json.dumps(asyncio.run(one.answer(body or {}, {}))))


def test_a_chat_streams_by_default_in_lines_that_the_client_reads() -> None:
    asked = read(OllamaChat(), HELLO)
    played = Fake([Alive(3, 9), thinks("Hm."), says("Yes"), says(" or no"), calls("look", {"at": [1]}), ends("stop")])
    told = lines(streamed(OllamaChat(), asked, played))
    assert asked.stream and asked.model == "demo"
    made = [ChatResponse.model_validate(line) for line in told]
    assert [line["done"] for line in told] == [False] * 5 + [True]
    assert "".join(each.message.content for each in made) == "Yes or no"
    assert "".join(each.message.thinking or "" for each in made) == "Hm."
    assert [dict(call.function.arguments) for each in made for call in each.message.tool_calls or ()] == [{"at": [1]}]
    assert all(each.message.role == "assistant" for each in made)
    assert made[0].message.content == "" and not made[0].done  # nothing came for a while, and a line says so
    end = made[-1]
    assert (end.done_reason, end.prompt_eval_count, end.eval_count) == ("stop", 11, 5)
    assert (end.prompt_eval_duration, end.eval_duration) == (250_000_000, 500_000_000)
    assert end.total_duration == 750_000_000 and end.load_duration == 0


def test_a_chat_without_a_stream_is_one_object() -> None:
    asked = read(OllamaChat(), {**HELLO, "stream": False})
    made = answered(OllamaChat(), asked, Fake([thinks("Hm."), says("Yes"), calls("look", {}), ends("length")]))
    assert not asked.stream
    assert made["message"] == {
        "role": "assistant",
        "content": "Yes",
        "thinking": "Hm.",
        "tool_calls": [{"function": {"index": 0, "name": "look", "arguments": {}}}],
    }
    assert (
        made["done"] is True and made["done_reason"] == "length" and made["created_at"] == "2025-11-24T16:00:00.000000Z"
    )


def test_generate_answers_with_response_and_thinking() -> None:
    asked = read(
        OllamaGenerate(), {"model": "demo", "prompt": "Hi", "system": "Be brief.", "template": "{{ .Prompt }}"}
    )
    told = [
        GenerateResponse.model_validate(line)
        for line in lines(streamed(OllamaGenerate(), asked, Fake([thinks("Hm."), says("Yes"), ends()])))
    ]
    assert asked.prompt == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert asked.unread == ["template"] and not asked.plain
    assert "".join(each.response for each in told) == "Yes" and told[0].thinking == "Hm."
    assert told[-1].done and told[-1].eval_count == 3


def test_raw_puts_no_template_around_a_prompt() -> None:
    asked = read(OllamaGenerate(), {"model": "demo", "prompt": "<|im_start|>user", "raw": True, "stream": False})
    assert asked.plain and asked.prompt == "<|im_start|>user"
    with pytest.raises(Refusal, match="no place for images"):
        read(OllamaGenerate(), {"model": "demo", "prompt": "x", "raw": True, "images": [PNG]})
    with pytest.raises(Refusal, match="fill in the middle"):
        read(OllamaGenerate(), {"model": "demo", "prompt": "x", "suffix": "y"})


def test_messages_keep_pictures_reasoning_calls_and_results() -> None:
    asked = read(
        OllamaChat(),
        {
            "model": "demo:latest",
            "messages": [
                {"role": "user", "content": "Look", "images": [PNG]},
                {
                    "role": "assistant",
                    "thinking": "Hm.",
                    "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}],
                },
                {"role": "tool", "tool_name": "f", "content": "3"},
            ],
            "tools": [{"type": "function", "function": {"name": "f"}}],
        },
    )
    assert asked.model == "demo"
    assert asked.prompt == [
        {"role": "user", "content": [{"type": "image", "base64": PNG}, {"type": "text", "text": "Look"}]},
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "Hm.",
            "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}],
        },
        {"role": "tool", "content": "3", "name": "f"},
    ]
    assert [tool["function"]["name"] for tool in asked.options["tools"]] == ["f"]


def test_options_become_sampling_and_limits() -> None:
    options = {
        "temperature": 0.5, "top_p": 0, "top_k": -1, "min_p": 0.1, "seed": 7, "stop": ["END", ""], "num_predict": 9,
        "num_ctx": 4096, "repeat_penalty": 1.1, "repeat_last_n": 64, "presence_penalty": 0.5, "mirostat": 1,
    }  # fmt: skip
    asked = read(OllamaChat(), {**HELLO, "options": options, "tools": []})
    assert asked.sampling == {
        "temperature": 0.5, "top_p": 1e-6, "top_k": 0, "min_p": 0.1, "seed": 7, "repetition_penalty": 1.1,
        "repetition_context_size": 64, "presence_penalty": 0.5,
    }  # fmt: skip
    assert asked.options == {"stop": ["END"], "max_tokens": 9}
    assert asked.unread == ["options.mirostat", "options.num_ctx"]
    unlimited = read(OllamaChat(), {**HELLO, "options": {"num_predict": -1, "seed": -1, "repeat_last_n": 0}})
    assert unlimited.options == {} and unlimited.sampling == {"repetition_penalty": 1.0}


@pytest.mark.parametrize(
    ("think", "options"),
    [
        (True, {"enable_thinking": True}),
        (False, {"enable_thinking": False}),
        ("low", {"reasoning_effort": "low"}),
        (None, {}),
    ],
)
def test_think_switches_reasoning(think: Any, options: dict[str, Any]) -> None:
    assert read(OllamaChat(), {**HELLO, "think": think}).options == options


def test_a_format_is_a_form_of_the_answer() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    assert read(OllamaChat(), {**HELLO, "format": "json"}).options["response_format"] == {"type": "json_object"}
    form = read(OllamaGenerate(), {"model": "demo", "prompt": "x", "format": schema}).options["response_format"]
    assert form == {"type": "json_schema", "json_schema": {"schema": schema}}
    assert read(OllamaChat(), {**HELLO, "format": ""}).options == {}


@pytest.mark.parametrize(
    ("given", "wanted"),
    [("5m", 300.0), ("1h30m", 5400.0), ("1.5s", 1.5), (90, 90.0), ("90", 90.0), (0, 0.0), ("0", 0.0), (-1, math.inf),
     ("-1m", math.inf), ("-1", math.inf), (None, None)],
)  # fmt: skip
def test_keep_alive_is_a_time(given: Any, wanted: float | None) -> None:
    assert read(OllamaChat(), {**HELLO, "keep_alive": given}).ttl == wanted


@pytest.mark.parametrize("given", ["soon", "5 minutes", True, [], "nan", "1h-5m"])
def test_other_times_are_refused(given: Any) -> None:
    with pytest.raises(Refusal, match="keep_alive"):
        read(OllamaChat(), {**HELLO, "keep_alive": given})


def test_an_empty_prompt_only_loads() -> None:
    for api, body in (
        (OllamaChat(), {"model": "demo"}),
        (OllamaChat(), {"messages": []}),
        (OllamaGenerate(), {"model": "demo"}),
    ):
        asked = read(api, body)
        assert asked.load_only and asked.stream
        (line,) = lines(streamed(api, asked, Fake([])))
        assert line["done"] is True and line["done_reason"] == "load"
        gone = read(api, {**body, "keep_alive": 0, "stream": False})
        assert answered(api, gone, Fake([]))["done_reason"] == "unload"


def test_log_probabilities_are_told_where_they_are_asked_for() -> None:
    asked = read(OllamaChat(), {**HELLO, "logprobs": True, "top_logprobs": 2})
    played = [
        says("Hi", token=5, logprob=-0.5, top=[(5, -0.5), (6, -math.inf)]),
        part(token=6, logprob=-1.0, finish="stop"),
    ]
    told = [
        ChatResponse.model_validate(line)
        for line in lines(streamed(OllamaChat(), asked, Fake(played, texts={5: "Hi"})))
    ]
    assert asked.options == {"logprobs": True, "top_logprobs": 2}
    assert told[0].logprobs[0].token == "Hi" and told[0].logprobs[0].logprob == -0.5
    assert [each.logprob for each in told[0].logprobs[0].top_logprobs] == [-0.5, -9999.0]
    assert told[1].logprobs[0].logprob == -1.0


def test_errors_have_one_text_also_inside_a_stream() -> None:
    refusal = Refusal("busy", "too many wait: ask again", retry_after=5)
    assert OllamaChat().refused(refusal) == {"error": "too many wait: ask again"}
    told = lines(streamed(OllamaChat(), read(OllamaChat(), HELLO), Fake([says("Y"), refusal])))
    assert told[-1] == {"error": "too many wait: ask again"} and not told[0]["done"]
    unknown = lines(streamed(OllamaChat(), read(OllamaChat(), HELLO), Fake([RuntimeError("secret")])))
    assert "RuntimeError" in unknown[0]["error"] and "secret" not in unknown[0]["error"]


def test_a_reader_that_goes_away_ends_the_answer() -> None:
    played = Fake([says("a"), says("b"), says("c"), ends()])
    streamed(OllamaChat(), read(OllamaChat(), HELLO), played, most=1)
    assert played.closed


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({"messages": "x"}, "messages"), ({"messages": [1]}, r"messages\[0\]"),
        ({"messages": [{"role": "user", "content": [{}]}]}, "content"),
        ({"messages": [{"role": "user", "content": "x", "images": [1]}]}, "images"),
        ({**HELLO, "think": 3}, "think"), ({**HELLO, "format": "xml"}, "format"), ({**HELLO, "options": []}, "options"),
        ({**HELLO, "options": {"temperature": "hot"}}, "options.temperature"), ({**HELLO, "stream": "no"}, "stream"),
        ({**HELLO, "options": {"top_p": 2}}, "top_p"), ({**HELLO, "model": 3}, "model"),
        ({**HELLO, "tools": {}}, "tools"),
    ],
)  # fmt: skip
def test_what_is_of_another_type_is_refused_by_name(body: dict[str, Any], word: str) -> None:
    with pytest.raises(Refusal, match=word) as caught:
        read(OllamaChat(), body)
    assert caught.value.status == 400


def test_no_picture_is_a_file_or_an_address() -> None:
    asked = read(
        OllamaChat(), {"messages": [{"role": "user", "content": "x", "images": ["/etc/passwd", "http://a/b.png"]}]}
    )
    from mlx_qwen35.text.messages import check_messages, media_parts

    sources = [each.source for each in media_parts(check_messages(asked.prompt))]
    assert all(source.startswith("data:") for source in sources)


def test_lists_are_those_of_the_catalogue() -> None:
    shelf = Shelf()
    listed = ListResponse.model_validate(ask("/api/tags", shelf=shelf)).models
    assert [each.model for each in listed] == ["org/Qwen3.5-35B-A3B-4bit:latest", "org/Qwen3.5-2B-4bit:latest"]
    assert listed[0].details.parameter_size == "35.1B" and listed[0].details.family == "qwen35moe"
    assert ask("/api/ps", shelf=shelf) == {"models": []}
    asyncio.run(shelf.load("org/Qwen3.5-2B-4bit", 300.0))
    (running,) = ProcessResponse.model_validate(ask("/api/ps", shelf=shelf)).models
    assert running.model == "org/Qwen3.5-2B-4bit:latest" and running.context_length == 262_144
    assert running.expires_at.timestamp() == 1_764_000_360 and running.size == 1_150_000_000
    asyncio.run(shelf.load("org/Qwen3.5-2B-4bit"))
    assert ProcessResponse.model_validate(ask("/api/ps", shelf=shelf)).models[0].expires_at.year == 2318


def test_show_tells_what_a_model_can() -> None:
    for name in ("org/Qwen3.5-35B-A3B-4bit", "org/qwen3.5-35b-a3b-4bit:latest", "Qwen3.5-35B-A3B-4bit"):
        shown = ShowResponse.model_validate(ask("/api/show", {"model": name}))
        assert shown.capabilities == ["completion", "tools", "thinking", "vision"]
        assert shown.modelinfo["qwen35moe.context_length"] == 262_144
    assert "vision" not in ask("/api/show", {"name": "Qwen3.5-2B-4bit"})["capabilities"]
    with pytest.raises(Refusal, match="here are org/Qwen3.5-35B") as caught:
        ask("/api/show", {"model": "llama3:8b"})
    assert caught.value.status == 404


def test_the_version_is_three_numbers_of_a_late_interface() -> None:
    numbers = [int(each) for each in ask("/api/version")["version"].split(".")]
    assert len(numbers) == 3 and numbers >= [0, 6, 4]


@pytest.mark.parametrize("path", ["/api/pull", "/api/create", "/api/embed"])
def test_what_is_not_done_here_is_said(path: str) -> None:
    with pytest.raises(Refusal, match="this (server|model)"):
        ask(path, {"model": "x"})


def test_what_the_client_sends_is_read() -> None:
    """A request as ollama-python makes it, with everything in it."""

    def tool(city: str) -> str:
        """Weather.

        Args:
          city: Where.
        """
        return city

    sent = ollama._types.ChatRequest(
        model="demo",
        messages=[ollama.Message(role="user", content="x", images=[ollama.Image(value=PNG)])],
        tools=[ollama._utils.convert_function_to_tool(tool)],
        stream=True,
        think="low",
        format={"type": "object"},
        options=ollama.Options(temperature=0, num_ctx=2048, stop=["a"]),
        keep_alive="5m",
    ).model_dump(exclude_none=True)
    asked = read(OllamaChat(), sent)
    assert asked.sampling == {"temperature": 0} and asked.ttl == 300 and asked.options["stop"] == ["a"]
    assert asked.options["tools"][0]["function"]["name"] == "tool"
    assert Fields(sent).text("model") == "demo"
