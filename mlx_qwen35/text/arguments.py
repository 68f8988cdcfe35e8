"""Types the arguments of a tool call by the tool's JSON schema. Knows schemas; knows nothing of tags or streams.

The family writes every argument as plain text: strings without quotes, other scalars as Python or JSON prints them
(True, None, 2.5), lists and objects as JSON, or as Python prints them. Only the schema tells which is meant. A text
that its schema cannot read stays the text it is: the caller sees what the model wrote.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from mlx_qwen35.text.lenient import NoValue, read_number, read_value

_Schema = Mapping[str, Any]
_MAX_DEPTH = 8  # of $ref and anyOf within one another; a schema that refers to itself ends here

# Names for types that are not JSON Schema's, as tools are described in the wild: Python's, SQL's, other languages'.
_ALIASES = {
    **dict.fromkeys(("int", "int8", "int16", "int32", "int64", "uint", "uint32", "uint64", "long", "short"), "integer"),
    **dict.fromkeys(("float", "float32", "float64", "double", "decimal", "numeric", "real"), "number"),
    **dict.fromkeys(("str", "text", "char", "varchar"), "string"),
    **dict.fromkeys(("dict", "map", "mapping", "struct", "json", "record"), "object"),
    **dict.fromkeys(("list", "tuple", "sequence", "set", "vector"), "array"),
    **dict.fromkeys(("bool",), "boolean"),
    **dict.fromkeys(("none", "nil", "nonetype", "void"), "null"),
}
_GENERIC = re.compile(r"\s*([\w.]+)\s*(?:[\[<(](.*)[\])>])?\s*", re.DOTALL)


class ToolSchemas:
    """The parameter schemas of some tools: in OpenAI's form ({"type": "function", "function": {...}}), bare ({"name":
    ..., "parameters": {...}}) or Anthropic's ({"name": ..., "input_schema": {...}}). What is in none of these forms is
    ignored: its arguments stay text."""

    def __init__(self, tools: Iterable[Any] | None):
        self._parameters: dict[str, _Schema] = {}
        for tool in tools or ():
            function = _mapping(_mapping(tool).get("function", tool))
            if isinstance(function.get("name"), str):
                schema = function.get("parameters", function.get("input_schema", function.get("inputSchema")))
                self._parameters[function["name"]] = _mapping(schema)

    @property
    def offers_any(self) -> bool:
        """Whether there is any tool."""
        return bool(self._parameters)

    def offers(self, function: str) -> bool:
        """Whether there is a tool of that name."""
        return function in self._parameters

    def names(self, function: str) -> frozenset[str] | None:
        """The parameters that a function may have; None: any, because the tool or its schema is not known, or says
        so."""
        root = self._parameters.get(function)
        if root is None:
            return None
        found: set[str] = set()
        return frozenset(found) if _collect(root, root, found, 0) else None

    def required(self, function: str) -> frozenset[str]:
        """The parameters that a call has to have."""
        names = self._parameters.get(function, {}).get("required")
        return frozenset(name for name in names if isinstance(name, str)) if isinstance(names, list) else frozenset()

    def is_text(self, function: str, name: str) -> bool:
        """Whether every text is a value of a parameter as it stands, and is never read as anything else."""
        schema = _mapping(_parameter(self._parameters.get(function, {}), name))
        read = schema.keys() & {"$ref", "anyOf", "oneOf", "allOf", "const", "enum"}
        return not read and _kinds(schema, None) in ([], ["string"])

    def arguments(self, function: str, texts: Mapping[str, str]) -> dict[str, Any]:
        """The arguments of a call to `function`, given as raw texts by parameter name."""
        root = self._parameters.get(function, {})
        return {name: _typed(text, _parameter(root, name), root) for name, text in texts.items()}

    def fitted(self, function: str, values: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a call to `function`, given as a JSON object: texts where the schema has none are read."""
        root = self._parameters.get(function, {})
        return {name: _fitted(value, _mapping(_parameter(root, name)), root, 0) for name, value in values.items()}


def _collect(schema: _Schema, root: _Schema, found: set[str], depth: int) -> bool:
    """Adds the names of a schema's properties; returns whether there are no others."""
    if depth > _MAX_DEPTH:
        return False
    if "$ref" in schema:
        return _collect(_resolve(schema["$ref"], root), root, found, depth + 1)
    parts = [_mapping(part) for key in ("allOf", "anyOf", "oneOf") for part in _list(schema.get(key))]
    named = isinstance(schema.get("properties"), Mapping)
    found.update(name for name in _mapping(schema.get("properties")) if isinstance(name, str))
    told = [_collect(part, root, found, depth + 1) for part in parts if part.keys() - {"required"}]
    if schema.get("additionalProperties") not in (None, False) or schema.get("patternProperties"):
        return False
    return (named or schema.get("additionalProperties") is False or bool(told)) and all(told)


def _parameter(root: _Schema, name: str) -> Any:
    found = _property(root, name, root, 0)
    return root.get("additionalProperties") if found is None else found


