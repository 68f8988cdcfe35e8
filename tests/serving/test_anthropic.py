"""What Anthropic's clients send, and how they are answered."""

import asyncio
import json

import pytest

from mlx_qwen35.serving.apis.anthropic import Messages
from mlx_qwen35.serving.exchange import Alive, Usage
from mlx_qwen35.serving.refusal import STATUS, Refusal
from mlx_qwen35.text.messages import check_messages, media_parts
from tests.serving.fake import ID, Fake, answered, calls, ends, events, part, read, said, says, streamed, thinks

API = Messages()
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="
LOOK = {"name": "look", "description": "Looks.", "input_schema": {"type": "object", "properties": {"at": {}}}}


def body(*messages, **more):
    return {"model": "demo", "max_tokens": 50, "messages": list(messages) or [user("Hi")], **more}


def user(content):
    return {"role": "user", "content": content}


def test_what_is_asked():
    ask = read(
        API,
        body(
            system="Be brief.", temperature=0.5, top_p=0.9, top_k=40, stop_sequences=["END", ""], stream=True, ttl=60,
            metadata={"user_id": "u"}, context_management={}, thinking=None, container=None,
        ),
    )  # fmt: skip
    assert ask.model == "demo" and ask.stream and ask.ttl == 60 and not ask.plain
    assert said(ask.prompt) == [("system", "Be brief."), ("user", "Hi")]
    assert ask.options == {"max_tokens": 50, "stop": ["END"]}
    assert ask.sampling == {"temperature": 0.5, "top_p": 0.9, "top_k": 40}
    assert ask.unread == ["context_management", "metadata"]


def test_nulls_are_absent():
    names = ("max_tokens", "system", "temperature", "top_p", "top_k", "stop_sequences", "stream", "thinking", "tools")
    ask = read(API, {"messages": [user("Hi")], **dict.fromkeys((*names, "tool_choice", "output_config", "model"))})
    assert (ask.model, ask.options, ask.sampling, ask.stream, ask.unread) == (None, {}, {}, False, [])


