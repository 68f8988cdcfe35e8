"""Calls under a grammar: what may be written, and that the reader reads it back."""

import json
import re

import jsonschema
import numpy as np
import pytest

from mlx_qwen35.errors import ArgumentError
from mlx_qwen35.grammar import Grammar
from mlx_qwen35.text.reply import parse_reply
from tests.grammar.walks import run, walk

TOKENS = re.compile(r"(<tool_call>(?=\n<function=)|</tool_call>(?=$|\n<tool|\nSo)|</think>)")
CALL = "<tool_call>\n<function={name}>\n{parameters}</function>\n</tool_call>"


def tool(name="f", required=(), **properties):
    parameters = {"type": "object", "properties": properties, "required": list(required)}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def written(name="f", **texts):
    values = (f"<parameter={key}>\n{text}\n</parameter>\n" for key, text in texts.items())
    return CALL.format(name=name, parameters="".join(values))


def fits(processor, text, tools, thinking=False, **options) -> bool:
    """Whether the text may be an answer. The tags around a call are tokens, and </think>; others are letters."""
    matcher = Grammar.of(processor, tools=tools, **options).matcher(thinking=thinking)
    tokens = []
    for at, piece in enumerate(TOKENS.split(text)):
        tokens += processor.tokenizer.encode(piece, plain=at % 2 == 0)
    if matcher.accepted(tokens) < len(tokens):
        return False
    for token in tokens:
        matcher.advance(token)
    return matcher.complete


STRINGS = [
    "Riga",
    "",
    "def f(x):\n    return x < 3 and \"a\" != 'b'  # {1: [2]}\n",
    "\n\n",
    "</function>\n</tool_call>",
    "<b>bold</b> <para> </par",
    "if a <\nb:\r\n\tpass",
    "日本 😀",
    "5",
    "null",
]


@pytest.mark.parametrize("text", STRINGS)
def test_a_string_is_text_up_to_its_closing_tag(processor, text):
    tools = [tool(required=["a"], a={"type": "string"}, b={"type": "integer"})]
    answer = written(a=text, b="3")
    assert fits(processor, answer, tools, tool_choice="required")
    assert parse_reply(answer, tools=tools).tool_calls[0].arguments == {"a": text, "b": 3}


@pytest.mark.parametrize("text", ["x</parameter>y", "<parameter=b>", "<function=f>", "a\r", "<tool_call>"])
def test_a_string_holds_no_tag_that_could_be_the_calls_own(processor, text):
    assert not fits(processor, written(a=text), [tool(a={"type": "string"})], tool_choice="required")


def test_names_and_what_is_required(processor):
    tools = [tool(required=["a"], a={"type": "string"}, b={"type": "boolean"}), tool("g")]
    for answer, good in [
        (written(a="x"), True),
        (written(b="true", a="x"), True),
        (written(a="x", b="False"), True),
        (written(b="true"), False),
        (written(a="x", c="1"), False),
        (written(a="x", b="yes"), False),
        (written("g"), True),
        (written("h"), False),
        (written("g") + "\n" + written(a="x"), True),
        (written("g") + "\nSo.", False),
        ("Text. " + written("g"), False),
        ("", False),
        (written(a="x").replace("</function>", "<parameter=a>\ny\n</parameter>\n</function>"), False),
    ]:
        assert fits(processor, answer, tools, tool_choice="required") is good, answer


def test_one_tool_by_its_name_is_called_once(processor):
    tools = [tool(), tool("g")]
    for choice in ("g", {"type": "function", "function": {"name": "g"}}, {"type": "function", "name": "g"}):
        assert fits(processor, written("g"), tools, tool_choice=choice)
        assert not fits(processor, written("f"), tools, tool_choice=choice)
        assert not fits(processor, written("g") + "\n" + written("g"), tools, tool_choice=choice)


