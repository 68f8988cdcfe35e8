"""What can be asked, what is refused, and how it is said."""

import json
import re
from decimal import Decimal
from typing import Annotated, Literal, Optional

import numpy as np
import pytest
from jsonschema import Draft202012Validator

from mlx_qwen35.errors import ArgumentError
from mlx_qwen35.grammar import Grammar
from tests.grammar.walks import run, walk


def fits(processor, form, text) -> bool:
    matcher = Grammar.of(processor, response_format=form).matcher(thinking=False)
    return run(processor, matcher, text) and matcher.complete


def test_json_is_an_object(processor):
    for form in ("json", {"type": "json_object"}):
        assert fits(processor, form, '{"a": [1, -2.5e3, {"b": null}],\n  "c": "x\\n"}')
        assert not fits(processor, form, "[1]") and not fits(processor, form, "{} {}")
    assert fits(processor, {}, "[1]") and fits(processor, True, "null")


def test_openai_schema(processor):
    schema = {"type": "array", "items": {"enum": ["red", "blue"]}, "minItems": 1}
    for form in (schema, {"type": "json_schema", "json_schema": {"name": "colours", "schema": schema, "strict": True}}):
        assert fits(processor, form, '["red", "blue"]')
        assert not fits(processor, form, "[]") and not fits(processor, form, '["green"]')


def test_pydantic_model(processor):
    pydantic = pytest.importorskip("pydantic")

    class Leg(pydantic.BaseModel):
        to: str = pydantic.Field(min_length=2)
        means: Literal["train", "boat"]
        stops: Optional[int] = None  # noqa: UP045

    class Trip(pydantic.BaseModel):
        model_config = {"extra": "forbid"}
        legs: list[Leg] = pydantic.Field(min_length=1)
        day: "pydantic.PastDate"

    text = '{"legs": [{"to": "Riga", "means": "boat", "stops": null}], "day": "2020-02-29"}'
    assert Trip.model_validate_json(text)
    for form in (Trip, pydantic.TypeAdapter(Trip)):
        assert fits(processor, form, text)
        assert not fits(processor, form, text.replace("boat", "bus"))
        assert not fits(processor, form, text.replace("2020", "2021"))
        assert not fits(processor, form, '{"legs": [], "day": "2020-02-28"}')


def test_pydantic_types_whose_schema_is_wider(processor):
    """What docs/FORMS.md says to write instead."""
    pydantic = pytest.importorskip("pydantic")
    price = {"type": "string", "pattern": r"^-?[0-9]{1,9}\.[0-9]{2}$"}
    counts = {"patternProperties": {"^[0-9]{1,9}$": {"type": "integer"}}, "additionalProperties": False}
    model = pydantic.create_model(
        "Shop",
        price=Annotated[Decimal, pydantic.WithJsonSchema(price)],
        counts=Annotated[dict[int, int], pydantic.WithJsonSchema({"type": "object", **counts})],
        __config__={"extra": "forbid"},
    )
    text = '{"price": "-3.50", "counts": {"12": 1}}'
    assert fits(processor, model, text) and model.model_validate_json(text).counts == {12: 1}
    for bad in (text.replace("3.50", "three"), text.replace("12", "x"), text.replace("3.50", "3.5")):
        assert not fits(processor, model, bad), bad


def test_regular_expressions(processor):
    for form in (re.compile(r"(yes|no), \d{2}"), {"type": "regex", "pattern": r"(yes|no), \d{2}"}):
        assert (
            fits(processor, form, "no, 42") and not fits(processor, form, "no, 4") and not fits(processor, form, "so")
        )
    assert fits(processor, re.compile("É+", re.IGNORECASE), "éÉ")


def test_grammars(processor):
    lark = 'start: "a" b+\nb: "b" | "(" b ")"\n'
    gbnf = 'root ::= "a" b+\nb ::= "b" | "(" b ")"\n'
    for form in ({"type": "grammar", "grammar": lark}, {"type": "gbnf", "grammar": gbnf}):
        assert (
            fits(processor, form, "ab((b))b") and not fits(processor, form, "ab((b)") and not fits(processor, form, "b")
        )


