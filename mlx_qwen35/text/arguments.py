"""Types the arguments of a tool call by the tool's JSON schema. Knows schemas; knows nothing of tags or streams.

The family writes every argument as plain text: strings without quotes, other scalars as Python or JSON prints them
(True, None, 2.5), lists and objects as JSON. Only the schema tells which is meant. A text that its schema cannot
read stays the text it is: the caller sees what the model wrote.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

_Schema = Mapping[str, Any]
_MAX_DEPTH = 8  # of $ref and anyOf within one another; a schema that refers to itself ends here


class ToolSchemas:
    """The parameter schemas of some tools, in OpenAI's form ({"type": "function", "function": {...}}) or bare
    ({"name": ..., "parameters": {...}}). What is in neither form is ignored: its arguments stay text."""

    def __init__(self, tools: Iterable[Any] | None):
        self._parameters: dict[str, _Schema] = {}
        for tool in tools or ():
            function = _mapping(_mapping(tool).get("function", tool))
            if isinstance(function.get("name"), str):
                self._parameters[function["name"]] = _mapping(function.get("parameters"))

    def arguments(self, function: str, texts: Mapping[str, str]) -> dict[str, Any]:
        """The arguments of a call to `function`, given as raw texts by parameter name."""
        root = self._parameters.get(function, {})
        return {name: _typed(text, _parameter(root, name), root) for name, text in texts.items()}


def _parameter(root: _Schema, name: str) -> Any:
    schema = _mapping(root.get("properties")).get(name)
    return root.get("additionalProperties") if schema is None else schema


def _typed(text: str, schema: Any, root: _Schema) -> Any:
    for value in _readings(text, _mapping(schema), root, 0):
        return value
    return text


def _readings(text: str, schema: _Schema, root: _Schema, depth: int) -> Iterable[Any]:
    """Every value that `text` can mean under `schema`, the likeliest first. A string is the last resort of a union:
    the text "5" for an integer-or-string is more likely the number."""
    if depth > _MAX_DEPTH:
        return
    if "$ref" in schema:
        yield from _readings(text, _resolve(schema["$ref"], root), root, depth + 1)
        return
    unions = [schema[key] for key in ("anyOf", "oneOf", "allOf") if isinstance(schema.get(key), list)]
    values = [v for union in unions for part in union for v in _readings(text, _mapping(part), root, depth + 1)]
    if values:
        yield from sorted(values, key=lambda value: isinstance(value, str))
        return
    allowed = [schema["const"]] if "const" in schema else schema.get("enum")
    for kind in _kinds(schema, allowed):
        value, fits = _READERS[kind](text)
        if fits and (not isinstance(allowed, list) or any(_same(value, other) for other in allowed)):
            yield value


def _kinds(schema: _Schema, allowed: Any) -> list[str]:
    """The type names to try, in the order of `_READERS`, which ends with string."""
    declared = schema.get("type")
    if declared is None:
        if "properties" in schema:
            declared = "object"
        elif "items" in schema:
            declared = "array"
        else:
            declared = list(_READERS) if isinstance(allowed, list) else []
    names = {str(name).lower() for name in (declared if isinstance(declared, list) else [declared])}
    if schema.get("nullable") is True:
        names.add("null")
    return [name for name in _READERS if name in names]


def _resolve(reference: Any, root: _Schema) -> _Schema:
    """The schema under a local reference ("#/$defs/Unit"); {} if there is none."""
    if not isinstance(reference, str) or not reference.startswith("#"):
        return {}
    found: Any = root
    for step in reference[1:].split("/")[1:]:
        found = _mapping(found).get(step.replace("~1", "/").replace("~0", "~"))
    return _mapping(found)


def _mapping(value: Any) -> _Schema:
    return value if isinstance(value, Mapping) else {}


def _same(value: Any, other: Any) -> bool:
    return value == other and isinstance(value, bool) == isinstance(other, bool)  # in Python True == 1


def _json(text: str) -> Any:
    """The value of a JSON text, or None: a null never counts as a list, an object or a number anyway. Python's reader
    would take NaN and 1e999 too, which are no JSON value that could be written back."""
    try:
        return json.loads(text, parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError):
        return None


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def _null(text: str) -> tuple[Any, bool]:
    return None, text.strip().lower() in ("null", "none")


def _boolean(text: str) -> tuple[Any, bool]:
    word = text.strip().lower()
    return word == "true", word in ("true", "false")


def _number(text: str) -> tuple[Any, bool]:
    value = _json(text)
    return value, type(value) in (int, float)


def _integer(text: str) -> tuple[Any, bool]:
    value, fits = _number(text)
    if not fits or value != int(value):
        return None, False
    return int(value), True


def _array(text: str) -> tuple[Any, bool]:
    value = _json(text)
    return value, isinstance(value, list)


def _object(text: str) -> tuple[Any, bool]:
    value = _json(text)
    return value, isinstance(value, dict)


def _string(text: str) -> tuple[Any, bool]:
    return text, True


_READERS = {
    "null": _null,
    "boolean": _boolean,
    "integer": _integer,
    "number": _number,
    "array": _array,
    "object": _object,
    "string": _string,
}