def _property(schema: _Schema, name: str, root: _Schema, depth: int) -> Any:
    if depth > _MAX_DEPTH:
        return None
    if "$ref" in schema:
        return _property(_resolve(schema["$ref"], root), name, root, depth + 1)
    found = _mapping(schema.get("properties")).get(name)
    for part in (_mapping(part) for key in ("allOf", "anyOf", "oneOf") for part in _list(schema.get(key))):
        found = _property(part, name, root, depth + 1) if found is None else found
    return found


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
        if fits and isinstance(allowed, list):
            value, fits = _among(value, allowed)
        if fits:
            yield _fitted(value, schema, root, depth)


def _among(value: Any, allowed: list[Any]) -> tuple[Any, bool]:
    """One of the values of an enum; a string also as JSON would write it."""
    if isinstance(value, str) and value not in allowed and len(value) > 1 and value.strip()[:1] in "\"'":
        value = _json(value)
    return value, any(_same(value, other) for other in allowed)


def _fitted(value: Any, schema: _Schema, root: _Schema, depth: int) -> Any:
    """A value that JSON typed, with the texts inside it that its schema would have otherwise read by that."""
    if depth > _MAX_DEPTH or not schema:
        return value
    if "$ref" in schema:
        return _fitted(value, _resolve(schema["$ref"], root), root, depth + 1)
    if isinstance(value, str):
        plain = _takes_text(schema, root, depth)
        return value if plain else next(iter(_readings(value, schema, root, depth + 1)), value)
    if isinstance(value, list):
        first, items = schema.get("prefixItems"), _mapping(schema.get("items"))
        each = [_mapping(own) for own in first] if isinstance(first, list) else []
        each += [items] * (len(value) - len(each))
        return [_fitted(item, own, root, depth + 1) for item, own in zip(value, each, strict=False)]
    if isinstance(value, dict):
        return {
            name: _fitted(item, _mapping(_property(schema, name, root, 0)), root, depth + 1)
            for name, item in value.items()
        }
    if isinstance(value, (int, float)) and not isinstance(value, bool) and _kinds(schema, None) == ["string"]:
        return json.dumps(value)
    return value


def _takes_text(schema: _Schema, root: _Schema, depth: int) -> bool:
    """Whether a string is one of the values, so that one that JSON has as a string is what was meant."""
    if depth > _MAX_DEPTH or "$ref" in schema:
        return depth <= _MAX_DEPTH and _takes_text(_resolve(schema["$ref"], root), root, depth + 1)
    unions = [schema[key] for key in ("anyOf", "oneOf", "allOf") if isinstance(schema.get(key), list)]
    kinds = _kinds(schema, schema.get("enum"))
    if kinds or not unions:
        return "string" in kinds or not kinds
    return any(_takes_text(_mapping(part), root, depth + 1) for union in unions for part in union)


def _kinds(schema: _Schema, allowed: Any) -> list[str]:
    """The type names to try, in the order of `_READERS`, which ends with string."""
    declared = schema.get("type")
    if declared is None:
        if "properties" in schema:
            declared = "object"
        elif "items" in schema or "prefixItems" in schema:
            declared = "array"
        else:
            declared = list(_READERS) if isinstance(allowed, list) else []
    names: set[str] = set()
    for name in declared if isinstance(declared, list) else [declared]:
        names |= _type_names(str(name), 0)
    if schema.get("nullable") is True:
        names.add("null")
    return [name for name in _READERS if name in names]


def _type_names(text: str, depth: int) -> set[str]:
    """JSON Schema's names for a type, however it is called: "int", "List[str]", "Optional[int]", "str | None"."""
    if depth > _MAX_DEPTH or len(text) > 200:
        return set()
    if "|" in text and not re.search(r"[\[<(].*\|.*[\])>]", text):
        return set().union(*(_type_names(part, depth + 1) for part in text.split("|")))
    found = _GENERIC.fullmatch(text)
    if found is None:
        return set()
    name, inner = found.group(1).rpartition(".")[2].lower(), found.group(2)
    if name == "optional" and inner:
        return _type_names(inner, depth + 1) | {"null"}
    if name == "union" and inner:
        return set().union(*(_type_names(part, depth + 1) for part in re.split(r"[,|]", inner)))
    return {_ALIASES.get(name, name)}


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


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _same(value: Any, other: Any) -> bool:
    return value == other and isinstance(value, bool) == isinstance(other, bool)  # in Python True == 1


def _json(text: str) -> Any:
    """The value of a text, or None: a null never counts as a list or an object anyway."""
    try:
        return read_value(text)
    except NoValue:
        return None


def _null(text: str) -> tuple[Any, bool]:
    return None, text.strip().lower() in ("null", "none")


def _boolean(text: str) -> tuple[Any, bool]:
    word = text.strip().lower()
    return word == "true", word in ("true", "false")


def _number(text: str) -> tuple[Any, bool]:
    try:
        return read_number(text), True
    except NoValue:
        return None, False


def _integer(text: str) -> tuple[Any, bool]:
    value, fits = _number(text)
    if not fits or value != int(value):
        return None, False
    return int(value), True


def _array(text: str) -> tuple[Any, bool]:
    value = _unwrapped(text)
    return value, isinstance(value, list)


def _object(text: str) -> tuple[Any, bool]:
    value = _unwrapped(text)
    return value, isinstance(value, dict)


def _unwrapped(text: str) -> Any:
    """A value, also one that is written as JSON in a JSON string."""
    value = _json(text)
    return _json(value) if isinstance(value, str) else value


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
