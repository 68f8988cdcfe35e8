"""Calls that are told while they are written, in the words of the three interfaces that have pieces of them."""

import json

import pytest

from mlx_qwen35.serving.apis.anthropic import Messages
from mlx_qwen35.serving.apis.openai_chat import ChatCompletions
from mlx_qwen35.serving.apis.openai_responses import Responses
from mlx_qwen35.text.reply import CallDelta
from tests.serving.fake import Fake, breaks_off, calls, ends, events, part, read, says, streamed

WRITE = {"type": "object", "properties": {"path": {"type": "string"}, "text": {"type": "string"}}}
WHOLE = {"path": 'a "b".txt', "text": "日本\n"}


def piece(text, at=0):
    return part(text, [CallDelta("write", text, at)])


ITEMS = [
    says("So:"),
    piece('{"path": "'), part("x"), piece('a \\"b\\".txt'), piece('", "text": "日本'),
    calls("write", WHOLE), calls("write", {}, 1),
    piece('{"path": "c', 2), calls("write", {"path": "c"}, 2),
    ends(),
]  # fmt: skip


def chat(items, **more):
    body = {"messages": [{"role": "user", "content": "Hi"}], "stream": True,
            "tools": [{"type": "function", "function": {"name": "write", "parameters": WRITE}}]} | more  # fmt: skip
    ask = read(ChatCompletions(), body)
    made, ended = {}, None
    for _, data in events(streamed(ChatCompletions(), ask, Fake(items)))[:-1]:
        choice = data["choices"][0]
        ended = choice["finish_reason"] or ended
        for call in choice["delta"].get("tool_calls", ()):
            found = made.setdefault(call["index"], {"pieces": []})
            if "id" in call:
                assert "id" not in found and not found["pieces"]
                found |= {"id": call["id"], "name": call["function"]["name"]}
            if call["function"]["arguments"]:
                found["pieces"].append(call["function"]["arguments"])
    return ask, [made[at] for at in sorted(made)], ended


def messages(items, **more):
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 99, "stream": True,
            "tools": [{"name": "write", "input_schema": WRITE}]} | more  # fmt: skip
    ask = read(Messages(), body)
    blocks, ended = [], None
    for name, data in events(streamed(Messages(), ask, Fake(items))):
        if name == "content_block_start":
            assert data["index"] == len(blocks) and (not blocks or blocks[-1]["closed"])
            blocks.append({**data["content_block"], "pieces": [], "closed": False})
        elif name == "content_block_delta" and data["delta"]["type"] == "input_json_delta":
            assert not blocks[data["index"]]["closed"]
            blocks[data["index"]]["pieces"].append(data["delta"]["partial_json"])
        elif name == "content_block_stop":
            blocks[data["index"]]["closed"] = True
        elif name == "message_delta":
            ended = data["delta"]["stop_reason"]
    assert all(block["closed"] for block in blocks)
    return ask, [block for block in blocks if block["type"] == "tool_use"], ended


def responses(items, **more):
    body = {"input": "Hi", "stream": True, "tools": [{"type": "function", "name": "write", "parameters": WRITE}]} | more
    ask = read(Responses(), body)
    made, ended = {}, None
    for name, data in events(streamed(Responses(), ask, Fake(items))):
        if name == "response.output_item.added" and data["item"]["type"] == "function_call":
            made[data["item"]["id"]] = {**data["item"], "pieces": []}
        elif name == "response.function_call_arguments.delta":
            made[data["item_id"]]["pieces"].append(data["delta"])
        elif name == "response.function_call_arguments.done":
            assert data["arguments"] == "".join(made[data["item_id"]]["pieces"])
        elif name == "response.output_item.done" and data["item"]["type"] == "function_call":
            made[data["item"]["id"]]["done"] = data["item"]["arguments"]
        elif name in ("response.completed", "response.incomplete"):
            ended = data["response"]
    return ask, list(made.values()), ended


@pytest.mark.parametrize("by", [chat, messages, responses])
def test_pieces_make_the_whole(by):
    ask, made, ended = by(ITEMS)
    assert ask.options["call_pieces"] is True
    assert [json.loads("".join(call["pieces"])) for call in made] == [WHOLE, {}, {"path": "c"}]
    assert [len(call["pieces"]) for call in made] == [4, 1, 2] and {call["name"] for call in made} == {"write"}
    assert len({call["id"] for call in made}) == 3
    if by is responses:
        assert [item["arguments"] for item in ended["output"][1:]] == [call["done"] for call in made]
        assert [json.loads(call["done"]) for call in made] == [WHOLE, {}, {"path": "c"}]
    else:
        assert ended in ("tool_calls", "tool_use")


@pytest.mark.parametrize("by", [chat, messages, responses])
def test_only_one_where_only_one_may_come(by):
    one = {"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}} if by is messages else (
        {"parallel_tool_calls": False}
    )  # fmt: skip
    _, made, _ = by(ITEMS, **one)
    assert [json.loads("".join(call["pieces"])) for call in made] == [WHOLE]


@pytest.mark.parametrize("by", [chat, messages, responses])
@pytest.mark.parametrize("reason", ["length", "stop"])
def test_one_that_breaks_off_is_none(by, reason):
    items = [piece('{"path": "'), piece("half"), breaks_off("write", "<tool_call>...", finish=reason)]
    _, made, ended = by(items)
    assert ["".join(call["pieces"]) for call in made] == ['{"path": "half']
    if by is responses:
        assert "done" not in made[0] and ended["status"] == ("incomplete" if reason == "length" else "completed")
        assert "function_call" not in [item["type"] for item in ended["output"]]
    else:
        assert ended == {"length": ("length", "max_tokens"), "stop": ("stop", "end_turn")}[reason][by is messages]


@pytest.mark.parametrize(
    "more",
    [{"stream": False}, {"tools": None}, {"tools": None, "functions": [{"name": "write", "parameters": WRITE}]}],
)
def test_who_wants_none(more):
    body = {"messages": [{"role": "user", "content": "Hi"}], "stream": True,
            "tools": [{"type": "function", "function": {"name": "write", "parameters": WRITE}}]}  # fmt: skip
    assert "call_pieces" not in read(ChatCompletions(), body | more).options
