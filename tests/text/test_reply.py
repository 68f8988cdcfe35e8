"""Replies taken apart: reasoning, content and calls, the same however the text is cut."""

import hypothesis
import hypothesis.strategies as st
import pytest

from mlx_qwen35.text.reply import (
    ContentDelta,
    IncompleteCall,
    ReasoningDelta,
    Reply,
    ReplyParser,
    ToolCall,
    parse_reply,
)
from tests.soak import examples

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "tags": {"type": "array"}},
            },
        },
    }
]


def call(name="weather", **texts):
    parameters = "".join(f"<parameter={key}>\n{text}\n</parameter>\n" for key, text in texts.items())
    return f"<tool_call>\n<function={name}>\n{parameters}</function>\n</tool_call>"


def stream(pieces, *, thinking=False, tools=TOOLS):
    parser = ReplyParser(thinking=thinking, tools=tools)
    return [event for piece in pieces for event in parser.feed(piece)] + parser.finish()


def parts(reply):
    return reply.reasoning, reply.content, [(each.name, each.arguments) for each in reply.tool_calls]


# Reasoning and content


@pytest.mark.parametrize(
    ("text", "thinking", "reasoning", "content"),
    [
        ("Hello", False, "", "Hello"),
        ("\n\n Hello \n\n", False, "", "Hello"),
        ("why\n</think>\n\nso", True, "why", "so"),
        ("\n why\n\nnot \n\n</think>\n\nso\n", True, "why\n\nnot", "so"),
        ("why</think>so", True, "why", "so"),
        ("why, and cut", True, "why, and cut", ""),
        ("</think>\n\nso", True, "", "so"),
        ("", True, "", ""),
        ("<think>\nwhy\n</think>\n\nso", False, "why", "so"),
        ("<think>\nwhy\n</think>\n\nso", True, "why", "so"),
        ("\n<think>why", False, "why", ""),
        ("<thin", False, "", "<thin"),
        ("<thin", True, "<thin", ""),
        ("why</think>so </think> <think> on", True, "why", "so </think> <think> on"),
        ("a </think> b", False, "", "a </think> b"),
        ("a <think> b", False, "", "a <think> b"),
        ("if a <think of b", True, "if a <think of b", ""),
        ("why</think>\n<think>so", True, "why", "<think>so"),
    ],
)
def test_reasoning_and_content(text, thinking, reasoning, content):
    assert parse_reply(text, thinking=thinking) == Reply(reasoning, content, ())
    assert Reply.from_events(stream(text, thinking=thinking)) == Reply(reasoning, content, ())


def test_content_comes_at_once_but_for_what_may_be_a_tag():
    parser = ReplyParser(thinking=False)
    assert parser.feed("1 < 2") == [ContentDelta("1 < 2")]
    assert parser.feed(" and <b") == [ContentDelta(" and <b")]
    assert parser.feed(" <tool") == []
    assert parser.feed("box> <") == [ContentDelta(" <toolbox>")]
    assert parser.feed("/tool_call>") == [ContentDelta(" </tool_call>")]
    assert parser.feed("\n") == []
    assert parser.feed("<tool_call>\n") == []
    assert parser.feed("<functional") == [ContentDelta("\n<tool_call>\n<functional")]
    assert parser.feed("\n<function") == []
    assert parser.feed("s") == [ContentDelta("\n<functions")]
    assert parser.finish() == []


def test_reasoning_comes_at_once_but_for_what_may_be_a_tag():
    parser = ReplyParser(thinking=True)
    assert parser.feed("a </b") == [ReasoningDelta("a </b")]
    assert parser.feed(" </thi") == []
    assert parser.feed("s> </think") == [ReasoningDelta(" </this>")]
    assert parser.feed(">\n\nso") == [ContentDelta("so")]


# Calls


def test_a_call_between_content():
    reply = parse_reply(f"why</think>\n\nLook:\n\n{call(city='Rome', days='2')}", thinking=True, tools=TOOLS)
    assert parts(reply) == ("why", "Look:", [("weather", {"city": "Rome", "days": 2})])
    assert reply.tool_calls[0].raw == call(city="Rome", days="2") and reply.incomplete_call is None


def test_several_calls():
    reply = parse_reply(call(city="A") + "\n" + call(city="B") + call("now"), tools=TOOLS)
    assert parts(reply) == ("", "", [("weather", {"city": "A"}), ("weather", {"city": "B"}), ("now", {})])
    assert [each.index for each in reply.tool_calls] == [0, 1, 2]


def test_text_after_a_call_is_content():
    assert parts(parse_reply(f"Before\n\n{call('now')}\n\nafter"))[:2] == ("", "Before\n\nafter")
    assert parts(parse_reply(f"{call('now')}\n\nafter"))[:2] == ("", "after")


