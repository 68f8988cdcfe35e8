"""Arguments typed by a schema."""

import json

import hypothesis
import hypothesis.strategies as st
import pytest

from mlx_qwen35.text.arguments import ToolSchemas
from mlx_qwen35.text.reply import parse_reply


def typed(text, schema, **root):
    tools = [{"function": {"name": "f", "parameters": {"properties": {"x": schema}, **root}}}]
    return ToolSchemas(tools).arguments("f", {"x": text})["x"]


def same(value, wanted):
    return type(value) is type(wanted) and value == wanted


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("5", "string", "5"), (' "a" ', "string", ' "a" '), ("null", "string", "null"), ("", "string", ""),
        ("5", "integer", 5), (" -5\n", "integer", -5), ("5.0", "integer", 5), ("5.5", "integer", "5.5"),
        ("five", "integer", "five"), ("", "integer", ""), ("true", "integer", "true"), ("1_000", "integer", "1_000"),
        ("9" * 400, "integer", int("9" * 400)), ("9" * 5000, "integer", "9" * 5000), ('"5"', "integer", '"5"'),
        ("5", "number", 5), ("2.5", "number", 2.5), ("1e3", "number", 1000.0), ("NaN", "number", "NaN"),
        ("1e999", "number", "1e999"), ("-Infinity", "number", "-Infinity"), ("true", "number", "true"),
        ("true", "boolean", True), ("False", "boolean", False), (" TRUE ", "boolean", True), ("1", "boolean", "1"),
        ("null", "null", None), ("None", "null", None), ("nil", "null", "nil"),
        ("[1, 2]", "array", [1, 2]), ("[]", "array", []), ("1, 2", "array", "1, 2"), ("{}", "array", "{}"),
        ('{"a": [1]}', "object", {"a": [1]}), ("{'a': 1}", "object", {"a": 1}),
        ("{a: 1}", "object", "{a: 1}"), ("[1e999]", "array", "[1e999]"),
        ("[" * 100_000, "array", "[" * 100_000), ("[NaN]", "array", "[NaN]"),
        ("5", "date", "5"), ("5", 7, "5"), ("5", "INTEGER", 5),
    ],
)  # fmt: skip
def test_plain_types(text, kind, value):
    assert same(typed(text, {"type": kind}), value)


@pytest.mark.parametrize(
    ("text", "schema", "value"),
    [
        ("5", {"type": ["integer", "null"]}, 5),
        ("null", {"type": ["integer", "null"]}, None),
        ("x", {"type": ["integer", "null"]}, "x"),
        ("5", {"type": ["string", "integer"]}, 5),
        ("x", {"type": ["string", "integer"]}, "x"),
        ("5", {"anyOf": [{"type": "string"}, {"type": "integer"}]}, 5),
        ("None", {"anyOf": [{"type": "string"}, {"type": "null"}]}, None),
        ("[1]", {"oneOf": [{"type": "object"}, {"type": "array"}]}, [1]),
        ("5", {"type": "integer", "anyOf": [{"minimum": 1}, {"maximum": 9}]}, 5),
        ("null", {"type": "integer", "nullable": True}, None),
        ("b", {"enum": ["a", "b"]}, "b"),
        ("2", {"enum": [1, 2]}, 2),
        ("2", {"enum": ["1", "2"]}, "2"),
        ("3", {"enum": [1, 2]}, "3"),
        ("true", {"enum": [True, "x"]}, True),
        ("1", {"enum": [True, 1]}, 1),
        ("1", {"type": "string", "enum": ["1"]}, "1"),
        ("c", {"type": "string", "enum": ["a", "b"]}, "c"),
        ("7", {"const": 7}, 7),
        ("5", {"$ref": "#/$defs/N"}, 5),
        ("5", {"allOf": [{"$ref": "#/$defs/N"}]}, 5),
        ("5", {"$ref": "#/$defs/loop"}, "5"),
        ("5", {"$ref": "#/$defs/none"}, "5"),
        ("5", {"$ref": "http://x"}, "5"),
        ('{"a": 1}', {"properties": {"a": {}}}, {"a": 1}),
        ("[1]", {"items": {}}, [1]),
        ("5", {}, "5"),
        ("5", True, "5"),
        ("5", {"description": "a number"}, "5"),
    ],
)
def test_unions_enums_and_references(text, schema, value):
    defs = {"N": {"type": "integer"}, "loop": {"anyOf": [{"$ref": "#/$defs/loop"}, {"$ref": "#/$defs/loop"}]}}
    assert same(typed(text, schema, **{"$defs": defs}), value)


def test_unknown_names_stay_text():
    tools = [{"name": "f", "parameters": {"properties": {"x": {"type": "integer"}}}}]
    assert ToolSchemas(tools).arguments("f", {"x": "1", "y": "1"}) == {"x": 1, "y": "1"}
    assert ToolSchemas(tools).arguments("g", {"x": "1"}) == {"x": "1"}
    assert ToolSchemas(None).arguments("f", {"x": "1"}) == {"x": "1"}


