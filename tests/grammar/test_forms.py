"""What can be asked, what is refused, and how it is said."""

import json
import re
from typing import Literal, Optional

import pytest

from mlx_qwen35.errors import ArgumentError
from mlx_qwen35.grammar import Grammar
from tests.grammar.walks import run


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