def test_a_call_is_given_as_soon_as_it_is_known_where_it_ends():
    """By the beginning of the next, or by the end of the reply: what looks like its end may be quoted in it."""
    parser = ReplyParser(thinking=False, tools=TOOLS)
    whole = ToolCall("weather", {"city": "Rome"}, call(city="Rome"), 0)
    assert parser.feed(call(city="Rome")) == [] and parser.feed("\n<tool_call>\n<functio") == []
    assert parser.feed("n=") == [whole]
    parser = ReplyParser(thinking=False, tools=TOOLS)
    assert parser.feed(call(city="Rome")) == [] and parser.finish() == [whole]


@pytest.mark.parametrize(
    "value",
    [
        "",
        "\n",
        "two\nlines\n\n",
        "  spaces kept ",
        "5",
        "null",
        "a < b </b> <parameter>",
        "x</parameter>\n</parameters>",
        "</parameter> and <parameter=n>",
        "<parameter=city>",
        "</function>",
        "</tool_call>",
        "<tool_call>",
        "</think>",
        "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\nbut never closed",
    ],
)
def test_a_string_is_kept_to_the_letter(value):
    assert parts(parse_reply(call(city=value, days="3"), tools=TOOLS))[2] == [("weather", {"city": value, "days": 3})]


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("<tool_call><function=weather><parameter=city>Rome</parameter></function></tool_call>", {"city": "Rome"}),
        ("<tool_call>\n\n <function= weather >\n<parameter=city>\nRome</parameter>\n\n</function></tool_call>",
         {"city": "Rome"}),
        ("<tool_call>\n<function=weather>\n<parameter=city>\nRome\n</function>\n</tool_call>", {"city": "Rome"}),
        ("<tool_call>\n<function=weather>\n<parameter=city>\nRome\n</parameter>\n</tool_call>", {"city": "Rome"}),
        (call(city="Rome").replace("</parameter>", "</parameter>\n<parameter=city>\nOslo\n</parameter>"),
         {"city": "Rome\n</parameter>\n<parameter=city>\nOslo"}),  # given already: no second one begins
        ("<tool_call>\n<function=weather>\n<parameter=city\n</function>\n</tool_call>", {"city": ""}),
        ('<tool_call>\n{"name": "weather"}\n</tool_call>', {}),
        ("<function=weather>\n</function>", {}),
    ],
)  # fmt: skip
def test_small_slips_are_forgiven(text, arguments):
    assert parts(parse_reply(text, tools=TOOLS)) == ("", "", [("weather", arguments)])


@pytest.mark.parametrize(
    "text",
    [
        "Write <tool_call> and then the name.",
        "`<tool_call>` opens it, `</tool_call>` closes it",
        "Write <function=weather>\n</function> so.",
        "<function=other>\n</function>",
        "<functional=weather>\n</functional>",
        "</parameter></function></tool_call>",
    ],
)
def test_what_is_no_call_stays_content(text):
    assert parse_reply(text, tools=TOOLS) == Reply("", text, ())


@pytest.mark.parametrize(
    ("text", "name", "reason"),
    [
        ("<tool_call>\n<function=>\n</function>\n</tool_call>", None, "no function is named"),
        ("<tool_call>\n<function=weather>\nRome\n</function>\n</tool_call>", "weather", "words stand"),
        ("<tool_call>\n<function=weather>\n</function>\nand?", "weather", "</tool_call> is missing"),
        ('<tool_call>\n{"arguments": {}}\n</tool_call>', None, "names no function"),
        ('<tool_call>\n{"name": "weather", "arguments": {"city": }}\n</tool_call>', None, "cannot be read"),
        ("<function=weather>\n<parameter=city>\nRome\n", "weather", "ends inside city"),
    ],
)
def test_what_cannot_be_read_is_text_and_says_why(text, name, reason):
    reply = parse_reply(text, tools=TOOLS)
    assert (reply.content, reply.tool_calls) == (text.strip(), ())
    assert reply.incomplete_call.name == name and reason in reply.incomplete_call.reason


def test_a_call_after_a_stray_tag_is_found():
    reply = parse_reply(f"<tool_call> is the tag: {call(city='Rome')}", tools=TOOLS)
    assert parts(reply) == ("", "<tool_call> is the tag:", [("weather", {"city": "Rome"})])


def test_a_call_cut_off_anywhere_is_incomplete_and_not_lost():
    whole = call(city="Rome", days="2")
    for end in range(len("<tool_call>"), len(whole)):
        reply = parse_reply("Look:\n" + whole[:end], tools=TOOLS, cut=True)
        if end >= whole.index("</function>") + len("</function>"):
            assert parts(reply) == ("", "Look:", [("weather", {"city": "Rome", "days": 2})])
            continue
        assert reply.tool_calls == ()
        assert reply.content == ("Look:\n" + whole[:end]).rstrip()
        assert reply.incomplete_call.name == ("weather" if end >= 30 else None)
        assert reply.incomplete_call.raw == whole[:end] and "the reply ends" in reply.incomplete_call.reason