def test_a_first_system_block_that_only_bills_is_dropped():
    billing = {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1.332.f00; cc_entrypoint=cli;"}
    rules = {"type": "text", "text": "You are an agent.", "cache_control": {"type": "ephemeral"}}
    more = {"type": "text", "text": "Be exact."}
    ask = read(API, body(system=[billing, rules, more]))
    assert said(ask.prompt) == [("system", "You are an agent.\n\nBe exact."), ("user", "Hi")]
    assert said(read(API, body(system=[rules, billing])).prompt)[0][1].endswith("cc_entrypoint=cli;")
    assert (
        said(read(API, body(system=[{"type": "text", "text": billing["text"] + "\nBe exact."}])).prompt)[0][0]
        == "system"
    )


def test_system_messages_in_the_middle_stay_where_they_are():
    blocks = [{"type": "text", "text": "Today is Monday.", "cache_control": {"type": "ephemeral"}}]
    for content in (blocks, "Today is Monday."):  # in one turn a list, in the next a text
        ask = read(API, body(user("Hi"), {"role": "system", "content": content}, user("And?"), system="Rules."))
        assert said(ask.prompt) == [
            ("system", "Rules."), ("user", "Hi"), ("user", "Today is Monday."), ("user", "And?"),
        ]  # fmt: skip


def test_tools_are_functions_and_those_of_their_server_are_ignored():
    deferred = {**LOOK, "name": "Fetch", "defer_loading": True}
    tools = [LOOK, {"type": "web_search_20250305", "name": "web_search", "max_uses": 5}, deferred,
             {"type": "custom", "name": "bare", "strict": True}]  # fmt: skip
    ask = read(API, body(tools=tools))
    look, bare = (tool["function"] for tool in ask.options["tools"])
    assert look == {"name": "look", "description": "Looks.", "parameters": LOOK["input_schema"]}
    assert bare == {"name": "bare", "parameters": {}, "strict": True}
    assert "tool_choice" not in ask.options
    # one that was found is offered from then on, where it stands
    search = {"type": "tool_use", "id": "toolu_1", "name": "ToolSearch", "input": {"query": "fetch"}}
    found = [{"type": "tool_reference", "tool_name": "Fetch"}, {"type": "tool_reference", "tool_name": "Other"}]
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": found}
    ask = read(API, body(user("Hi"), {"role": "assistant", "content": [search]}, user([result]), tools=tools))
    assert [tool["function"]["name"] for tool in ask.options["tools"]] == ["look", "Fetch", "bare"]
    assert said(ask.prompt)[-1] == ("tool", "Tools that can be called now: Fetch, Other")
    assert "tools" not in read(API, body(tools=tools[1:3], tool_choice={"type": "none"})).options


@pytest.mark.parametrize(
    ("choice", "asked"),
    [({"type": "any"}, "required"), ({"type": "tool", "name": "look"}, "look"), ({"type": "none"}, "none"),
     ({"type": "auto"}, None)],
)  # fmt: skip
def test_tool_choice(choice, asked):
    assert read(API, body(tools=[LOOK], tool_choice=choice)).options.get("tool_choice") == asked


@pytest.mark.parametrize("choice", [{"type": "tool", "name": "see"}, {"type": "some"}, "any", {"type": "tool"}])
def test_a_choice_that_is_none_is_refused(choice):
    with pytest.raises(Refusal) as wrong:
        read(API, body(tools=[LOOK], tool_choice=choice))
    assert wrong.value.status == 400 and "tool_choice" in wrong.value.param


@pytest.mark.parametrize(
    ("more", "asked"),
    [
        ({"thinking": {"type": "enabled", "budget_tokens": 2048}}, {"enable_thinking": True, "thinking_budget": 2048}),
        ({"thinking": {"type": "disabled"}, "output_config": {"effort": "high"}}, {"enable_thinking": False}),
        ({"thinking": {"type": "adaptive", "display": "summarized"}, "output_config": {"effort": "high"}},
         {"reasoning_effort": "high"}),
        ({"thinking": {"type": "adaptive"}}, {}),
        ({}, {}),
    ],
)  # fmt: skip
def test_thinking(more, asked):
    options = read(API, body(**more)).options
    options.pop("max_tokens")
    assert options == asked


def test_a_form_of_the_answer():
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    form = {"type": "json_schema", "schema": schema}
    for more in ({"output_config": {"format": form, "effort": "low"}}, {"output_format": form}):
        assert read(API, body(**more)).options["response_format"] == {
            "type": "json_schema", "json_schema": {"schema": schema},
        }  # fmt: skip


def test_a_whole_turn_with_a_tool_comes_back():
    thought = {"type": "thinking", "thinking": "Look there.", "signature": ""}
    use = {"type": "tool_use", "id": "toolu_1", "name": "look", "input": {"at": 3}}
    result = {
        "type": "tool_result", "tool_use_id": "toolu_1",
        "content": [{"type": "text", "text": "seen"},
                    {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PIXEL}}],
    }  # fmt: skip
    hidden = {"type": "redacted_thinking", "data": "xyz"}
    searched = [{"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}},
                {"type": "web_search_tool_result", "tool_use_id": "s", "content": []}]  # fmt: skip
    answer = {"role": "assistant", "content": [thought, hidden, *searched, {"type": "text", "text": "I look."}, use]}
    ask = read(API, body(user("What is there?"), answer, user([result, {"type": "text", "text": "Well?"}])))
    made = check_messages(ask.prompt)
    assert [message["role"] for message in made] == ["user", "assistant", "tool", "user"]
    assert made[1]["reasoning_content"] == "Look there."
    assert "".join(part["text"] for part in made[1]["content"]) == "I look."
    assert made[1]["tool_calls"][0]["function"] == {"name": "look", "arguments": {"at": 3}}
    (shown,) = media_parts(made)
    assert shown.source == f"data:image/png;base64,{PIXEL}" and made[2]["content"][0]["text"] == "seen"


@pytest.mark.parametrize(
    ("content", "shown"),
    [("no such file", "Error: no such file"), ("<tool_error>x</tool_error>", "<tool_error>x</tool_error>"),
     ([{"type": "text", "text": "no such file"}], "Error: no such file"), (None, "Error: the tool failed")],
)  # fmt: skip
def test_a_tool_that_failed_says_so(content, shown):
    result = {"type": "tool_result", "tool_use_id": "t", "is_error": True, "content": content}
    assert said(read(API, body(user("Hi"), user([result]))).prompt)[-1] == ("tool", shown)


def test_documents_are_texts():
    blocks = [
        {"type": "document", "title": "a.txt", "source": {"type": "text", "media_type": "text/plain", "data": "one"}},
        {"type": "document", "source": {"type": "content", "content": [{"type": "text", "text": "two"}]}},
        {"type": "document", "title": "c", "source": {"type": "base64", "media_type": "text/csv", "data": "dGhyZWU="}},
        {"type": "search_result", "title": "d", "source": "s", "content": [{"type": "text", "text": "four"}]},
    ]
    text = said(read(API, body(user(blocks))).prompt)[0][1]
    assert all(word in text for word in ("a.txt", "one", "two", "three", "four")) and text.index("one") < text.index(
        "two"
    )
    for source in (
        {"type": "base64", "media_type": "application/pdf", "data": "JVBERi0="},
        {"type": "url", "url": "u"},
    ):
        with pytest.raises(Refusal) as wrong:
            read(API, body(user([{"type": "document", "source": source}])))
        assert wrong.value.status == 400


def test_a_last_answer_is_gone_on_with():
    ask = read(API, body(user("Count."), {"role": "assistant", "content": [{"type": "text", "text": "One, two"}]}))
    assert ask.options["continue_final_message"] is True
    use = {"type": "tool_use", "id": "t", "name": "look", "input": {}}
    for content in ([use], "", []):
        ask = read(API, body(user("Count."), {"role": "assistant", "content": content}))
        assert "continue_final_message" not in ask.options


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"messages": []}, "messages"), ({"messages": "Hi"}, "messages"), ({"messages": [3]}, "messages"),
        ({"max_tokens": -1}, "max_tokens"), ({"max_tokens": "many"}, "max_tokens"),
        ({"temperature": "hot"}, "temperature"), ({"thinking": {"type": "much"}}, "thinking.type"),
        ({"system": 3}, "system"), ({"tools": [{}]}, "tools.0.name"), ({"stop_sequences": [3]}, "stop_sequences"),
        ({"output_config": {"effort": "huge"}}, "output_config.effort"),
        ({"tools": [{"name": "a", "input_schema": 3}]}, "tools.0.input_schema"),
        ({"messages": [user([{"type": "image", "path": "/etc/passwd"}])]}, "messages"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_is_refused_by_name(wrong, param):
    with pytest.raises(Refusal) as refusal:
        read(API, body() | wrong)
    assert refusal.value.status == 400 and refusal.value.param == param


USAGE = Usage(prompt_tokens=20, cached_tokens=15, answer_tokens=9, reasoning_tokens=3)
SHOWN_USAGE = {
    "input_tokens": 5, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 15, "output_tokens": 9,
    "output_tokens_details": {"thinking_tokens": 3},
}  # fmt: skip
TURN = [thinks("I should "), thinks("look."), says("Let me"), says(" see."), calls("look", {"at": "é\u2028"}),
        calls("look", {"at": 2}, 1), ends()]  # fmt: skip


def test_a_whole_answer():
    made = answered(API, read(API, body()), Fake(TURN, usage=USAGE))
    assert made == {
        "id": f"msg_{ID}", "type": "message", "role": "assistant", "model": "demo",
        "content": [
            {"type": "thinking", "thinking": "I should look.", "signature": ID},
            {"type": "text", "text": "Let me see."},
            {"type": "tool_use", "id": f"toolu_{ID}00", "name": "look", "input": {"at": "é\u2028"}},
            {"type": "tool_use", "id": f"toolu_{ID}01", "name": "look", "input": {"at": 2}},
        ],
        "stop_reason": "tool_use", "stop_sequence": None, "usage": SHOWN_USAGE,
    }  # fmt: skip


def test_a_stream_in_its_order():
    pieces = streamed(API, read(API, body(stream=True)), Fake([Alive(3, 9), *TURN], usage=USAGE))
    found = events(pieces)
    assert all(name == data["type"] for name, data in found)
    assert [name for name, _ in found] == [
        "message_start", "ping",
        "content_block_start", *["content_block_delta"] * 3, "content_block_stop",
        "content_block_start", "content_block_delta", "content_block_delta", "content_block_stop",
        "content_block_start", "content_block_delta", "content_block_stop",
        "content_block_start", "content_block_delta", "content_block_stop",
        "message_delta", "message_stop",
    ]  # fmt: skip
    start = found[0][1]["message"]
    assert start["content"] == [] and start["stop_reason"] is None and start["usage"]["input_tokens"] == 5
    blocks = [data for name, data in found if name == "content_block_start"]
    assert [block["index"] for block in blocks] == [0, 1, 2, 3]
    assert [block["content_block"] for block in blocks] == [
        {"type": "thinking", "thinking": "", "signature": ""}, {"type": "text", "text": ""},
        {"type": "tool_use", "id": f"toolu_{ID}00", "name": "look", "input": {}},
        {"type": "tool_use", "id": f"toolu_{ID}01", "name": "look", "input": {}},
    ]  # fmt: skip
    deltas = [data["delta"] for name, data in found if name == "content_block_delta"]
    assert [delta["type"] for delta in deltas] == [
        "thinking_delta", "thinking_delta", "signature_delta", "text_delta", "text_delta", "input_json_delta",
        "input_json_delta",
    ]  # fmt: skip
    assert deltas[2] == {"type": "signature_delta", "signature": ID}
    assert json.loads(deltas[5]["partial_json"]) == {"at": "é\u2028"}
    assert found[-2][1] == {
        "type": "message_delta", "delta": {"stop_reason": "tool_use", "stop_sequence": None}, "usage": SHOWN_USAGE,
    }  # fmt: skip
    assert "".join(pieces).isascii()


@pytest.mark.parametrize(
    ("last", "reason", "stop"),
    [
        (ends("stop"), "end_turn", None), (ends("length"), "max_tokens", None), (ends("deadline"), "max_tokens", None),
        (ends("cancelled"), "end_turn", None), (part(finish="stop", stop="END"), "stop_sequence", "END"),
    ],
)  # fmt: skip
def test_why_it_ended(last, reason, stop):
    ask = read(API, body())
    assert events(streamed(API, ask, Fake([says("A"), last])))[-2][1]["delta"] == {
        "stop_reason": reason, "stop_sequence": stop,
    }  # fmt: skip
    made = answered(API, ask, Fake([says("A"), last]))
    assert (made["stop_reason"], made["stop_sequence"]) == (reason, stop)


def test_an_answer_that_says_nothing_ends_all_the_same():
    found = events(streamed(API, read(API, body()), Fake([])))
    assert [name for name, _ in found] == ["message_start", "message_delta", "message_stop"]
    assert answered(API, read(API, body()), Fake([ends()]))["content"] == []


def test_one_call_where_only_one_may_come():
    ask = read(API, body(tools=[LOOK], tool_choice={"type": "any", "disable_parallel_tool_use": True}))
    two = [calls("look", {"at": 1}), calls("look", {"at": 2}, 1), ends()]
    assert [block["input"] for block in answered(API, ask, Fake(two))["content"]] == [{"at": 1}]
    assert sum(name == "content_block_start" for name, _ in events(streamed(API, ask, Fake(two)))) == 1


def test_a_client_hears_something_while_a_long_call_is_written(monkeypatch):
    monkeypatch.setattr("mlx_qwen35.serving.exchange.ALIVE_EVERY", 0.02)
    silent = [part("x") for _ in range(10)]
    found = events(streamed(API, read(API, body()), Fake([*silent, calls("look", {}), ends()], pause=0.01)))
    assert 2 <= [name for name, _ in found].count("ping") <= 10
    monkeypatch.setattr("mlx_qwen35.serving.exchange.ALIVE_EVERY", 10)
    found = events(streamed(API, read(API, body()), Fake([*silent, calls("look", {}), ends()])))
    assert "ping" not in [name for name, _ in found]


def test_what_goes_wrong_is_told_in_the_stream():
    wrong = [says("A"), RuntimeError("a secret path")]
    found = events(streamed(API, read(API, body()), Fake(wrong)))
    name, data = found[-1]
    assert name == data["type"] == "error" and data["error"]["type"] == "api_error"
    assert "secret" not in json.dumps(data)
    assert [name for name, _ in found].count("message_stop") == 0


def test_a_reader_who_leaves_closes_the_answer():
    fake = Fake([says("A")] * 50)
    streamed(API, read(API, body()), fake, most=5)
    assert fake.closed


def test_errors_have_anthropics_types():
    types = {kind: API.refused(Refusal(kind, "No."))["error"]["type"] for kind in STATUS}
    assert types == {
        "invalid": "invalid_request_error", "too_long": "invalid_request_error", "not_allowed": "invalid_request_error",
        "unauthorized": "authentication_error", "forbidden": "permission_error", "not_found": "not_found_error",
        "too_large": "request_too_large", "busy": "rate_limit_error", "broken": "api_error",
        "unavailable": "overloaded_error",
    }  # fmt: skip
    made = API.refused(Refusal("too_long", "too long", tokens=300, most=200))
    assert made["type"] == "error" and made["error"]["message"] == "prompt is too long: 300 tokens > 200 maximum"


def test_tokens_are_counted_without_an_answer():
    class Counting:
        async def count(self, ask):
            assert ask.options["tools"][0]["function"]["name"] == "look"
            return 7 * len(ask.prompt)

    (question,) = API.questions(Counting())
    given = {"model": "m", "messages": [user("Hi")], "system": "S", "tools": [LOOK]}
    assert (question.method, question.path) == ("POST", "/v1/messages/count_tokens")
    assert asyncio.run(question.answer(given, {})) == {"input_tokens": 14}
