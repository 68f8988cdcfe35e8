"""POST /v1/chat/completions: what a body asks, and the answers, against the types of the openai package."""

import base64
import json
import time
from typing import Any

import pytest

from mlx_qwen35.serving.apis.openai_chat import ChatCompletions
from mlx_qwen35.serving.exchange import Alive, Usage
from mlx_qwen35.serving.refusal import STATUS, Refusal
from tests.serving.fake import Fake, answered, breaks_off, calls, ends, events, part, read, says, streamed, thinks

API = ChatCompletions()
HELLO = {"model": "demo", "messages": [{"role": "user", "content": "Hello"}]}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
SENT = base64.b64encode(b"no picture yet").decode()
PICTURE = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{SENT}"}}
FILE = {"filename": "a.txt", "file_data": f"data:text/plain;base64,{SENT}"}


def asked(**fields: Any) -> Any:
    return read(API, HELLO | fields)


def chunks(items: list[Any], **fields: Any) -> list[dict[str, Any]]:
    """The chunks of a stream, which ends as it has to."""
    found = events(streamed(API, asked(stream=True, **fields), Fake(items)))
    assert found[-1] == (None, "[DONE]") and all(name is None for name, _ in found)
    return [data for _, data in found[:-1]]


def deltas(items: list[Any], **fields: Any) -> list[dict[str, Any]]:
    return [choice["delta"] for chunk in chunks(items, **fields) for choice in chunk["choices"]]


# What is read


def test_a_plain_question_says_nothing_of_its_own() -> None:
    ask = asked()
    assert ask.model == "demo" and ask.prompt == HELLO["messages"]
    assert ask.options == {} and ask.sampling == {} and not ask.stream and not ask.plain and ask.unread == []


def test_null_is_as_good_as_absent() -> None:
    names = (
        "temperature", "top_p", "top_k", "min_p", "seed", "stop", "n", "logit_bias", "presence_penalty", "max_tokens",
        "frequency_penalty", "max_completion_tokens", "tools", "tool_choice", "response_format", "stream", "logprobs",
        "top_logprobs", "stream_options", "chat_template_kwargs", "reasoning_effort", "parallel_tool_calls", "ttl",
        "reasoning", "thinking", "functions", "function_call", "metadata", "repetition_penalty",
    )  # fmt: skip
    ask = asked(**dict.fromkeys(names))
    assert ask.options == {} and ask.sampling == {} and ask.unread == []


def test_sampling_fields() -> None:
    ask = asked(
        temperature=0.5, top_p=0.9, top_k=20, min_p=0.1, seed=7, presence_penalty=1.5, frequency_penalty=-0.5,
        repeat_penalty=1.1, logit_bias={"17": -100, "3": 2.5},
    )  # fmt: skip
    assert ask.sampling == {
        "temperature": 0.5, "top_p": 0.9, "top_k": 20, "min_p": 0.1, "seed": 7, "presence_penalty": 1.5,
        "frequency_penalty": -0.5, "repetition_penalty": 1.1, "logit_bias": {17: -100.0, 3: 2.5},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({"top_k": -1}, {"top_k": 0}),
        ({"seed": -1}, {}),
        ({"seed": -5}, {"seed": 2**64 - 5}),
        ({"top_p": 0}, {"top_p": 1e-6}),
        ({"temperature": 1}, {"temperature": 1}),
        ({"repetition_penalty": 1.2, "repeat_penalty": 1.1}, {"repetition_penalty": 1.2}),
        ({"logit_bias": {}}, {}),
    ],
    ids=str,
)
def test_habits_of_other_servers(given: dict[str, Any], found: dict[str, Any]) -> None:
    assert asked(**given).sampling == found


