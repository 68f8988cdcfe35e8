"""A call that is told while it is written: its pieces are the beginning of what the whole call has, whatever it is."""

import json
import random

import pytest

from mlx_qwen35.text.call_pieces import as_json, remaining
from mlx_qwen35.text.reply import CallDelta, ContentDelta, IncompleteCall, ReasoningDelta, ReplyParser, ToolCall
from tests.text import test_call_faults as faults
from tests.text import test_call_values as values

TOOL = {
    "type": "function",
    "function": {
        "name": "write",
        "parameters": {
            "type": "object",
            "properties": {
                "path": {"type": "string"},
                "first": {"type": "integer"},
                "text": {},
                "mode": {"enum": ["a", "w"]},
                "maybe": {"type": ["string", "null"]},
            },
        },
    },
}


def fed(text, cuts, tools, *, thinking=False, cut=False):
    """All events of a text that comes in pieces."""
    parser, found, start = ReplyParser(thinking=thinking, tools=tools, call_pieces=True), [], 0
    for end in [*cuts, len(text)]:
        found += parser.feed(text[start:end])
        start = end
    return found + parser.finish(cut=cut)


def check(events):
    """That pieces fit their calls -> (calls of which there were pieces, those of them that broke off)."""
    said, whole = {}, 0
    for event in events:
        if isinstance(event, CallDelta):
            said.setdefault(event.index, []).append(event)
        elif isinstance(event, ToolCall) and event.index in said:
            pieces = said.pop(event.index)
            before = "".join(piece.arguments for piece in pieces)
            assert {piece.name for piece in pieces} == {event.name}
            assert before + remaining(event.arguments, before) == as_json(event.arguments)
            whole += 1
    assert len(said) <= 1 and (not said or any(isinstance(event, IncompleteCall) for event in events))
    return whole, len(said)


def without(events):
    """The same as it comes without pieces."""
    found = []
    for event in events:
        if isinstance(event, CallDelta):
            continue
        if found and type(event) is type(found[-1]) and isinstance(event, (ContentDelta, ReasoningDelta)):
            event = type(event)(found.pop().text + event.text)
        found.append(event)
    return found


@pytest.mark.parametrize("fault", [None, *faults.FAULTS])
def test_pieces_of_calls_with_slips(fault):
    draw, told = random.Random(str(fault)), 0
    for _ in range(300):
        tools, draft = faults.case(draw)
        for name in [] if fault is None else [fault] + draw.sample([*faults.FAULTS], draw.randint(0, 1)):
            faults.FAULTS[name](draw, draft)
        text = draw.choice(("", "I will do it.\n\n")) + draft.text()
        if draw.random() < 0.2:
            text = text[: draw.randrange(len(text) + 1)]
        cuts = sorted(draw.choices(range(len(text) + 1), k=draw.choice((3, 40, len(text)))))
        cut = draw.random() < 0.3
        events = fed(text, cuts, tools, cut=cut)
        whole, broken = check(events)
        told += whole + broken
        parser = ReplyParser(thinking=False, tools=tools)
        plain = without([event for at in range(0, len(text), 50) for event in parser.feed(text[at : at + 50])])
        plain = without([*plain, *parser.finish(cut=cut)])
        if cut and broken:  # what was told as a call is not told as text again
            plain = [event for event in plain if not isinstance(event, ContentDelta)]
            assert [event for event in without(events) if not isinstance(event, ContentDelta)] == plain
        else:
            assert without(events) == plain
    assert told > 20 or fault in ("no_opening", "no_bracket", "attribute"), told


