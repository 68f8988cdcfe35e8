"""Values of a call's parameters: texts and what is written like them, or JSON. The reader's own eye decides.

A parameter's text is typed by its schema when it is read (text/arguments.py), a number before a string. So where a
schema takes a string and something else, the string is none that would be read as the other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mlx_qwen35.grammar.formats import FORMATS, UNCHECKED
from mlx_qwen35.grammar.forms import json_rule
from mlx_qwen35.grammar.regex import found, literal, whole, without
from mlx_qwen35.grammar.schema import REMARKS, TAGS, TYPES, Schema
from mlx_qwen35.text.reply import parse_reply

CLOSING = "\\n" + literal("</parameter>") + "\\n"
# A line's end before the closing tag is the tag's, also one of two characters.
_TEXT = f"/{without(TAGS)}/ & /(?s:.*[^\\r])?/"
_NUMBER = r"-?(?:0|[1-9][0-9]{0,17})(?:\.[0-9]{1,17})?(?:[eE][+-]?[0-9]{1,2})?"
_SCALARS = {
    "boolean": "true|false|True|False",
    "null": "null|None",
    "integer": "-?(?:0|[1-9][0-9]{0,17})",
    "number": _NUMBER,
}
# What a reader may take for another type than a string: white space around it, letters of any size, signs, ...
_TAKEN = {
    "boolean": r"/\s*(?i:true|false)\s*/",
    "null": r"/\s*(?i:null|none)\s*/",
    "number": r"/\s*[+-]?[0-9\x{2e}\p{Nd}](?s:.*)/",
    "array": r"/\s*[\x{5b}\x{28}\x{22}\x{27}](?s:.*)/",
    "object": r"/\s*[\x{7b}\x{22}\x{27}](?s:.*)/",
}
_DEEPEST = 16
_STRING = ("minLength", "maxLength", "pattern", "format")


class Values:
    """The values of one function's parameters. terminals: the lines that the rules need besides themselves."""

    def __init__(self, schema: Schema, prefix: str, name: str, function: Mapping[str, Any]) -> None:
        self._schema, self._prefix, self._name, self._tool = schema, prefix, name, function
        self.terminals: list[str] = []

    def rules(self, index: int, key: str, described: tuple[Any, str]) -> str:
        """What stands behind a parameter's opening tag, its closing tag included."""
        alternatives: list[tuple[str, Any]] = []
        self._collect(key, *described, alternatives, 0)
        strings = [text for kind, text in alternatives if kind == "string"]
        plain = [text for kind, text in alternatives if kind == "plain"]
        structured = [part for kind, part in alternatives if kind == "json"]
        taken = {text for kind, text in alternatives if kind == "taken"}
        name = f"{self._prefix.upper()}V{index}"
        found: list[str] = []
        if strings:
            but = "".join(f" & ~{_TAKEN[kind]}" for kind in sorted(taken))
            each = " | ".join(f"({text}{but})" for text in strings)
            self.terminals.append(f"{name}: ({each}) /{CLOSING}/\n")
            found.append(name)
        if plain:
            self.terminals.append(f"{name}P: /(?:{'|'.join(plain)}){CLOSING}/\n")
            found.append(f"{name}P")
        if structured:
            part = structured[0] if len(structured) == 1 else {"anyOf": structured}
            rule = json_rule(self._schema.part(part, described[1]))
            self.terminals.append(f"{name.lower()}: {rule}\n")
            found.append(f"{name.lower()} /{CLOSING}/")
        return f"({' | '.join(found)})"

    def _collect(self, key: str, value: Any, path: str, found: list[tuple[str, Any]], depth: int) -> None:
        """Adds ("string", terminal), ("plain", expression), ("json", schema) and ("taken", the type of what is none of
        the strings)."""
        if depth > _DEEPEST:
            raise self._schema.refusal(path, "it refers to itself before it says what it is; describe a type")
        if value is True:
            value = {}
        given = self._schema.checked(value, path)
        value = {name: inner for name, inner in given.items() if name not in REMARKS and not name.startswith("x-")}
        if "const" in value or "enum" in value:
            found += [("plain", text) for text in self._literals(key, value, path)]
        elif value.keys() & {"$ref", "anyOf", "oneOf", "allOf"}:
            kinds = self._composed_types(value, path, 0)
            if kinds is not None and "string" not in kinds:
                found += [("taken", kind) for kind in kinds]
                found.append(("json", value))
            elif "$ref" in value:
                rest = {name: inner for name, inner in value.items() if name != "$ref"}
                target = self._schema.resolve(value["$ref"], path)
                self._collect(key, self._joined(target, rest, path), value["$ref"], found, depth + 1)
            elif "allOf" in value:
                joined: Any = {name: inner for name, inner in value.items() if name != "allOf"}
                for at, part in enumerate(value["allOf"]):
                    while isinstance(part, Mapping) and part.keys() - REMARKS == {"$ref"}:
                        part = self._schema.resolve(part["$ref"], path)
                    joined = self._joined(part, joined, f"{path}/allOf/{at}")
                self._collect(key, joined, path, found, depth + 1)
            else:
                self._union(key, value, path, found, depth)
        else:
            for kind in self._types(value):
                self._typed(kind, value, path, found)

    def _composed_types(self, value: Any, path: str, depth: int) -> set[str] | None:
        """The types that a schema's values can have, as far as it says so; None: it says nothing."""
        if not isinstance(value, Mapping) or depth > _DEEPEST:
            return None
        said: list[set[str] | None] = []
        if "type" in value:
            said.append(set(self._types(value)))
        if "const" in value or "enum" in value:
            allowed = [value["const"]] if "const" in value else value["enum"]
            said.append({kind for kind in sorted(TYPES) for each in allowed if _is(each, frozenset((kind,)))})
        if "$ref" in value:
            said.append(self._composed_types(self._schema.resolve(value["$ref"], path), path, depth + 1))
        said += [self._composed_types(part, path, depth + 1) for part in value.get("allOf", ())]
        for word in {"anyOf", "oneOf"} & value.keys():
            parts = [self._composed_types(part, path, depth + 1) for part in value[word]]
            said.append(None if None in parts else set().union(*(part for part in parts if part is not None)))
        if not said and "properties" in value:
            said.append({"object"})  # as the reader has it
        told = [kinds for kinds in said if kinds is not None]
        return set.intersection(*told) if told else None

    def _types(self, value: Mapping[str, Any]) -> list[str]:
        declared = value.get("type")
        if declared is None:  # as the reader has it
            return ["object"] if "properties" in value else ["array"] if "items" in value else ["string"]
        return list(declared) if isinstance(declared, list) else [declared]

    def _typed(self, kind: str, value: Mapping[str, Any], path: str, found: list[tuple[str, Any]]) -> None:
        if kind == "string":
            found.append((kind, self._string(value, path)))
            return
        found.append(("taken", "number" if kind == "integer" else kind))
        bounds = value.keys() & {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "format"}
        if kind in ("boolean", "null") or (kind in _SCALARS and not bounds):
            found.append(("plain", _SCALARS[kind]))
        else:
            strings = () if kind in ("integer", "number") else _STRING
            kept = {name: inner for name, inner in value.items() if name not in strings}
            found.append(("json", {**kept, "type": kind}))

    def _union(self, key: str, value: Mapping[str, Any], path: str, found: list[tuple[str, Any]], depth: int) -> None:
        word = "anyOf" if "anyOf" in value else "oneOf"
        rest = {name: inner for name, inner in value.items() if name != word}
        each: list[list[tuple[str, Any]]] = []
        for at, part in enumerate(value[word]):
            each.append([])
            self._collect(
                key, self._joined(part, rest, f"{path}/{word}/{at}"), f"{path}/{word}/{at}", each[-1], depth + 1
            )
        if word == "oneOf":
            kinds = [{inner if kind == "taken" else kind for kind, inner in part} & {*TYPES} for part in each]
            if not all(kinds) or sum(map(len, kinds)) != len(set().union(*kinds)):
                raise self._schema.refusal(path, "the parts of 'oneOf' may overlap; write 'anyOf'")
        for part in each:
            found += part

    def _joined(self, part: Any, rest: Mapping[str, Any], path: str) -> Any:
        """A schema with further keywords beside it."""
        if not rest:
            return part
        if part is True:
            return dict(rest)
        if not isinstance(part, Mapping):
            raise self._schema.refusal(path, "false allows no value; leave it out")
        both = {name for name in part.keys() & rest.keys() - REMARKS if part[name] != rest[name]}
        if both:
            raise self._schema.refusal(path, f"{sorted(both)[0]!r} is said twice of one parameter; say it once")
        return {**part, **rest}

    def _string(self, value: Mapping[str, Any], path: str) -> str:
        parts = [_TEXT]
        least, most = value.get("minLength", 0), value.get("maxLength")
        if least or most is not None:
            parts.append(f"/(?s:.{{{int(least)},{'' if most is None else int(most)}}})/")
        if "pattern" in value:
            parts.append(f"/{found(value['pattern'])}/")
        if value.get("format") not in (None, *UNCHECKED):
            parts.append(f"/{whole(FORMATS[value['format']])}/")
        return " & ".join(parts)

    def _literals(self, key: str, value: Mapping[str, Any], path: str) -> list[str]:
        further = value.keys() - {"const", "enum", "type"}
        if further:
            raise self._schema.refusal(
                path, f"{sorted(further)[0]!r} is not supported beside a list of values; leave it out"
            )
        allowed = [value["const"]] if "const" in value else value["enum"]
        kinds = frozenset(self._types(value)) if "type" in value else TYPES
        texts = []
        for each in allowed:
            if not _is(each, kinds):
                continue
            readable = [text for text in _spellings(each) if self._reads(key, text, each)]
            if not readable:
                raise self._schema.refusal(path, f"{each!r} would not be read back from a call; leave it out")
            texts += readable
        if not texts:
            raise self._schema.refusal(path, "no value is of the type; give one that is")
        return [literal(text) for text in texts]

    def _reads(self, key: str, text: str, value: Any) -> bool:
        call = (
            f"<tool_call>\n<function={self._name}>\n<parameter={key}>\n{text}\n</parameter>\n</function>\n</tool_call>"
        )
        if any(tag in text for tag in TAGS):
            return False
        read = parse_reply(call, tools=[self._tool]).tool_calls
        return len(read) == 1 and _same(read[0].arguments.get(key), value) and key in read[0].arguments


def _spellings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value, json.dumps(value, ensure_ascii=False)]
    written = json.dumps(value, ensure_ascii=False)
    return [written, str(value)] if isinstance(value, bool) or value is None else [written]


def _is(value: Any, kinds: frozenset[str]) -> bool:
    if isinstance(value, bool) or value is None:
        return ("null" if value is None else "boolean") in kinds
    if isinstance(value, (int, float)):
        return "number" in kinds or ("integer" in kinds and value == int(value))
    return {str: "string", dict: "object"}.get(type(value), "array") in kinds


def _same(value: Any, other: Any) -> bool:
    """JSON's equality: true is not 1."""
    return json.dumps(value, sort_keys=True) == json.dumps(other, sort_keys=True)