def test_lengths_and_stops() -> None:
    assert asked(max_tokens=9).options == {"max_tokens": 9}
    assert asked(max_tokens=9, max_completion_tokens=5).options == {"max_tokens": 5}
    assert asked(max_tokens=-1).options == {}
    assert asked(stop="END", n=3).options == {"stop": ["END"], "n": 3}
    assert asked(stop=["a", ""]).options == {"stop": ["a"]}


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({"enable_thinking": False}, {"enable_thinking": False}),
        ({"reasoning_effort": "none"}, {"reasoning_effort": "none"}),
        ({"chat_template_kwargs": {"enable_thinking": True}}, {"chat_template_kwargs": {"enable_thinking": True}}),
        ({"reasoning": {"effort": "high", "max_tokens": 20}}, {"reasoning_effort": "high", "thinking_budget": 20}),
        ({"reasoning": {"enabled": False}}, {"enable_thinking": False}),
        ({"thinking": {"type": "disabled"}}, {"enable_thinking": False}),
        ({"thinking": {"type": "enabled", "budget_tokens": 64}}, {"enable_thinking": True, "thinking_budget": 64}),
        ({"thinking": {"type": "adaptive"}}, {}),
        ({"thinking_budget": 0}, {"thinking_budget": 0}),
        ({"thinking_budget": -1}, {}),
    ],
    ids=str,
)
def test_thinking_in_all_its_words(given: dict[str, Any], found: dict[str, Any]) -> None:
    assert asked(**given).options == found


def test_tools_and_choices() -> None:
    assert asked(tools=[TOOL], tool_choice="auto").options == {"tools": [TOOL]}
    assert asked(tools=[]).options == {} and asked(tools=[], tool_choice="none").options == {}
    named = {"type": "function", "function": {"name": "look"}}
    for choice, found in (("none", "none"), ("required", "required"), ("any", "required"), (named, "look")):
        assert asked(tools=[TOOL], tool_choice=choice).options["tool_choice"] == found
    strict = {"type": "function", "function": {**TOOL["function"], "strict": True}}
    assert asked(tools=[strict]).options["tool_choice"] == "auto"
    other = {"type": "function", "function": {"name": "other"}}
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [named]}}
    assert asked(tools=[TOOL, other], tool_choice=allowed).options == {"tools": [TOOL], "tool_choice": "required"}


def test_functions_as_they_were_before_tools() -> None:
    ask = asked(functions=[TOOL["function"]], function_call={"name": "look"})
    assert ask.options == {"tools": [TOOL], "tool_choice": "look"}
    found = answered(API, ask, Fake([calls("look", {"a": 1}), ends()]))["choices"][0]
    assert found["message"]["function_call"] == {"name": "look", "arguments": '{"a": 1}'}
    assert found["finish_reason"] == "function_call" and "tool_calls" not in found["message"]
    streamed_ = chunks([calls("look", {"a": 1}), ends()], functions=[TOOL["function"]])
    pieces = [chunk["choices"][0]["delta"].get("function_call", {}) for chunk in streamed_]
    assert "".join(piece.get("arguments", "") for piece in pieces) == '{"a": 1}'
    assert streamed_[-1]["choices"][0]["finish_reason"] == "function_call"


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, {"type": "json_object"}),
        (
            {"type": "json_object", "schema": {"type": "object"}},
            {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}},
        ),
        *(
            ({"type": "json_schema", "json_schema": inner},) * 2
            for inner in ({"name": "x", "schema": {}}, {"name": "x", "schema": {"type": "object"}, "strict": True})
        ),
    ],
    ids=str,
)
def test_forms(given: dict[str, Any], found: Any) -> None:
    assert asked(response_format=given).options.get("response_format") == found


def test_what_means_nothing_here_is_counted() -> None:
    ask = asked(user="u", metadata={"a": "b"}, store=True, prompt_cache_key="k", service_tier="auto", draft_model="x")
    assert ask.unread == ["draft_model", "metadata", "prompt_cache_key", "service_tier", "store", "user"]
    assert asked(ttl=300).ttl == 300