def test_white_space_in_json_has_bounds(processor):
    assert fits(processor, {"type": "array"}, '[\n    1,\n    "a"\n]') and fits(processor, {"type": "array"}, "[1, 2]")
    assert not fits(processor, {"type": "array"}, "[  1]") and not fits(processor, {"type": "array"}, "[\n\n1]")


@pytest.mark.parametrize(
    "form, words",
    [
        ({"type": "object", "properties": {"a": {"not": {}}}}, ["#/properties/a", "'not'"]),
        ({"type": "array", "uniqueItems": True}, ["at #:", "'uniqueItems'"]),
        ({"if": {}, "then": {}}, ["'if'"]),
        ({"$defs": {"x": {"contains": {}}}, "$ref": "#/$defs/x"}, ["#/$defs/x", "'contains'"]),
        ({"type": "object", "propertyNames": {}}, ["'propertyNames'"]),
        ({"type": "object", "dependentRequired": {}}, ["'dependentRequired'"]),
        ({"type": "object", "unevaluatedProperties": False}, ["'unevaluatedProperties'"]),
        ({"type": "string", "format": "binary"}, ["'binary'", "#/format"]),
        ({"type": "string", "minimun": 3}, ["'minimun'"]),
        ({"type": "strin"}, ["'strin'"]),
        ({"$ref": "#/$defs/x"}, ["#/$defs/x", "nowhere"]),
        ({"$ref": "https://example.com"}, ["https://example.com"]),
        ({"$defs": {"x": {"$ref": "#/$defs/x"}}, "$ref": "#/$defs/x"}, ["refers to itself"]),
        (
            {"properties": {"p": {"$ref": "#/$defs/x"}}, "$defs": {"x": {"$ref": "#/$defs/x"}}},
            ["#/$defs/x", "refers to"],
        ),
        ({"anyOf": [{"type": "null"}, {"allOf": [{"$ref": "#"}]}]}, ["refers to itself"]),
        (
            {
                "properties": {"p": {"$ref": "#/$defs/y"}},
                "anyOf": [{"$ref": "#/$defs/y"}],
                "$defs": {"y": {"$ref": "#"}},
            },
            ["refers to itself"],
        ),
        ({"type": "string", "pattern": "a(?=b)"}, ["#/pattern", "look"]),
        ({"type": "string", "pattern": "("}, ["#/pattern", "no regular expression"]),
        ({"type": "string", "minLength": -1}, ["#/minLength"]),
        ({"const": 2**60}, ["#/const", "2**53"]),
        ({"const": float("nan")}, ["#/const"]),
        ({"const": "\ud800"}, ["surrogate"]),
        ({"enum": []}, ["#/enum"]),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, ["oneOf"]),
        ({"type": "object", "minProperties": 2}, ["'minProperties'"]),
        (False, ["false"]),
        ({"type": "json_schema"}, ["json_schema"]),
        ({"type": "regex"}, ["pattern"]),
        ({"type": "regex", "pattern": r"(a)\1"}, ["reference to a group"]),
        (re.compile(b"a"), ["bytes"]),
        ({"type": "grammar", "grammar": "start: nothing"}, ["nothing"]),
        ({"type": "gbnf", "grammar": "root ::= x"}, ["line 1", "'x'"]),
        ("xml", ["'xml'"]),
        (3, ["int"]),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(processor, form, words):
    with pytest.raises(ArgumentError) as caught:
        Grammar.of(processor, response_format=form)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message and len(message) < 400


@pytest.mark.parametrize(
    "schema, good, bad",
    [
        ({"type": "array", "items": [{"type": "integer"}], "additionalItems": False}, [[], [1]], [["a"], [1, 2]]),
        ({"type": "array", "items": {"$ref": "#"}}, [[], [[], [[]]]], [[1]]),
        ({"type": "array", "uniqueItems": False, "items": {"type": "null"}}, [[None]], [[1]]),
        ({"oneOf": [{"const": 1}, {"enum": ["a", 2]}]}, [1, "a", 2], [3]),
        ({"type": "string", "format": "password"}, ["x"], [1]),
        ({"type": "integer", "format": "int32"}, [2**31 - 1, -(2**31)], [2**31]),
        ({"type": "integer"}, [10**18, 0], []),
        ({"type": "integer", "maximum": 2**63 - 1}, [10**18], []),
        ({"type": "number", "minimum": -1.5, "exclusiveMaximum": 2}, [-1.5, 1.99], [2, -1.6]),
        (
            {"$id": "https://example.com/x", "$schema": "https://json-schema.org/draft/2020-12/schema", "const": 1},
            [1],
            [],
        ),
        ({"type": "string", "minLength": 1, "maxLength": 2}, ["é😀"], ["", "abc"]),
        ({"type": "string", "format": "date", "pattern": "^2"}, ["2000-02-29"], ["1900-02-28", "2100-02-29"]),
    ],
)
def test_schemas_mean_what_the_standard_says(processor, schema, good, bad):
    for value in good:
        assert fits(processor, schema, json.dumps(value, ensure_ascii=False)), value
    for value in bad:
        assert not fits(processor, schema, json.dumps(value, ensure_ascii=False)), value


_NAMED = {"properties": {"a": {"type": "integer"}, "l\n": {"type": "integer"}, 'q"\\\x7f': {"type": "integer"}}}
OBJECTS = [
    {"type": "object", **_NAMED},
    {"type": "object", **_NAMED, "additionalProperties": {"type": "string"}, "required": ["l\n", "r"]},
    {"type": "object", "patternProperties": {"^b": {"type": "integer"}}},
    {"type": "object", **_NAMED, "patternProperties": {"^[^a]": {"type": "integer"}}, "additionalProperties": False},
    {"type": "object", "required": ["r"], "additionalProperties": {"type": "string"}, "properties": {"r": {}}},
    {"type": "array", "items": {"$ref": "#/$defs/o"}, "$defs": {"o": {"type": "object", **_NAMED}}},
    {"allOf": [{"type": "object", **_NAMED}, {"additionalProperties": {"type": ["string", "integer"]}}]},
    {"anyOf": [{"type": "object", **_NAMED, "additionalProperties": {"type": "string"}}, {"type": "null"}]},
]
SPELT = [r"\u0061", r"l\u000a", r"l\u000A", r"l\n", r"q\"\u005c\u007f", r"q\"\\\u007f", r"\u0062x", r"\u0072"]


@pytest.mark.parametrize("schema", OBJECTS)
def test_free_names_spell_no_given_name(processor, schema):
    valid = Draft202012Validator(schema).is_valid
    for name in SPELT:
        for value in ('"x"', "1"):
            for before in ("", '"a": 1, ', '"l\\n": 1, ', '"r": "", ', '"l\\n": 1, "r": "", '):
                for text in (f'{{{before}"{name}": {value}}}', f'[{{{before}"{name}": {value}}}]'):
                    assert not fits(processor, schema, text) or valid(json.loads(text)), text


@pytest.mark.parametrize("schema", OBJECTS)
def test_free_names_in_walks(processor, schema):
    grammar, ended = Grammar.of(processor, response_format=schema), 0
    for seed in range(15):
        answer = walk(processor, grammar.matcher(thinking=False), np.random.default_rng(seed), leaning=0.4)
        ended += answer.ended
        if answer.complete:
            text = processor.decode(answer.tokens)
            assert Draft202012Validator(schema).is_valid(json.loads(text)), text
    assert ended > 5


def test_free_names_are_free(processor):
    text = '{"a": 1, "b": "\\n\\"", "é": [], "A\\\\": {"a": "x"}, "": null}'
    assert fits(processor, OBJECTS[0], text) and not fits(processor, OBJECTS[0], text.replace("1", '"1"'))
    # Other objects and strings keep what only \u can write.
    assert fits(processor, {"type": "object"}, '{"a": "\\u001b[0m"}') and fits(processor, {}, '"\\u001b[0m"')
    closed = {"type": "object", "properties": {"a": {"type": "string"}}, "additionalProperties": False}
    assert fits(processor, closed, '{"a": "\\u001b[0m"}') and not fits(processor, closed, '{"\\u0061": "b"}')
    # And the strings of those that do not are held to their patterns as ever.
    kept = {"type": "object", "properties": {"a": {"pattern": '^[^"]*$'}}}
    assert fits(processor, kept, '{"a": "b\\n\\\\"}') and not fits(processor, kept, '{"a": "b\\""}')
