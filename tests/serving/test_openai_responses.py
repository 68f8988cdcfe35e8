"""What clients of OpenAI's Responses interface send, Codex above all, and how they are answered."""

import asyncio
import json

import pytest

from mlx_qwen35.serving.apis.openai_responses import Responses
from mlx_qwen35.serving.exchange import Alive, Usage
from mlx_qwen35.serving.kept import Kept
from mlx_qwen35.serving.refusal import Refusal
from mlx_qwen35.text.messages import check_messages, media_parts
from tests.serving.fake import (
    CREATED,
    ID,
    Fake,
    answered,
    calls,
    ends,
    events,
    part,
    read,
    said,
    says,
    streamed,
    thinks,
)

PICTURE = "data:image/png;base64,iVBORw0KGgo="
LOOK = {"type": "function", "name": "look", "description": "Looks.", "strict": False,
        "parameters": {"type": "object", "properties": {"at": {}}}}  # fmt: skip
SPAWN = {"type": "function", "name": "spawn_agent", "parameters": {"type": "object", "properties": {}}}
AGENTS = {"type": "namespace", "name": "multi_agent_v1", "description": "Agents.", "tools": [SPAWN]}
USAGE = Usage(prompt_tokens=20, cached_tokens=15, answer_tokens=9, reasoning_tokens=3)


def user(text):
    return {"type": "message", "role": "user", "content": [{"type": "input_text", "text": text}]}


def test_what_is_asked():
    ask = read(
        Responses(),
        {
            "model": "demo", "input": "Hi", "instructions": "Be brief.", "max_output_tokens": 9, "temperature": 0.5,
            "top_p": 0.9, "top_k": 3, "stream": True, "truncation": "auto", "metadata": {"a": "b"}, "ttl": 5,
            "service_tier": "auto", "client_metadata": {}, "prompt_cache_key": "k", "user": None, "background": False,
        },
    )  # fmt: skip
    assert (ask.model, ask.stream, ask.plain, ask.ttl) == ("demo", True, False, 5)
    assert said(ask.prompt) == [("system", "Be brief."), ("user", "Hi")]
    assert ask.options == {"max_tokens": 9}
    assert ask.sampling == {"temperature": 0.5, "top_p": 0.9, "top_k": 3}
    assert ask.unread == ["client_metadata", "service_tier"]


def test_nulls_are_absent():
    names = ("model", "instructions", "tools", "tool_choice", "text", "reasoning", "max_output_tokens", "temperature",
             "top_p", "store", "previous_response_id", "stream", "include", "metadata", "conversation")  # fmt: skip
    ask = read(Responses(), {"input": "Hi", **dict.fromkeys(names)})
    assert (ask.model, ask.options, ask.sampling, ask.stream, ask.unread) == (None, {}, {}, False, [])