WRONG = [
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": None}, "messages"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "/etc/passwd"}}]}]},
        "messages",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "file:///etc/hosts"}]}]},
        "messages",
    ),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "path": "a.png"}]}]}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "video", "video": ["data:,x", "b.png"]}]}]}, "messages"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_p": 2}, "top_p"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": "10"}, "max_tokens"),
    ({"n": 0}, "n"),
    ({"stop": 3}, "stop"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": []}, "stream_options"),
    ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ({"logit_bias": [1]}, "logit_bias"),
    ({"logit_bias": {"a": 1}}, "logit_bias"),
    ({"logit_bias": {"5": "x"}}, "logit_bias.5"),
    ({"logprobs": 3}, "logprobs"),
    ({"top_logprobs": 1000}, "top_logprobs"),
    ({"tools": {}}, "tools"),
    ({"tools": [5]}, "tools[0]"),
    ({"tools": [{"type": "web_search"}]}, "tools[0]"),
    ({"tools": [{"type": "function", "function": {}}]}, "tools[0]"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": 5}, "tool_choice"),
    ({"response_format": "json"}, "response_format"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {}}, "response_format"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"reasoning_effort": "huge"}, "reasoning_effort"),
    ({"chat_template_kwargs": []}, "chat_template_kwargs"),
    ({"enable_thinking": "no"}, "enable_thinking"),
    ({"model": 5}, "model"),
]


@pytest.mark.parametrize(("given", "param"), WRONG, ids=str)
def test_wrong_values_are_named(given: dict[str, Any], param: str) -> None:
    with pytest.raises(Refusal) as error:
        asked(**given)
    assert error.value.status == 400
    told = API.refused(error.value)["error"]
    assert told["type"] == "invalid_request_error" and told["param"] == param and told["message"]


def test_messages_as_clients_send_them() -> None:
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [{"type": "text", "text": "Look"}, PICTURE]},
        {"role": "assistant", "content": None, "reasoning": "Hm.", "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"at":1}'}},
            {"id": "2", "type": "function", "function": {"name": "look", "arguments": '{"at": "brok'}}]},
        {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "fine"}]},
        {"role": "tool", "tool_call_id": "2", "content": ""},
        {"role": "developer", "content": "More."},
        {"role": "user", "content": [{"type": "file", "file": FILE}]},
    ]  # fmt: skip
    made = asked(messages=messages).prompt
    assert [message["role"] for message in made] == [
        "system", "user", "assistant", "tool", "tool", "system", "user",
    ]  # fmt: skip
    assert made[2]["reasoning_content"] == "Hm."
    assert [call["function"]["arguments"] for call in made[2]["tool_calls"]] == [
        {"at": 1},
        {"arguments": '{"at": "brok'},
    ]
    assert made[6]["content"][0]["text"] == '<file name="a.txt">\nno picture yet\n</file>'


# What is answered


def test_an_answer() -> None:
    made = answered(API, asked(), Fake([thinks("Hm. "), thinks("So."), says("Yes"), ends()]))
    assert made["object"] == "chat.completion" and made["id"].startswith("chatcmpl-") and made["model"] == "demo"
    [choice] = made["choices"]
    assert choice["message"] == {
        "role": "assistant", "content": "Yes", "refusal": None, "reasoning_content": "Hm. So.", "reasoning": "Hm. So.",
    }  # fmt: skip
    assert choice["finish_reason"] == "stop" and choice["index"] == 0
    assert made["usage"] == {
        "prompt_tokens": 11, "completion_tokens": 4, "total_tokens": 15,
        "prompt_tokens_details": {"cached_tokens": 4}, "completion_tokens_details": {"reasoning_tokens": 2},
    }  # fmt: skip


def test_calls() -> None:
    items = [says("I look."), calls("look", {"at": 'ä"\n'}), calls("look", {}, 1), ends()]
    made = answered(API, asked(tools=[TOOL]), Fake(items))["choices"][0]
    assert made["finish_reason"] == "tool_calls" and made["message"]["content"] == "I look."
    first, second = made["message"]["tool_calls"]
    assert first["type"] == "function" and first["id"] != second["id"]
    assert json.loads(first["function"]["arguments"]) == {"at": 'ä"\n'} and second["function"]["arguments"] == "{}"
    found = [delta["tool_calls"][0] for delta in deltas(items, tools=[TOOL]) if "tool_calls" in delta]
    assert [call["index"] for call in found] == [0, 0, 1, 1]
    assert found[0]["function"] == {"name": "look", "arguments": ""} and found[0]["type"] == "function"
    assert "id" not in found[1] and json.loads(found[1]["function"]["arguments"]) == {"at": 'ä"\n'}
    assert found[0]["id"] != found[2]["id"]
    only = answered(API, asked(tools=[TOOL], parallel_tool_calls=False), Fake(items))["choices"][0]
    assert len(only["message"]["tool_calls"]) == 1
    one = [delta for delta in deltas(items, tools=[TOOL], parallel_tool_calls=False) if "tool_calls" in delta]
    assert {delta["tool_calls"][0]["index"] for delta in one} == {0}