def test_strict_calls_may_follow_text(processor):
    tools = [tool(required=["n"], n={"type": "integer", "minimum": 3})]
    for answer, good in [
        ("Just words, 3 < 4 </tool_call> <tool>.", True),
        ("I look.\n\n" + written(n="12"), True),
        (written(n="3") + "\n" + written(n="4"), True),
        ("I look.\n\n" + written(n="2"), False),
        (written(n="3") + "\nSo.", False),
        ("", False),
        (" \n", False),
    ]:
        assert fits(processor, answer, tools, strict=True) is good, answer
        assert fits(processor, "hm\n</think>\n\n" + answer, tools, strict=True, thinking=True) is good, answer
    marked = [{"type": "function", "function": {**tools[0]["function"], "strict": True}}]
    assert not fits(processor, written(n="2"), marked) and fits(processor, written(n="5"), marked)
    assert not run(processor, Grammar.of(processor, tools=tools, strict=True).matcher(thinking=False), "<tool_call>")
    assert not run(processor, Grammar.of(processor, tools=tools, strict=True).matcher(thinking=False), "<function=f>")


def test_none_is_text_without_calls(processor):
    tools = [tool()]
    assert fits(processor, "Words.", tools, tool_choice="none")
    assert not fits(processor, written(), tools, tool_choice="none")
    assert fits(processor, "{}", tools, tool_choice="none", response_format="json")
    assert not fits(processor, written(), tools, tool_choice="none", response_format="json")


@pytest.mark.parametrize("form", ["json", {"type": "regex", "pattern": r"\{\}"}, {"type": "grammar", "grammar":
    'start: item\nitem: "{" "}"'}, {"type": "gbnf", "grammar": 'root ::= "{" x "}"\nx ::= "" | "x" x'}])  # fmt: skip
def test_a_form_or_calls(processor, form):
    tools = [tool(required=["a"], a={"type": "array", "items": {"type": "integer"}})]
    assert fits(processor, "{}", tools, response_format=form)
    assert fits(processor, written(a="[1, 2]"), tools, response_format=form)
    assert not fits(processor, "{}" + written(a="[1]"), tools, response_format=form)
    assert not fits(processor, written(a="[x]"), tools, response_format=form)
    assert not fits(processor, "{}", tools, response_format=form, tool_choice="required")


VALUES = [
    ({"type": "integer"}, ["5", "-12"], ["5.5", "x", "", "05"]),
    ({"type": "number"}, ["2.5", "-1e5", "3"], ["1e999", "NaN"]),
    ({"type": "boolean"}, ["true", "False"], ["1", "yes"]),
    ({"type": "null"}, ["null", "None"], ["nil"]),
    ({"type": "array", "items": {"type": "string"}}, ['["a", "</b>"]', "[]"], ["[1]", "a"]),
    ({"type": "object"}, ['{"a": [{"b": "c"}]}'], ["[]", "{'a': 1}"]),
    ({"enum": ["c", "f", 1, True, None, "1"]}, ["c", '"c"', "1", '"1"', "true", "True", "null"], ["x", "2"]),
    ({"const": "a\nb <think>"}, ["a\nb <think>"], ["a"]),
    ({"type": "string", "pattern": "^[a-z]+$", "maxLength": 3}, ["ab"], ["abcd", "A"]),
    ({"type": "string", "format": "date"}, ["2024-02-29"], ["2023-02-29"]),
    ({"type": ["string", "null"]}, ["null", "x", "", "nullx"], []),
    ({"anyOf": [{"type": "string"}, {"type": "integer", "minimum": 10}]}, ["10", "x1", ""], ["5", "-3", " 7", "+4"]),
    (
        {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "integer"}}]},
        ["a [1]", "[1]"],
        ['["a"]', "[x"],
    ),
    ({"oneOf": [{"type": "string", "maxLength": 2}, {"type": "object"}]}, ["ab", "{}"], ["abc", "{x"]),
    ({"$ref": "#/$defs/c"}, ["red"], ["green"]),
    ({}, ["anything\nat all"], []),
]


@pytest.mark.parametrize("schema, good, bad", VALUES)
def test_values(processor, schema, good, bad):
    described = tool(required=["v"], v=schema)
    described["function"]["parameters"]["$defs"] = {"c": {"enum": ["red", "blue"]}}
    for text in good:
        answer = written(v=text)
        assert fits(processor, answer, [described], tool_choice="f"), text
        read = parse_reply(answer, tools=[described]).tool_calls[0].arguments
        jsonschema.validate(read, described["function"]["parameters"])
    for text in bad:
        assert not fits(processor, written(v=text), [described], tool_choice="f"), text


