"""Thousands of calls with one to three slips each: the call that was meant, or none, and never another.

The calls are made here from schemas and arguments, without a look at how they are read: the text is written as the
template writes it, then spoiled. Arguments hold tags, calls and JSON. What a value may not hold is what the rule of
calls.py cannot tell from structure: a line with a tag of one of the function's own parameters that no call encloses,
and an end that looks like the tags that close a call.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from mlx_qwen35.text.reply import Reply, ReplyParser, parse_reply

CALLS = 2000  # of each kind of slip

NAMES = ("path", "text", "lines", "query", "options", "old_string", "new_string", "replace_all", "items", "note")
TOOLS = ("save", "read_file", "search", "run", "mcp__docs__get-page")
WORDS = ("a", "file", "def f(x):", "    return x", "x < 3", "a > b", "日本", "{}", "0", "null", "True", "# note", "")
TAGS = (
    "</tool_call>", "<tool_call>", "</function>", "</parameter>", "<parameter=foo>", "<function=other>", "</foo>",
    "<tool_call>x</tool_call>", "</think>", "<b>bold</b>", "<parameter>", "<function>", "</function_invocation>",
)  # fmt: skip


def tool_of(draw: random.Random) -> dict[str, Any]:
    """A tool of two to five parameters."""
    kinds = [{"type": "string"}, {"type": "string"}, {"type": "integer"}, {"type": "boolean"}, {"type": "array"},
             {"type": "object"}, {"enum": ["a", "b"]}, {"type": ["string", "null"]}]  # fmt: skip
    names = draw.sample(NAMES, draw.randint(2, 5))
    properties = {name: draw.choice(kinds) for name in names}
    properties[names[0]] = {"type": "string"}
    required = draw.sample(names, draw.randint(0, len(names)))
    schema = {"type": "object", "properties": properties, "required": required}
    return {"type": "function", "function": {"name": draw.choice(TOOLS), "parameters": schema}}


def value_of(draw: random.Random, schema: dict[str, Any], own: list[str]) -> Any:
    kind = schema.get("type")
    if "enum" in schema:
        return draw.choice(schema["enum"])
    if kind == "integer":
        return draw.randint(-5, 5000)
    if kind == "boolean":
        return draw.random() < 0.5
    if kind == "array":
        items = ("x", 1, None, "<parameter=foo>", {"a": "</parameter>"})
        return [draw.choice(items) for _ in range(draw.randint(0, 3))]
    if kind == "object":
        return {"a": draw.choice(("x", 1, [True], "</function>")), "b": {"c": "<tool_call>"}}
    return text_of(draw, own) + (" ." if isinstance(kind, list) else "")  # not "null": it would be none there


def text_of(draw: random.Random, own: list[str]) -> str:
    lines = []
    for _ in range(draw.randint(1, 5)):
        choice = draw.random()
        if choice < 0.5:
            lines.append(" ".join(draw.choice(WORDS) for _ in range(draw.randint(0, 4))))
        elif choice < 0.75:
            lines.append(f"{draw.choice(('see ', 'x', '`'))}{draw.choice(TAGS)}{draw.choice((' here', '` y', ' z'))}")
        elif choice < 0.9:
            inner = {draw.choice((*own, "foo")): draw.choice(("inner.txt", "7")) for _ in range(draw.randint(0, 2))}
            lines.append(written(draw.choice(TOOLS), inner))
        else:
            lines.append(json.dumps({"name": "save", "arguments": {"path": "</parameter>"}}))
    return "\n".join([*lines, draw.choice(("the end", "}", "")) if draw.random() < 0.5 else "ok"])


def as_text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (list, dict)) else str(value)


def parameter(name: str, value: Any) -> str:
    return f"<parameter={name}>\n{as_text(value)}\n</parameter>\n"


def written(name: str, arguments: dict[str, Any]) -> str:
    """As the family's template writes a call."""
    inner = "".join(parameter(key, value) for key, value in arguments.items())
    return f"<tool_call>\n<function={name}>\n{inner}</function>\n</tool_call>"