def test_only_calls_have_no_content() -> None:
    made = answered(API, asked(tools=[TOOL]), Fake([calls("look", {}), ends()]))["choices"][0]
    assert made["message"]["content"] is None
    assert answered(API, asked(), Fake([ends()]))["choices"][0]["message"]["content"] == ""


@pytest.mark.parametrize(
    ("reason", "found"), [("stop", "stop"), ("length", "length"), ("deadline", "length"), ("cancelled", "stop")]
)
def test_how_it_ended(reason: str, found: str) -> None:
    items = [says("Yes"), ends(reason)]
    assert answered(API, asked(), Fake(items))["choices"][0]["finish_reason"] == found
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks(items)]
    assert reasons == [None, None, found]


def test_a_stream_says_each_thing_once() -> None:
    items = [thinks("Hm."), says("Yes"), Alive(3, 9), says(", "), part(), says("no"), ends()]
    found = deltas(items)
    assert found[0] == {"role": "assistant", "content": ""}
    assert found[1:] == [
        {"reasoning_content": "Hm.", "reasoning": "Hm."}, {"content": "Yes"}, {}, {"content": ", "}, {"content": "no"},
        {},
    ]  # fmt: skip
    made = chunks(items)
    assert all(chunk["object"] == "chat.completion.chunk" and "usage" not in chunk for chunk in made)
    assert len({chunk["id"] for chunk in made}) == 1
    alive = made[3]
    assert alive["choices"] == [{"index": 0, "delta": {}, "finish_reason": None}]


def test_a_client_hears_something_while_a_long_call_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_qwen35.serving.exchange.ALIVE_EVERY", 0.02)
    asking, silent = asked(stream=True, tools=[TOOL]), [part("x") for _ in range(10)]
    found = events(streamed(API, asking, Fake([*silent, calls("look", {}), ends()], pause=0.01)))
    empty = [data for _, data in found[1:-2] if data["choices"][0]["delta"] == {}]
    assert 2 <= len(empty) <= 10 and not any(data["choices"][0]["finish_reason"] for data in empty)
    monkeypatch.setattr("mlx_qwen35.serving.exchange.ALIVE_EVERY", 10)
    assert len(events(streamed(API, asking, Fake([*silent, calls("look", {}), ends()])))) == 5


def test_the_usage_comes_last_and_alone() -> None:
    made = chunks([says("Yes"), ends()], stream_options={"include_usage": True})
    assert made[-1]["choices"] == [] and made[-1]["usage"]["completion_tokens"] == 2
    assert all(chunk["usage"] is None for chunk in made[:-1])


def test_what_began_as_a_call_and_is_none_is_content() -> None:
    made = chunks([breaks_off("look", "<tool_call>\n<function=look>"), ends("length")], tools=[TOOL])
    assert made[1]["choices"][0]["delta"] == {"content": "<tool_call>\n<function=look>"}
    assert made[-1]["choices"][0]["finish_reason"] == "length"


def test_several_answers() -> None:
    items = [says("a"), says("b", index=1), ends(index=1), says("c"), ends("length")]
    made = answered(API, asked(n=2), Fake(items))["choices"]
    assert [(one["index"], one["message"]["content"], one["finish_reason"]) for one in made] == [
        (0, "ac", "length"), (1, "b", "stop"),
    ]  # fmt: skip
    found = [chunk["choices"][0] for chunk in chunks([*items[:3], Alive(), *items[3:]], n=2)]
    assert [choice["index"] for choice in found if "role" in choice["delta"]] == [0, 1]
    assert [(choice["index"], choice["finish_reason"]) for choice in found if choice["finish_reason"]] == [
        (1, "stop"), (0, "length"),
    ]  # fmt: skip


def test_a_stream_that_ends_early_is_finished_all_the_same() -> None:
    found = [chunk["choices"][0] for chunk in chunks([says("a"), ends()], n=2)]
    assert sorted(choice["index"] for choice in found if choice["finish_reason"]) == [0, 1]