def test_calls_before_the_cut_count():
    reply = parse_reply(call(city="A") + "\n" + call(city="B")[:-24], tools=TOOLS, cut=True)
    assert parts(reply)[2] == [("weather", {"city": "A"})] and reply.incomplete_call.name == "weather"


# Calls inside the reasoning


def test_reasoning_that_ends_with_calls_makes_them():
    text = f"I call it.\n{call(city='A')}\n{call(city='B')}\n"
    assert parts(parse_reply(text, thinking=True, tools=TOOLS)) == (
        "I call it.", "", [("weather", {"city": "A"}), ("weather", {"city": "B"})],
    )  # fmt: skip


@pytest.mark.parametrize("after", ["\nNo, wait.</think>\n\nHi", "</think>Hi", "\n<tool_call> no</think>Hi"])
def test_a_call_that_the_reasoning_only_ponders_is_text(after):
    reasoning = f"Shall I?\n{call(city='A')}" + after.partition("</think>")[0]
    assert parse_reply(f"Shall I?\n{call(city='A')}{after}", thinking=True) == Reply(reasoning, "Hi", ())


def test_a_call_broken_off_in_the_reasoning_does_not_swallow_the_answer():
    text = "As <tool_call>\n<function=f>\n<parameter=x>\n1 ...</think>\n\n" + call(city="A")
    reply = parse_reply(text, thinking=True, tools=TOOLS)
    assert parts(reply) == ("As <tool_call>\n<function=f>\n<parameter=x>\n1 ...", "", [("weather", {"city": "A"})])


def test_a_call_cut_off_in_the_reasoning():
    reply = parse_reply("So:\n" + call(city="A")[:-3], thinking=True)
    assert parts(reply) == ("So:", "", [("weather", {"city": "A"})])
    assert reply.incomplete_call is None  # only a frame is missing, and nothing follows


def test_a_value_cut_off_in_the_reasoning():
    text = "So:\n" + call(city="A")[:-40]
    reply = parse_reply(text, thinking=True)
    assert (reply.reasoning, reply.content, reply.tool_calls) == (text.rstrip(), "", ())
    assert (reply.incomplete_call.name, reply.incomplete_call.raw) == ("weather", text[4:])


def test_a_call_in_reasoning_that_is_closed_after_it():
    text = f"I call it.\n{call(city='A')}\n</think>\n\n"
    assert parts(parse_reply(text, thinking=True, tools=TOOLS)) == ("I call it.", "", [("weather", {"city": "A"})])


# Whichever way the text is cut

PIECES = st.sampled_from(
    [
        "<think>", "</think>", "<tool_call>", "</tool_call>", "<function=weather>", "<function=", "</function>",
        "<parameter=city>", "<parameter=days>", "</parameter>", "<parameter=", "\n", "\n\n", " ", "text", "12", "<",
        "</", "<tool", ">", "_call>", "é", call(city="Rome"), call(days="2"), call("other", x="1"),
        "</parameter>\n</function>\n</tool_call>", "<tool_call>\n<function=weather>\n<parameter=city>\n",
    ]
)  # fmt: skip
TEXTS = st.lists(PIECES, max_size=14).map("".join)


def merged(events):
    """The events with neighbouring deltas of one kind joined."""
    result = []
    for event in events:
        if result and type(event) is type(result[-1]) and isinstance(event, (ReasoningDelta, ContentDelta)):
            event = type(event)(result.pop().text + event.text)
        result.append(event)
    return result