@pytest.mark.parametrize(
    "text",
    [
        "x\n<parameter=foo>\ny\n</parameter>\n<parameter=lines>\n3\n</parameter>",
        f"like this:\n{values.call(path='a', text='b')}\nand so on",
        "x\n</parameter>\ny",
        "</function>\n</tool_call>\nmore",
        '<invoke name="x">\n<parameter name="lines">1</parameter>\n</invoke>',
        "</text>\n</path>\n</tool>\n<b>",
        "\n\n\n",
        "",
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_pieces_of_values_that_look_like_calls(text, first):
    whole = values.call(**({"text": text, "path": "a"} if first else {"path": "a", "text": text}))
    for step in (1, 7, 400):
        events = fed(whole, range(0, len(whole), step), values.TOOLS)
        check(events)
        assert any(isinstance(event, ToolCall) for event in events)


def call(*parts):
    return "<tool_call>\n<function=write>\n" + "".join(
        f"<parameter={name}>\n{value}\n</parameter>\n" for name, value in parts
    )


END = "</function>\n</tool_call>"


def test_when_what_is_told():
    """Text at once, numbers at their end, and what may be the end of a value when it is not."""
    parser = ReplyParser(thinking=False, tools=[TOOL], call_pieces=True)

    def more(text):
        return "".join(event.arguments for event in parser.feed(text))

    assert more("<tool_call>\n<function=write>\n<parameter=path>") == '{"path": "'
    assert more('\na "quoted" line\n</div>\n') == 'a \\"quoted\\" line\\n</div>'
    assert more("and a long one that goes on\n\n") == "\\nand a long one that goes on"
    assert more("\n</par") == "" and more("ameter>") == ""
    assert more("\n<parameter=first>\n12") == '\\n\\n", "first": '
    assert more("345678901234567890\n</parameter>\n") == ""
    assert more("<parameter=text>\nso ") == '12345678901234567890, "text": "so '
    assert more("</parameter>\n") == "" and more("no end, this is still of the text\n") == ""
    assert more(END) == ""
    (last,) = parser.finish()
    assert last.arguments["text"].startswith("so </parameter>")


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>\n<function=other>\n<parameter=path>\nabc and more than that",
        "<tool_call>\n<function=write>\n<parameter=other>\nabc and more than that",
        "<tool_call>\nwords <function=write>\n<parameter=path>\nabc and more than that",
        "<tool_call>\n<function=write>\nwords <parameter=path>\nabc and more than that",
        "<tool_call>\n<function=write> <parameter=path>abc and more than that",  # on one line
        '<tool_call>\n<function name="write">\n<parameter=path>\nabc and more than that',
        '<tool_call>\n{"name": "write", "arguments": {"path": "abc and more than that"}}',
        "<function=write>\n<parameter=path>\nabc and more than that",
    ],
)
def test_nothing_is_told_of_what_may_be_none(text):
    assert not [event for event in fed(text, range(len(text)), [TOOL]) if isinstance(event, CallDelta)]
    assert not [event for event in fed(text, range(len(text)), []) if isinstance(event, CallDelta)]


def test_in_reasoning_nothing_is_told_before_its_end():
    text = "Hm.\n" + call(("path", "abc and more than that")) + END
    assert not [event for event in fed(text, range(len(text)), [TOOL], thinking=True) if isinstance(event, CallDelta)]


def test_a_call_that_a_limit_cuts_off_is_not_told_again_as_text():
    text = "Look: " + call(("path", "abc and more than that"), ("first", 5)) + "<parameter=text>\nhalf of"
    events = fed(text, range(len(text)), [TOOL], cut=True)
    said = "".join(event.arguments for event in events if isinstance(event, CallDelta))
    assert said == '{"path": "abc and more than that", "first": 5, "text": "half of'[: len(said)] and len(said) > 50
    assert "".join(event.text for event in events if isinstance(event, ContentDelta)) == "Look:"
    assert isinstance(events[-1], IncompleteCall)
    ended = fed(text, range(len(text)), [TOOL])  # by the model: whatever it is, it is shown
    assert "<tool_call>" in "".join(event.text for event in ended if isinstance(event, ContentDelta))


def test_two_calls_have_pieces_each():
    text = call(("path", "the first of two files")) + END + "\n" + call(("text", "日本 \\ \t and so on")) + END
    events = fed(text, range(len(text)), [TOOL])
    assert check(events) == (2, 0)
    assert [event.index for event in events if isinstance(event, ToolCall)] == [0, 1]
    assert [json.loads(as_json(event.arguments)) for event in events if isinstance(event, ToolCall)] == [
        {"path": "the first of two files"}, {"text": "日本 \\ \t and so on"},
    ]  # fmt: skip


def test_what_was_told_and_is_not_so_is_an_error():
    with pytest.raises(RuntimeError, match="not its own"):
        remaining({"a": 1}, '{"b')