@pytest.mark.parametrize(
    ("item", "value"),
    [
        ({"anyOf": [{"type": "string"}, {"type": "null"}, {"type": "integer"}]}, ["none", "5"]),
        ({"type": ["string", "null"]}, ["none", "5"]),
        ({"$ref": "#/$defs/O"}, ["none", "5"]),
        ({"anyOf": [{"type": "null"}, {"type": "integer"}]}, [None, 5]),
        ({"type": "integer", "anyOf": [{"minimum": 1}, {"maximum": 9}]}, ["none", 5]),
    ],
)
def test_what_json_has_as_a_string_is_one_where_a_string_may_be(item, value):
    defs = {"$defs": {"O": {"anyOf": [{"type": "string"}, {"type": "null"}]}}}
    assert typed('["none", "5"]', {"type": "array", "items": item}, **defs) == value


def test_additional_properties_have_a_schema():
    tools = [{"name": "f", "parameters": {"additionalProperties": {"type": "integer"}}}]
    assert ToolSchemas(tools).arguments("f", {"x": "1"}) == {"x": 1}


@pytest.mark.parametrize("tools", [[None], ["f"], [{}], [{"function": None}], [{"name": "f", "parameters": []}],
                                   [{"name": "f", "parameters": {"properties": [1]}}], [{"name": ["f"]}]])  # fmt: skip
def test_odd_tools_leave_the_text_alone(tools):
    assert ToolSchemas(tools).arguments("f", {"x": "1"}) == {"x": "1"}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text("ab<>/\n "),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", max_size=2), inner, max_size=3),
    max_leaves=6,
)
KINDS = {type(None): "null", bool: "boolean", int: "integer", float: "number", str: "string", list: "array",
         dict: "object"}  # fmt: skip


@hypothesis.given(st.dictionaries(st.text("abc_", min_size=1), JSON))
def test_what_the_template_writes_is_read_back(arguments):
    properties = {name: {"type": KINDS[type(value)]} for name, value in arguments.items()}
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"properties": properties}}}]
    text = "<tool_call>\n<function=f>\n"
    for name, value in arguments.items():
        written = json.dumps(value, ensure_ascii=False) if isinstance(value, (list, dict)) else str(value)
        text += f"<parameter={name}>\n{written}\n</parameter>\n"
    reply = parse_reply(text + "</function>\n</tool_call>", tools=tools)
    assert [call.arguments for call in reply.tool_calls] == [arguments]
    assert [type(value) for value in reply.tool_calls[0].arguments.values()] == [*map(type, arguments.values())]


@pytest.mark.parametrize(
    ("text", "schema", "value"),
    [
        ("['a', True, None, (1, 2)]", {"type": "array"}, ["a", True, None, [1, 2]]),
        ('{"a": "x\ny\tz", "b": [1, 2,],}', {"type": "object"}, {"a": "x\ny\tz", "b": [1, 2]}),
        ("{'it': \"it's\", 'q': 'a\\'b\\n'}", {"type": "object"}, {"it": "it's", "q": "a'b\n"}),
        ('"{\\"a\\": [1]}"', {"type": "object"}, {"a": [1]}),
        ('"[1, 2]"', {"type": "List[int]"}, [1, 2]),
        (".5", {"type": "float"}, 0.5), ("+3", {"type": "int"}, 3), ("5.", {"type": "number"}, 5.0),
        ("null", {"type": "Optional[str]"}, None), ("5", {"type": "int | None"}, 5), ("x", {"type": "str|null"}, "x"),
        ("{'a': 1}", {"type": "dict[str, Any]"}, {"a": 1}), ("yes", {"type": "bool"}, "yes"),
        ('"b"', {"enum": ["a", "b"]}, "b"), ('"b"', {"enum": ['"b"']}, '"b"'),
        ('["1", "2"]', {"type": "array", "items": {"type": "integer"}}, [1, 2]),
        ('[3, "b", 4]', {"prefixItems": [{"type": "number"}], "items": {"type": "string"}}, [3, "b", "4"]),
        ('["3"]', {"prefixItems": [{"type": "number"}, {"type": "string"}]}, [3]),
        ('[{"n": "5", "s": 5}]', {"items": {"properties": {"n": {"type": "integer"}, "s": {"type": "string"}}}},
         [{"n": 5, "s": "5"}]),
        ("{'a'}", {"type": "object"}, "{'a'}"), ("[1 2]", {"type": "array"}, "[1 2]"), ("[1", {"type": "array"}, "[1"),
        ("[x]", {"type": "array"}, "[x]"), ("__import__('os')", {"type": "object"}, "__import__('os')"),
        ("(" * 5000 + ")" * 5000, {"type": "array"}, "(" * 5000 + ")" * 5000),
    ],
)  # fmt: skip
def test_what_models_make_of_json(text, schema, value):
    assert same(typed(text, schema), value)


def test_names_of_parameters() -> None:
    """None where any may be given; from references and parts of a schema too; Anthropic's form."""
    def names(**schema):
        return ToolSchemas([{"name": "f", "input_schema": schema}]).names("f")

    assert names(properties={"a": {}, "b": {}}) == {"a", "b"} and names(properties={}) == frozenset()
    assert names() is None and names(type="object") is None
    assert names(properties={"a": {}}, additionalProperties={}) is None
    assert names(**{"$ref": "#/$defs/x", "$defs": {"x": {"properties": {"c": {}}}}}) == {"c"}
    assert names(properties={"a": {}}, allOf=[{"properties": {"d": {}}}, {"required": ["d"]}]) == {"a", "d"}
    assert ToolSchemas(None).names("f") is None and not ToolSchemas(None).offers_any