def test_log_probabilities() -> None:
    texts = {5: "Ye", 6: "s", 9: "No"}
    tokens = [
        part(token=5, logprob=-0.25, top=[(5, -0.25), (9, -1.5)]),
        says("Yes", token=6, logprob=-0.5, top=[(6, -0.5)]),
        ends(token=7, logprob=float("-inf")),
    ]
    fields: dict[str, Any] = {"logprobs": True, "top_logprobs": 2}
    assert asked(**fields).options == fields and asked(top_logprobs=2).options == fields
    told = answered(API, asked(**fields), Fake(tokens, texts=texts))["choices"][0]["logprobs"]["content"]
    assert [(one["token"], one["logprob"]) for one in told] == [("Ye", -0.25), ("s", -0.5), ("7", -9999.0)]
    assert told[0]["bytes"] == [89, 101]
    assert told[0]["top_logprobs"] == [
        {"token": "Ye", "logprob": -0.25, "bytes": [89, 101]}, {"token": "No", "logprob": -1.5, "bytes": [78, 111]},
    ]  # fmt: skip
    found = events(streamed(API, asked(stream=True, **fields), Fake(tokens, texts=texts)))[:-1]
    pieces = [(chunk["choices"][0].get("logprobs") or {}).get("content", []) for _, chunk in found]
    assert [len(piece) for piece in pieces] == [0, 2, 1] and sum(pieces, []) == told
    assert answered(API, asked(), Fake(tokens))["choices"][0]["logprobs"] is None


@pytest.mark.parametrize("kind", STATUS)
def test_an_error_in_a_stream_ends_it(kind: str) -> None:
    found = events(streamed(API, asked(stream=True), Fake([says("a"), Refusal(kind, "No.", tokens=9, most=4)])))
    told = found[-2][1]["error"]
    assert set(told) == {"message", "type", "param", "code"} and found[-1][1] == "[DONE]"
    if kind == "too_long":
        assert told["code"] == "context_length_exceeded" and "maximum context length is 4 tokens" in told["message"]
    if kind == "not_found":
        assert told["code"] == "model_not_found"
    assert not any(data["choices"][0]["finish_reason"] for _, data in found[:-2])


def test_an_error_of_ours_tells_nothing_of_itself() -> None:
    [_, (_, told), _] = events(streamed(API, asked(stream=True), Fake([KeyError("a secret")])))
    assert told["error"]["type"] == "server_error" and "secret" not in json.dumps(told)


def test_a_reader_that_leaves_ends_the_answer() -> None:
    fake = Fake([says("a")] * 50)
    assert len(streamed(API, asked(stream=True), fake, most=5)) == 5
    assert fake.closed


def test_nothing_in_a_chunk_ends_a_line() -> None:
    text = "a\r\n\u2028\x85\ud800\0日"
    pieces = streamed(API, asked(stream=True), Fake([says(text), ends()]))
    assert all(piece.isascii() and len(piece.splitlines()) % 2 == 0 for piece in pieces)
    assert events(pieces)[1][1]["choices"][0]["delta"]["content"] == text


def test_the_client_reads_every_chunk() -> None:
    openai = pytest.importorskip("openai")
    types = openai.types.chat
    items = [thinks("Hm."), says("Yes", logprob=-0.5, top=[(1, -0.5)]), calls("look", {"a": 1}), Alive(), ends()]
    fields: dict[str, Any] = {"tools": [TOOL], "logprobs": True, "stream_options": {"include_usage": True}}
    for chunk in chunks(items, **fields):
        types.ChatCompletionChunk.model_validate(chunk, strict=True)
    made = answered(API, asked(**fields), Fake(items, usage=Usage(3, 1, 2, 1)))
    types.ChatCompletion.model_validate(made, strict=True)


def test_a_token_costs_some_microseconds() -> None:
    fake = Fake([says(" word") for _ in range(2000)])
    start = time.perf_counter()
    pieces = streamed(API, asked(stream=True), fake)
    assert (
        len(pieces) == 2002 and (time.perf_counter() - start) / 2000 < 400e-6
    )  # a tenth of that where nothing else runs
