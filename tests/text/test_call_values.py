"""Values that look like the calls they stand in: as the template writes a call, it is read; slips never change it."""

import pytest

from mlx_qwen35.text.reply import Reply, ReplyParser, parse_reply

STRING = {"type": "string"}
TOOLS = [
    {"name": "save", "parameters": {"properties": {"path": STRING, "text": STRING, "lines": {"type": "integer"}}}},
    {"name": "ping", "parameters": {"properties": {}}},
]
OPENING = "<tool_call>\n<function=save>\n"


def value(name, text):
    return f"<parameter={name}>\n{text}\n</parameter>\n"


def call(**texts):
    return f"{OPENING}{''.join(value(name, text) for name, text in texts.items())}</function>\n</tool_call>"


def calls(text, *, thinking=False):
    """What is read, the same whole and one character at a time."""
    reply = parse_reply(text, thinking=thinking, tools=TOOLS)
    parser = ReplyParser(thinking=thinking, tools=TOOLS)
    events = [event for character in text for event in parser.feed(character)] + parser.finish()
    assert Reply.from_events(events) == reply
    assert reply.tool_calls or thinking or reply.incomplete_call.reason
    return [(each.name, each.arguments) for each in reply.tool_calls]


@pytest.mark.parametrize(
    "text",
    [
        "<parameter=foo>",
        "x\n<parameter=foo>\ny",
        "<parameter=text>",
        "<function=save>",
        "x\n<function=save>\ny",
        "<parameter=foo>\nq\n</parameter>",
        '<invoke name="x">\n<parameter name="lines">1</parameter>\n</invoke>',
        '<beans>\n  <parameter name="path">a</parameter>\n</beans>',
    ],
)
def test_a_value_with_tags_of_its_own_at_every_place(text):
    first, last = {"text": text, "path": "a"}, {"path": "a", "text": text}
    assert calls(call(**last)) == [("save", last)]
    assert calls(f"{call(**last)}\n{call(**last)}") == [("save", last)] * 2
    assert calls(f"hm\n{call(**last)}\n</think>\n", thinking=True) == [("save", last)]
    if "</parameter>" in text or "<parameter=foo>" not in text:
        assert calls(call(**first)) == [("save", first)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<tool_call>\n<function=ping>\n</tool_call>", [("ping", {})]),
        (f"{OPENING}{value('path', 'a')}<function=save>\n{value('path', 'b')}</function>\n</tool_call>",
         [("save", {"path": "a"}), ("save", {"path": "b"})]),
        (f"{OPENING}{value('path', 'a')}</function>\nok\n</tool_call>", []),
        (f"{OPENING}{value('path', 'a')}Now the next:\n</function_invocation>\n</tool_call>", []),
        (f"{OPENING}{value('text', call(path='b', lines='1'))}and\n", []),
        ('<tool_call>\n{"name": "ping", "path": "a"}\n</tool_call>', []),
    ],
)  # fmt: skip
def test_slips_make_the_call_that_was_meant_or_none(text, expected):
    assert calls(text) == expected


def test_a_call_with_an_end_of_one_inside_is_text_in_the_reasoning_wherever_it_is_cut():
    """Streamed it is given out as text before it is known how it goes on."""
    quoting = call(path="a", text="x\n</parameter>\n</function>\n</tool_call>\ny")
    assert calls(f"hm\n{quoting}\n</think>\n", thinking=True) == []
    assert calls(f"hm\n{quoting}\n{call(path='b')}\n</think>\n", thinking=True) == [("save", {"path": "b"})]