@dataclass
class Draft:
    """A call in pieces that slips can take away, repeat or change."""

    name: str
    arguments: dict[str, Any]
    opening: str = "<tool_call>\n"
    function: str = ""
    starts: list[str] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)
    between: list[str] = field(default_factory=list)
    closing: str = "</function>\n"
    end: str = "</tool_call>"

    def __post_init__(self) -> None:
        self.function = f"<function={self.name}>\n"
        self.starts = [f"<parameter={key}>\n" for key in self.arguments]
        self.ends = ["\n</parameter>\n"] * len(self.arguments)
        self.between = [""] * len(self.arguments)

    def text(self) -> str:
        values = map(as_text, self.arguments.values())
        inner = "".join(
            start + value + end + words
            for start, value, end, words in zip(self.starts, values, self.ends, self.between, strict=True)
        )
        return self.opening + self.function + inner + self.closing + self.end


def some_end(draw: random.Random, draft: Draft) -> int | None:
    """A parameter whose end is as it should be: two slips at one end can make another value, by the rule."""
    whole = [at for at, end in enumerate(draft.ends) if end == "\n</parameter>\n" and not draft.between[at]]
    return draw.choice(whole) if whole else None


def drop_parameter_end(draw: random.Random, draft: Draft) -> None:
    if (at := some_end(draw, draft)) is not None:
        draft.ends[at] = "\n"


def double_parameter_end(draw: random.Random, draft: Draft) -> None:
    if (at := some_end(draw, draft)) is not None:
        draft.ends[at] += draw.choice(("</parameter>\n", "\n</parameter>\n"))


def other_parameter_end(draw: random.Random, draft: Draft) -> None:
    if (at := some_end(draw, draft)) is not None:
        draft.ends[at] = f"\n</{[*draft.arguments][at]}>\n"


def drop_function_end(draw: random.Random, draft: Draft) -> None:
    draft.closing = ""


def double_function_end(draw: random.Random, draft: Draft) -> None:
    draft.closing += draw.choice(("</function>\n", "</function_invocation>\n", "</function>\n</function_invocation>\n"))


def drop_call_end(draw: random.Random, draft: Draft) -> None:
    draft.end = ""


def double_call_end(draw: random.Random, draft: Draft) -> None:
    draft.end += "\n</tool_call>"


def words_between(draw: random.Random, draft: Draft) -> None:
    if (at := some_end(draw, draft)) is not None:
        draft.between[at] = draw.choice(("and\n", "Now the next:\n", "# then\n"))


def no_bracket(draw: random.Random, draft: Draft) -> None:
    if draw.random() < 0.5:
        draft.function = draft.function.replace(">\n", "\n")
    else:
        at = draw.randrange(len(draft.starts))
        draft.starts[at] = draft.starts[at].replace(">\n", "\n")


def no_opening(draw: random.Random, draft: Draft) -> None:
    draft.opening = ""


def attribute(draw: random.Random, draft: Draft) -> None:
    """Another spelling of the names: quotes, or an attribute."""
    form = draw.choice(('<{}="{}">\n', '<{} name="{}">\n', "<{} = {}>\n"))
    draft.function = form.format("function", draft.name)
    draft.starts = [form.format("parameter", key) for key in draft.arguments]


FAULTS: dict[str, Callable[[random.Random, Draft], None]] = {
    fault.__name__: fault
    for fault in (
        drop_parameter_end, double_parameter_end, other_parameter_end, drop_function_end, double_function_end,
        drop_call_end, double_call_end, words_between, no_bracket, no_opening, attribute,
    )
}  # fmt: skip


def stream(text: str, cuts: list[int], tools: list[Any]) -> Reply:
    parser = ReplyParser(thinking=False, tools=tools)
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    return Reply.from_events([event for piece in pieces for event in parser.feed(piece)] + parser.finish())