def test_values_that_spell_added_tokens_are_written_in_letters(processor):
    tools = [tool(required=["v"], v={"enum": ["a<think>b"]})]
    matcher = Grammar.of(processor, tools=tools, tool_choice="f").matcher(thinking=False)
    matcher.advance(processor.tokenizer.control_tokens["<tool_call>"])
    assert run(processor, matcher, "\n<function=f>\n<parameter=v>\na<think>b\n</parameter>\n</function>\n")
    assert matcher.accepted(processor.tokenizer.encode("</tool_call>")) == 1


def test_more_parameters_than_can_be_ticked_off_come_in_order(processor):
    names = [f"p{at}" for at in range(70)]
    tools = [tool(required=["p3"], **{name: {"type": "integer"} for name in names})]
    assert fits(processor, written(p3="1", p0="1", p69="2"), tools, tool_choice="f")
    assert not fits(processor, written(p0="1", p3="1"), tools, tool_choice="f")
    assert not fits(processor, written(p0="1"), tools, tool_choice="f")


@pytest.mark.parametrize(
    "tools, options, words",
    [
        ([tool()], {"tool_choice": "g"}, ["'g'", "f"]),
        ([], {"tool_choice": "required"}, ["'required'", "tools="]),
        ([tool()], {"tool_choice": 3}, ["3"]),
        ([{"x": 1}], {"tool_choice": "required"}, ["tools[0]"]),
        ([tool(a={"not": {}})], {"strict": True}, ["the tool f", "#/properties/a", "'not'"]),
        ([tool(a={"type": "str"})], {"strict": True}, ["the tool f", "'str'"]),
        ([tool(**{"a b": {}})], {"strict": True}, ["'a b'"]),
        ([tool("f>g")], {"strict": True}, ["'f>g'"]),
        ([tool(a={"enum": ["</parameter>"]})], {"strict": True}, ["#/properties/a", "read back"]),
        ([tool(a={"oneOf": [{"type": "string"}, {"enum": ["x"]}]})], {"strict": True}, ["'oneOf'"]),
        ([{"name": "f", "parameters": {"type": "array"}}], {"strict": True}, ["the tool f", "'array'"]),
        ([{"name": "f", "parameters": {"anyOf": []}}], {"strict": True}, ["'anyOf'"]),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(processor, tools, options, words):
    with pytest.raises(ArgumentError) as caught:
        Grammar.of(processor, tools=tools, **options)
    assert all(word in str(caught.value) for word in words), caught.value


def test_other_forms_of_tools(processor):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    forms = ({"parameters": schema}, {"input_schema": schema}, {"inputSchema": schema})
    for form in (
        *forms,
        {"parameters": {"$ref": "#/$defs/x", "$defs": {"x": schema}}},
        {"parameters": {"allOf": [schema]}},
    ):
        assert fits(processor, written(a="1"), [{"name": "f", **form}], tool_choice="f")
        assert not fits(processor, written(a="x"), [{"name": "f", **form}], tool_choice="f")
    assert fits(processor, written(), [{"name": "f"}, {"name": "g", "parameters": None}], tool_choice="required")


def test_a_walk_names_what_is_offered(processor):
    """The control tokens of a call are tokens, and nothing else is one."""
    tools = [tool(a={"type": "string"})]
    control = processor.tokenizer.control_tokens
    for seed in range(20):
        matcher = Grammar.of(processor, tools=tools, tool_choice="required").matcher(thinking=False)
        answer = walk(processor, matcher, np.random.default_rng(seed), leaning=0.6)
        if answer.ended:
            added = [token for token in answer.tokens if token in control.values()]
            assert len(added) % 2 == 0
            assert added == [control["<tool_call>"], control["</tool_call>"]] * (len(added) // 2)
            json.dumps(parse_reply(processor.decode(answer.tokens), tools=tools).tool_calls[0].arguments)