@hypothesis.settings(max_examples=examples(250))
@hypothesis.given(TEXTS, st.booleans(), st.data())
def test_any_cut_gives_the_same_events(text, thinking, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = merged(stream([text], thinking=thinking))
    assert merged(stream(pieces, thinking=thinking)) == whole
    assert merged(stream(text, thinking=thinking)) == whole
    assert Reply.from_events(whole) == parse_reply(text, thinking=thinking, tools=TOOLS)


@hypothesis.settings(max_examples=examples(250))
@hypothesis.given(TEXTS, st.booleans())
def test_nothing_is_lost_but_white_space_and_the_tags_of_thinking(text, thinking):
    def bare(text):
        return "".join(text.replace("<think>", "").replace("</think>", "").split())

    events = [event for event in stream([text], thinking=thinking) if not isinstance(event, IncompleteCall)]
    kept = "".join(event.raw if isinstance(event, ToolCall) else event.text for event in events)
    assert bare(kept) == bare(text)


@hypothesis.given(TEXTS)
def test_every_call_given_out_is_a_whole_one(text):
    for event in stream([text]):
        if isinstance(event, ToolCall):
            assert event.raw.startswith(("<tool_call>", "<function=weather>")) and event.raw.rstrip().endswith(">")
            assert parse_reply(event.raw, tools=TOOLS).tool_calls[0].arguments == event.arguments


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize(
    "written, content",
    [
        ("</think>\n\n42", "42"),
        ("\n</think>\n</think>\n\n42", "42"),
        ("</think>42", "42"),
        ("42\n</think>", "42"),
        ("42</think>\n</think>\n\n", "42"),
        ("</think>\n\n42\n</think>", "42"),
        ("</think>", ""),
        ("It ends with </think>, as a tag.", "It ends with </think>, as a tag."),
        ("a\n</think>\nb", "a\n</think>\nb"),
        ("42 </thin", "42 </thin"),
        ("</thin", "</thin"),
    ],
)
def test_tags_that_close_nothing_are_no_content(thinking, written, content):
    """Where no reasoning is open; cut anywhere, the same."""
    said = f"why\n</think>\n\n{written}" if thinking else written
    for size in range(1, len(said) + 1):
        parser = ReplyParser(thinking=thinking)
        events = [event for at in range(0, len(said), size) for event in parser.feed(said[at : at + size])]
        reply = Reply.from_events(events + parser.finish())
        assert (reply.reasoning, reply.content) == ("why" if thinking else "", content)


def test_a_stray_tag_before_a_call():
    reply = parse_reply("Let me look.\n</think>\n\n<tool_call>\n<function=f>\n</function>\n</tool_call>")
    assert reply.content == "Let me look." and [call.name for call in reply.tool_calls] == ["f"]


def test_a_tag_where_an_answer_is_cut_may_not_be_its_end():
    for written, content in [("42\n</think>\n", "42\n</think>"), ("</think>\n", ""), ("42\n", "42")]:
        parser = ReplyParser(thinking=False)
        reply = Reply.from_events(parser.feed(written) + parser.finish(cut=True))
        assert reply.content == content


# Calls in JSON


@pytest.mark.parametrize(
    ("body", "calls"),
    [
        ('{"name": "weather", "arguments": {"city": "Rome", "days": 2}}', [("weather", {"city": "Rome", "days": 2})]),
        ('{"name": "weather", "arguments": "{\\"city\\": \\"Rome\\"}"}', [("weather", {"city": "Rome"})]),
        ('{"name": "weather", "parameters": {"city": "Rome", "days": "2"}}',
         [("weather", {"city": "Rome", "days": 2})]),
        ('{"function": {"name": "weather", "arguments": {"city": 5}}}', [("weather", {"city": "5"})]),
        ("{'name': 'weather', 'arguments': {'city': 'Rome', 'tags': [True, None,]}}",
         [("weather", {"city": "Rome", "tags": [True, None]})]),
        ('{"name": "weather", "arguments": {"city": "</tool_call>\nx"}}', [("weather", {"city": "</tool_call>\nx"})]),
        ('{"name": "weather", "arguments": {}}\n{"name": "weather", "arguments": {"days": 1}}',
         [("weather", {}), ("weather", {"days": 1})]),
        ('<function=weather>\n{"city": "Rome"}\n</function>', [("weather", {"city": "Rome"})]),
        ('<function>weather</function>\n{"city": "Rome"}', [("weather", {"city": "Rome"})]),
    ],
)  # fmt: skip
def test_a_body_in_json(body, calls):
    for end in ("\n</tool_call>", ""):
        text = f"Look:\n<tool_call>\n{body}{end}"
        reply = parse_reply(text, tools=TOOLS)
        assert parts(reply) == ("", "Look:", calls)
        assert Reply.from_events(stream(text)) == reply
        assert "".join(each.raw for each in reply.tool_calls) == text[len("Look:\n") :]


@pytest.mark.parametrize("between", ["", "\n", "\n\n"])
@pytest.mark.parametrize("closed", [False, True])
def test_several_calls_at_the_end_of_the_reasoning_cut_anywhere(between, closed):
    """The next call is not yet seen to be one when its first characters have come."""
    call = "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>"
    text = f"why\n{between.join([call] * 3)}" + "\n</think>\n" * closed
    for size in range(1, len(text) + 1):
        parser = ReplyParser(thinking=True)
        events = [event for at in range(0, len(text), size) for event in parser.feed(text[at : at + size])]
        reply = Reply.from_events(events + parser.finish())
        assert (reply.reasoning, len(reply.tool_calls)) == ("why", 3), size