def case(draw: random.Random) -> tuple[list[dict[str, Any]], Draft]:
    tool = tool_of(draw)
    function = tool["function"]
    own = [*function["parameters"]["properties"]]
    names = [name for name in own if name in function["parameters"]["required"] or draw.random() < 0.7] or own[:1]
    arguments = {name: value_of(draw, function["parameters"]["properties"][name], own) for name in names}
    return [tool], Draft(function["name"], arguments)


def calls_of(reply: Reply) -> list[tuple[str, dict[str, Any]]]:
    return [(call.name, dict(call.arguments)) for call in reply.tool_calls]


def check(draw: random.Random, faults: list[str]) -> tuple[int, str]:
    """-> (whether the call was read, the text); raises AssertionError where another was."""
    tools, draft = case(draw)
    for fault in faults:
        FAULTS[fault](draw, draft)
    before = draw.choice(("", "I will do it.\n\n"))
    text = before + draft.text()
    reply = parse_reply(text, tools=tools)
    found = calls_of(reply)
    meant = [(draft.name, draft.arguments)]
    assert found in (meant, []), (faults, text, found)
    if not found:
        assert reply.incomplete_call is not None and reply.incomplete_call.reason, (faults, text)
        assert reply.content == text.strip()
    for count in (1, 3, 12):
        cuts = sorted(draw.randrange(len(text) + 1) for _ in range(count))
        assert stream(text, cuts, tools) == reply, (faults, text, cuts)
    return len(found), text


@pytest.mark.parametrize("fault", FAULTS)
def test_the_call_that_was_meant_or_none(fault: str) -> None:
    draw = random.Random(fault)
    read = 0
    for _ in range(CALLS):
        others = draw.sample([*FAULTS], draw.choice((0, 0, 1, 2)))
        found, _ = check(draw, [fault, *(other for other in others if other != fault)])
        read += found
    assert read >= 0.9 * CALLS


def test_what_the_template_writes_is_always_read() -> None:
    draw = random.Random(1)
    for _ in range(CALLS):
        found, text = check(draw, [])
        assert found == 1, text


def test_several_calls_and_two_functions_in_one() -> None:
    draw = random.Random(2)
    for _ in range(CALLS // 2):
        tools, first = case(draw)
        _, second = case(draw)
        properties = tools[0]["function"]["parameters"]["properties"]
        second = Draft(first.name, {name: value_of(draw, properties[name], [*properties]) for name in first.arguments})
        together = draw.random() < 0.5
        if together:
            first.end, second.opening = "", ""
        text = first.text() + draw.choice(("\n", "\n\n")) * (not together) + second.text()
        reply = parse_reply(text, tools=tools)
        found = calls_of(reply)
        meant = [(draft.name, draft.arguments) for draft in (first, second)]
        assert found == meant or (together and not found), (text, found)
        assert stream(text, sorted(draw.randrange(len(text)) for _ in range(5)), tools) == reply


def test_the_same_without_tools() -> None:
    """Where nobody says which parameters there are, any name begins one; as the template writes it, it is read."""
    draw = random.Random(3)
    for _ in range(CALLS // 2):
        _, draft = case(draw)
        found = calls_of(parse_reply(draft.text()))
        texts = {key: as_text(value) for key, value in draft.arguments.items()}
        assert found == [(draft.name, texts)], (draft.text(), found)


def test_a_long_value_takes_no_more_than_linear_work() -> None:
    """A file of 70,000 characters, full of tags, one character at a time."""
    tools, _ = case(random.Random(4))
    function = tools[0]["function"]
    name = [*function["parameters"]["properties"]][0]
    value = ("x <b>y</b> </parameter> z\n" * 2000 + "<tool_call>\n{}\n</tool_call>\n" * 500) + "end"
    text = written(function["name"], {name: value})
    parser = ReplyParser(thinking=False, tools=tools)
    events = [event for character in text for event in parser.feed(character)] + parser.finish()
    assert calls_of(Reply.from_events(events)) == [(function["name"], {name: value})]