def test_what_codex_sends_first():
    developer = {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Rules."}]}
    ask = read(
        Responses(),
        {
            "model": "demo", "input": [developer, developer, user("Where."), user("Hi")],
            "store": False, "stream": True,
            "tools": [LOOK, AGENTS, {"type": "web_search", "external_web_access": False}], "tool_choice": "auto",
            "parallel_tool_calls": True, "reasoning": {"summary": "auto"}, "include": ["reasoning.encrypted_content"],
            "prompt_cache_key": "k", "client_metadata": {"x": "y"},
        },
    )  # fmt: skip
    assert said(ask.prompt) == [("system", "Rules.\n\nRules."), ("user", "Where."), ("user", "Hi")]
    assert [tool["function"]["name"] for tool in ask.options["tools"]] == ["look", "spawn_agent"]
    assert ask.options["tools"][0]["function"] == {
        "name": "look", "description": "Looks.", "parameters": LOOK["parameters"],
    }  # fmt: skip
    assert ask.options.keys() == {"tools", "call_pieces"}


def test_a_whole_turn_with_tools_comes_back_as_one_message():
    items = [
        user("What is there?"),
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Short."}], "encrypted_content": None,
         "content": [{"type": "reasoning_text", "text": "Look there."}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I look."}]},
        {"type": "function_call", "call_id": "c1", "name": "look", "arguments": '{"at": 3}'},
        {"type": "function_call", "call_id": "c2", "name": "look", "arguments": "{broken"},
        {"type": "web_search_call", "id": "ws", "status": "completed"},
        {"type": "function_call_output", "call_id": "c1", "output": "a tree"},
        {"type": "function_call_output", "call_id": "c2",
         "output": [{"type": "input_text", "text": "this:"}, {"type": "input_image", "image_url": PICTURE}]},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Only this."}]},
        {"type": "message", "role": "assistant", "content": "A tree."},
        {"role": "user", "content": "Which?"},
    ]  # fmt: skip
    made = check_messages(read(Responses(), {"input": items}).prompt)
    assert [message["role"] for message in made] == ["user", "assistant", "tool", "tool", "assistant", "user"]
    first, second = made[1], made[4]
    assert first["reasoning_content"] == "Look there." and first["content"][0]["text"] == "I look."
    assert [call["id"] for call in first["tool_calls"]] == ["c1", "c2"]
    assert first["tool_calls"][0]["function"] == {"name": "look", "arguments": {"at": 3}}
    assert isinstance(first["tool_calls"][1]["function"]["arguments"], dict)
    assert (made[2]["content"], made[2]["tool_call_id"]) == ("a tree", "c1")
    assert media_parts(made)[0].source == PICTURE
    assert (second["reasoning_content"], second["content"]) == ("Only this.", "A tree.")


def test_two_answers_in_a_row_stay_two():
    answer = {"type": "message", "role": "assistant", "content": "One."}
    call = {"type": "function_call", "call_id": "c", "name": "look", "arguments": "{}"}
    made = check_messages(read(Responses(), {"input": [user("Hi"), answer, call, answer, user("And?")]}).prompt)
    assert [message["role"] for message in made] == ["user", "assistant", "assistant", "user"]
    assert "tool_calls" in made[1] and "tool_calls" not in made[2]


def test_files_are_texts():
    file = {"type": "input_file", "filename": "a.txt", "file_data": "data:text/plain;base64,dHdv"}
    assert "two" in said(read(Responses(), {"input": [{"role": "user", "content": [file]}]}).prompt)[0][1]


@pytest.mark.parametrize(
    ("choice", "asked"),
    [
        ("required", "required"), ("none", "none"), ("auto", None), (None, None),
        ({"type": "function", "name": "look"}, "look"), ({"type": "function", "name": "spawn_agent"}, "spawn_agent"),
        ({"type": "web_search"}, None),
        ({"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "look"}]}, "required"),
    ],
)  # fmt: skip
def test_tool_choice(choice, asked):
    ask = read(Responses(), {"input": "Hi", "tools": [LOOK, AGENTS], "tool_choice": choice})
    assert ask.options.get("tool_choice") == asked
    allowed = isinstance(choice, dict) and choice["type"] == "allowed_tools"
    assert len(ask.options["tools"]) == (1 if allowed else 2)


def test_tools_that_are_called_alike_are_told_apart():
    twin = {"type": "namespace", "name": "b", "tools": [LOOK]}
    api = Responses()
    past = {"type": "function_call", "call_id": "c", "namespace": "b", "name": "look", "arguments": "{}"}
    ask = read(api, {"input": [user("Hi"), past], "tools": [LOOK, twin]})
    assert [tool["function"]["name"] for tool in ask.options["tools"]] == ["look", "b__look"]
    assert check_messages(ask.prompt)[1]["tool_calls"][0]["function"]["name"] == "b__look"
    made = answered(api, ask, Fake([calls("b__look", {}), calls("look", {}, 1), ends()]))["output"]
    assert [(item["name"], item.get("namespace")) for item in made] == [("look", "b"), ("look", None)]


def test_a_tool_of_free_text():
    patch = {"type": "custom", "name": "apply_patch", "description": "Patches.",
             "format": {"type": "grammar", "syntax": "lark", "definition": "start: X"}}  # fmt: skip
    api = Responses()
    past = [{"type": "custom_tool_call", "call_id": "c", "name": "apply_patch", "input": "*** old"},
            {"type": "custom_tool_call_output", "call_id": "c", "output": "done"}]  # fmt: skip
    ask = read(api, {"input": [user("Hi"), *past], "tools": [patch]})
    (tool,) = ask.options["tools"]
    assert tool["function"]["parameters"]["required"] == ["input"] and "start: X" in tool["function"]["description"]
    assert check_messages(ask.prompt)[1]["tool_calls"][0]["function"]["arguments"] == {"input": "*** old"}
    parts = [calls("apply_patch", {"input": "*** new"}), ends()]
    (item,) = answered(api, ask, Fake(parts))["output"]
    assert (item["type"], item["name"], item["input"]) == ("custom_tool_call", "apply_patch", "*** new")
    found = dict(events(streamed(api, ask, Fake(parts))))
    assert found["response.custom_tool_call_input.done"]["input"] == "*** new"
    assert found["response.output_item.done"]["item"] == item


@pytest.mark.parametrize(
    ("more", "asked"),
    [
        ({"reasoning": {"effort": "low"}}, {"reasoning_effort": "low"}),
        ({"reasoning": {"effort": "none"}}, {"reasoning_effort": "none"}),
        ({"text": {"format": {"type": "json_object"}}}, {"response_format": {"type": "json_object"}}),
        ({"text": {"format": {"type": "text"}, "verbosity": "low"}}, {}),
        ({"text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True}}},
         {"response_format": {"type": "json_schema", "json_schema":
                              {"name": "n", "schema": {"type": "object"}, "strict": True}}}),
        ({"include": ["message.output_text.logprobs"]}, {"logprobs": True}),
        ({"top_logprobs": 2}, {"logprobs": True, "top_logprobs": 2}),
    ],
)  # fmt: skip
def test_options(more, asked):
    assert read(Responses(), {"input": "Hi", **more}).options == asked


@pytest.mark.parametrize(
    ("wrong", "status", "param"),
    [
        ({}, 400, "input"), ({"input": []}, 400, "input"), ({"input": 3}, 400, "input"),
        ({"input": [3]}, 400, "input[0]"),
        ({"input": "Hi", "tools": [{"type": "function"}]}, 400, "tools[0].name"),
        ({"input": "Hi", "tool_choice": "required"}, 400, "tool_choice"),
        ({"input": "Hi", "tool_choice": {"type": "function", "name": "x"}}, 400, "tool_choice"),
        ({"input": "Hi", "background": True}, 400, "background"),
        ({"input": "Hi", "prompt": {"id": "p"}}, 400, "prompt"),
        ({"input": "Hi", "conversation": "c"}, 400, "conversation"),
        ({"input": "Hi", "text": {"format": {"type": "json_schema"}}}, 400, "text.format.schema"),
        ({"input": "Hi", "previous_response_id": "resp_x"}, 400, "previous_response_id"),
        ({"input": [{"type": "item_reference", "id": "msg_x"}]}, 404, "input[0].id"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}]}, 400, "input"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_is_refused_by_name(wrong, status, param):
    with pytest.raises(Refusal) as refusal:
        read(Responses(), wrong)
    assert (refusal.value.status, refusal.value.param) == (status, param)
    error = Responses().refused(refusal.value)["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["code"] == "previous_response_not_found") == (param == "previous_response_id")


TURN = [thinks("I should "), thinks("look."), says("Let me"), says(" see."), calls("look", {"at": "é\u2028"}),
        calls("look", {"at": 2}, 1), ends()]  # fmt: skip


def items_of_turn(summary):
    text = "I should look."
    return [
        {"id": f"rs_{ID}00", "type": "reasoning", "encrypted_content": None, "status": "completed",
         "summary": [{"type": "summary_text", "text": text}] if summary else [],
         "content": [{"type": "reasoning_text", "text": text}]},
        {"id": f"msg_{ID}01", "type": "message", "role": "assistant", "status": "completed",
         "content": [{"type": "output_text", "text": "Let me see.", "annotations": [], "logprobs": []}]},
        {"id": f"fc_{ID}02", "type": "function_call", "call_id": f"call_{ID}00", "name": "look", "status": "completed",
         "arguments": '{"at": "é\u2028"}'},
        {"id": f"fc_{ID}03", "type": "function_call", "call_id": f"call_{ID}01", "name": "look", "status": "completed",
         "arguments": '{"at": 2}'},
    ]  # fmt: skip


@pytest.mark.parametrize("summary", [None, "auto"])
def test_a_whole_answer(summary):
    api = Responses()
    ask = read(api, {"input": "Hi", "tools": [LOOK], "reasoning": {"summary": summary}, "metadata": {"a": "b"}})
    made = answered(api, ask, Fake(TURN, usage=USAGE))
    assert made["output"] == items_of_turn(summary)
    assert (made["id"], made["object"], made["status"], made["created_at"]) == (
        f"resp_{ID}",
        "response",
        "completed",
        CREATED,
    )
    assert made["usage"] == {
        "input_tokens": 20, "output_tokens": 9, "total_tokens": 29, "output_tokens_details": {"reasoning_tokens": 3},
        "input_tokens_details": {"cached_tokens": 15, "cache_write_tokens": 0},
    }  # fmt: skip
    assert (made["model"], made["error"], made["incomplete_details"], made["metadata"]) == (
        "demo",
        None,
        None,
        {"a": "b"},
    )
    assert made["tools"] == [LOOK] and made["tool_choice"] == "auto" and made["parallel_tool_calls"] is True


@pytest.mark.parametrize("summary", [None, "auto"])
def test_a_stream_in_its_order(summary):
    api = Responses()
    ask = read(api, {"input": "Hi", "stream": True, "tools": [LOOK], "reasoning": {"summary": summary}})
    pieces = streamed(api, ask, Fake([Alive(3, 9), *TURN], usage=USAGE))
    found = events(pieces)
    assert all(name == data["type"] for name, data in found)
    assert [data["sequence_number"] for _, data in found] == list(range(len(found)))
    call = ["output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"]
    short = [name.removeprefix("response.") for name, _ in found]
    assert [name for name in short if "summary" not in name] == [
        "created", "in_progress", "in_progress",
        "output_item.added", "content_part.added", *["reasoning_text.delta"] * 2, "reasoning_text.done",
        "content_part.done", "output_item.done",
        "output_item.added", "content_part.added", "output_text.delta", "output_text.delta", "output_text.done",
        "content_part.done", "output_item.done",
        *call, *call, "completed",
    ]  # fmt: skip
    assert [name for name in short if "summary" in name] == [
        f"reasoning_summary_{name}" for name in ("part.added", "text.delta", "text.delta", "text.done", "part.done")
        if summary
    ]  # fmt: skip
    created, last = found[0][1]["response"], found[-1][1]["response"]
    assert (created["status"], created["output"], created["usage"]) == ("in_progress", [], None)
    assert last["status"] == "completed" and last["output"] == items_of_turn(summary)
    done = [data for name, data in found if name == "response.output_item.done"]
    assert [data["item"] for data in done] == last["output"] and [data["output_index"] for data in done] == [0, 1, 2, 3]
    for kind in ("output_text", "reasoning_text", "function_call_arguments"):
        deltas = [data for name, data in found if name == f"response.{kind}.delta"]
        ids = {data["item_id"] for data in deltas}
        assert ids <= {item["id"] for item in last["output"]}
    told = "".join(data["delta"] for name, data in found if name == "response.output_text.delta")
    assert told == "Let me see."
    assert "".join(pieces).isascii()
    whole = answered(Responses(), ask, Fake(TURN, usage=USAGE))
    assert {**whole, "completed_at": 0} == {**last, "completed_at": 0}


def test_an_answer_that_was_cut_is_incomplete():
    api = Responses()
    ask = read(api, {"input": "Hi"})
    for reason in ("length", "deadline"):
        made = answered(api, ask, Fake([says("A"), ends(reason)]))
        assert (made["status"], made["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
        name, data = events(streamed(api, ask, Fake([says("A"), ends(reason)])))[-1]
        assert name == "response.incomplete" and data["response"]["output"][0]["status"] == "incomplete"
        assert {**data["response"], "completed_at": 0} == {**made, "completed_at": 0}


def test_an_answer_that_says_nothing_ends_all_the_same():
    found = events(streamed(Responses(), read(Responses(), {"input": "Hi"}), Fake([])))
    assert [name for name, _ in found] == ["response.created", "response.in_progress", "response.completed"]


def test_one_call_where_only_one_may_come():
    api = Responses()
    ask = read(api, {"input": "Hi", "tools": [LOOK], "parallel_tool_calls": False})
    two = [calls("look", {"at": 1}), calls("look", {"at": 2}, 1), ends()]
    assert [item["arguments"] for item in answered(api, ask, Fake(two))["output"]] == ['{"at": 1}']
    assert len(events(streamed(api, ask, Fake(two)))[-1][1]["response"]["output"]) == 1


def test_a_client_hears_something_while_a_long_call_is_written(monkeypatch):
    monkeypatch.setattr("mlx_qwen35.serving.exchange.ALIVE_EVERY", 0.02)
    api = Responses()
    silent = [part("x") for _ in range(10)]
    found = events(streamed(api, read(api, {"input": "Hi"}), Fake([*silent, calls("look", {}), ends()], pause=0.01)))
    assert 3 <= [name for name, _ in found].count("response.in_progress") <= 11


def test_what_goes_wrong_is_told_in_the_stream():
    api = Responses()
    ask = read(api, {"input": "Hi"})
    name, data = events(streamed(api, ask, Fake([says("A"), RuntimeError("a secret path")])))[-1]
    assert name == "response.failed" and data["response"]["status"] == "failed"
    assert data["response"]["error"]["code"] == "server_error" and "secret" not in json.dumps(data)
    long = Refusal("too_long", "too long", tokens=300, most=200)
    error = events(streamed(api, ask, Fake([long])))[-1][1]["response"]["error"]
    assert error["code"] == "context_length_exceeded" and "300" in error["message"]
    assert api._kept.get(f"resp_{ID}") is None


def test_log_probabilities_of_the_text():
    api = Responses()
    ask = read(api, {"input": "Hi", "top_logprobs": 1, "include": ["message.output_text.logprobs"]})
    told = {"logprob": -0.5, "top": [(5, -0.5)]}
    parts = [
        thinks("Hm", token=1, **told), part("", token=2, **told), part("\n\n", token=3, **told),
        says("Yes", token=4, **told), part("", token=5, **told), says("!!", token=6, **told),
        ends(token=7, logprob=-0.1),
    ]  # fmt: skip
    texts = {1: "Hm", 2: "</think>", 3: "\n\n", 4: "Yes", 5: "!", 6: "!", 7: "<end>"}
    (_, message) = answered(api, ask, Fake(parts, texts=texts))["output"]
    (text,) = message["content"]
    assert [each["token"] for each in text["logprobs"]] == ["Yes", "!", "!"]
    assert text["logprobs"][0] == {
        "token": "Yes", "logprob": -0.5, "bytes": [89, 101, 115],
        "top_logprobs": [{"token": "!", "logprob": -0.5, "bytes": [33]}],
    }  # fmt: skip
    found = events(streamed(api, ask, Fake(parts, texts=texts)))
    deltas = [data["logprobs"] for name, data in found if name == "response.output_text.delta"]
    assert [[each["token"] for each in logprobs] for logprobs in deltas] == [["Yes"], ["!", "!"]]
    assert found[-1][1]["response"]["output"][1] == message


def test_a_conversation_goes_on_from_a_response():
    api = Responses()
    first = Fake([thinks("Hm."), says("Hello."), ends()])
    one = answered(api, read(api, {"input": "Hi", "instructions": "Rules."}), first)
    ask = read(api, {"input": "And?", "previous_response_id": one["id"]})
    made = check_messages(ask.prompt)
    assert [message["role"] for message in made] == ["user", "assistant", "user"]  # instructions are of one request
    assert made[1]["reasoning_content"] == "Hm."
    second = Fake([calls("look", {"at": 1}), ends()])
    second.id = "f" * 24
    two = events(streamed(api, ask, second))[-1][1]["response"]
    assert two["previous_response_id"] == one["id"]
    output = {"type": "function_call_output", "call_id": two["output"][0]["call_id"], "output": "a tree"}
    ask = read(api, {"input": [output], "previous_response_id": two["id"]})
    assert [message["role"] for message in check_messages(ask.prompt)] == [
        "user",
        "assistant",
        "user",
        "assistant",
        "tool",
    ]
    # and from the same one again, otherwise
    assert said(read(api, {"input": "No.", "previous_response_id": one["id"]}).prompt)[-1] == ("user", "No.")


def test_items_may_be_referred_to():
    api = Responses()
    one = answered(api, read(api, {"input": "Hi"}), Fake([thinks("Hm."), says("Hello."), ends()]))
    references = [{"type": "item_reference", "id": item["id"]} for item in one["output"]]
    made = check_messages(read(api, {"input": [user("Hi"), *references, user("And?")]}).prompt)
    assert [message["role"] for message in made] == ["user", "assistant", "user"]
    assert made[1]["reasoning_content"] == "Hm." and made[1]["content"][0]["text"] == "Hello."


def test_kept_answers_are_shown_and_forgotten():
    api = Responses(Kept(most=2))
    questions = {question.method + question.path: question.answer for question in api.questions(None)}
    get, delete = questions["GET/v1/responses/{id}"], questions["DELETE/v1/responses/{id}"]
    one = answered(api, read(api, {"input": "Hi"}), Fake([says("A"), ends()]))
    assert asyncio.run(get({}, {"id": one["id"]})) == one
    assert asyncio.run(delete({}, {"id": one["id"]})) == {"id": one["id"], "object": "response", "deleted": True}
    for answer in (get, delete):
        with pytest.raises(Refusal) as wrong:
            asyncio.run(answer({}, {"id": one["id"]}))
        assert wrong.value.status == 404
    answered(api, read(api, {"input": "Hi", "store": False}), Fake([says("A"), ends()]))
    assert len(api._kept) == 0
    for at in range(5):
        fake = Fake([says("A"), ends()])
        fake.id = f"{at:024x}"
        answered(api, read(api, {"input": "Hi"}), fake)
    assert len(api._kept) == 2


def test_tokens_are_counted_without_an_answer():
    class Counting:
        async def count(self, ask):
            return 7 * len(ask.prompt)

    count = next(each.answer for each in Responses().questions(Counting()) if each.path.endswith("input_tokens"))
    made = asyncio.run(count({"input": "Hi", "instructions": "S"}, {}))
    assert made == {"object": "response.input_tokens", "input_tokens": 14}
