"""What is set for a whole conversation, and what one message is told otherwise: forms of answers, calls of tools."""

import json
import re

import pytest

from mlx_qwen35 import Chat, Sampling, load
from mlx_qwen35.conversation import Conversation
from mlx_qwen35.errors import ArgumentError

LETTERS, DIGITS = re.compile("[a-z]{3}"), re.compile("[0-9]{4}")
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}
    for name, properties in (("now", {}), ("add", {"a": {"type": "integer"}}))
]
DRAWN = {"enable_thinking": False, "sampling": Sampling(temperature=1, seed=3), "max_tokens": 120}


@pytest.fixture(scope="module")
def demo():
    return load()


def test_the_form_of_all_answers_and_of_one(demo):
    chat = Chat(*demo, display="off", response_format=LETTERS, **DRAWN)
    assert LETTERS.fullmatch(chat.send("one").text)
    assert DIGITS.fullmatch(chat.send("two", response_format=DIGITS).text)
    assert LETTERS.fullmatch(chat.regenerate().text)
    assert isinstance(json.loads(chat.send("three", response_format={"enum": ["yes", 5]}).text), str | int)
    free = chat.send("What is 17 + 25?", response_format=None, sampling=Sampling(temperature=0))
    assert not LETTERS.fullmatch(free.text)
    assert LETTERS.fullmatch(chat.send("four").text)
    assert len(chat.history) == 10


def test_the_tools_of_all_answers_and_of_one(demo):
    chat = Chat(*demo, display="off", tools=TOOLS, tool_choice="now", **DRAWN)
    assert [call.name for call in chat.send("one").tool_calls] == ["now"]
    reply = chat.send_results("noon", tool_choice="add")
    assert [call.name for call in reply.tool_calls] == ["add"] and not reply.text
    assert not chat.send_results("7", tool_choice="none").tool_calls
    assert [call.name for call in chat.send("again").tool_calls] == ["now"]


def test_a_form_that_cannot_be_followed_leaves_the_chat_as_it_was(demo):
    chat = Chat(*demo, display="off", **DRAWN)
    with pytest.raises(ArgumentError, match="not"):
        chat.send("one", response_format={"not": {}})
    assert chat.history == []


def test_a_conversation_goes_on_with_one_answer(demo):
    says = "^n is 2, and a conversation goes on with one answer; ask stream_generate for several$"
    with pytest.raises(ArgumentError, match=says):
        Chat(*demo, n=2)
    chat, talk = Chat(*demo, display="off", **DRAWN), Conversation(*demo)
    for ask in (lambda: chat.send("one", n=2), lambda: talk.answer([{"role": "user", "content": "one"}], print, n=2)):
        with pytest.raises(ArgumentError, match=says):
            ask()
    assert chat.history == talk.messages == []
    assert LETTERS.fullmatch(chat.send("one", n=1, response_format=LETTERS).text)
