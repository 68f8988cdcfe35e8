"""What `response_format` may be, as a grammar in llguidance's Lark.

Knows the forms by name; what their inside means is schema.py's, regex.py's and gbnf.py's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from mlx_qwen35.errors import ArgumentError
from mlx_qwen35.grammar.gbnf import lark_of
from mlx_qwen35.grammar.regex import whole
from mlx_qwen35.grammar.schema import Schema

# The model's own way with tokens: llguidance would else take the tokens of a text that is certain to come.
HEAD = '%llguidance {"no_forcing": true}\n'
# Between a schema's tokens: a space, or a new line and how far it is indented. Without a bound models can lose
# themselves in it.
_SPACE = r" |\n[ \t]{0,60}"
# Escapes but \u: with these, a text has one spelling.
_ESCAPES = 'nrbtf\\"'
_NAMED = ("json_schema", "json_object", "text", "regex", "grammar", "gbnf")
_WAYS = (
    "a JSON schema, a pydantic model, 'json', a compiled regular expression, or an object whose 'type' is one of "
    + ", ".join(_NAMED)
)


def form(response_format: Any) -> str | None:
    """The grammar of a response format; None: the answer has no form. Raises ArgumentError."""
    if response_format is None:
        return None
    if isinstance(response_format, re.Pattern):
        return _regex(response_format)
    if response_format == "json":
        return _json({"type": "object"}, "response_format")
    if isinstance(response_format, str):
        raise ArgumentError(f"response_format={response_format!r} is no form; give {_WAYS}")
    for name in ("model_json_schema", "json_schema"):  # a pydantic model, and what else pydantic makes schemas of
        make = getattr(response_format, name, None)
        if callable(make) and not isinstance(response_format, Mapping):
            return _json(make(), f"the schema of {getattr(response_format, '__name__', 'response_format')}")
    if isinstance(response_format, Mapping) and response_format.get("type") in _NAMED:
        return _named(response_format)
    if isinstance(response_format, (Mapping, bool)):
        return _json(response_format, "response_format")
    raise ArgumentError(f"response_format is a {type(response_format).__name__}; give {_WAYS}")


def json_rule(schema: dict[str, Any] | bool) -> str:
    """What llguidance writes for a schema (one that schema.py made) within a grammar."""
    if schema is True:
        schema = {}
    if schema is False:
        raise ArgumentError("the schema false allows no answer at all; give another one")
    # Names and values keep their order, and every character that Lark could take for its own is an escape.
    options = {"whitespace_pattern": _SPACE}
    if _tells_names_apart(schema):
        options["json_allowed_escapes"] = _ESCAPES
    return "%json " + json.dumps({"x-guidance": options, **schema})


def _tells_names_apart(part: Any) -> bool:
    """Whether an object has names of its own beside free ones: llguidance compares names as they are written, and
    {"\\u0061": 1} would be a free name that is read as the own name "a"."""
    if isinstance(part, list):
        return any(map(_tells_names_apart, part))
    if not isinstance(part, dict):
        return False
    named = part.get("properties") or part.get("required")
    free = part.get("additionalProperties", True) is not False
    return bool(part.get("patternProperties") or (named and free)) or any(map(_tells_names_apart, part.values()))


def _json(schema: Any, where: str) -> str:
    return f"{HEAD}start: {json_rule(Schema(schema, where).whole())}\n"


def _regex(pattern: str | re.Pattern[str]) -> str:
    return f"{HEAD}start: TEXT\nTEXT: /{whole(pattern)}/\n"


def _named(value: Mapping[str, Any]) -> str | None:
    kind = value["type"]
    if kind == "text":
        return None
    if kind == "json_object":
        return _json({"type": "object"}, "response_format")
    if kind == "json_schema":
        inner = value.get("json_schema")
        if not isinstance(inner, Mapping) or "schema" not in inner:
            raise ArgumentError(
                'response_format has no schema; write {"type": "json_schema", "json_schema": {"name": ..., '
                '"schema": ...}}'
            )
        return _json(inner["schema"], f"the schema {inner.get('name', '')!r}" if "name" in inner else "response_format")
    key = {"regex": "pattern"}.get(kind, "grammar")
    text = value.get(key, value.get(kind))
    if isinstance(text, re.Pattern) and kind == "regex":
        return _regex(text)
    if not isinstance(text, str) or not text.strip():
        raise ArgumentError(f'response_format has no {key}; write {{"type": "{kind}", "{key}": "..."}}')
    if kind == "regex":
        return _regex(text)
    # Behind a text of the user's own, whose lines are counted in errors.
    return HEAD + lark_of(text) if kind == "gbnf" else f"{text}\n{HEAD}"
