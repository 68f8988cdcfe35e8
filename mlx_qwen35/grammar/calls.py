"""Tool calls in the family's own format, as a grammar: which names, which parameters, and values that fit.

    <tool_call>
    <function=NAME>
    <parameter=KEY>
    VALUE
    </parameter>
    </function>
    </tool_call>

Parameters come in any order, each once. A string is text, as it is, up to its closing tag; it may hold anything but the
beginnings of tags that could be read as the call's own (text/calls.py reads them, docs/TOOLS.md says how). Knows how a
call is written; what a value may be is call_values.py's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mlx_qwen35.errors import ArgumentError
from mlx_qwen35.grammar.call_values import Values
from mlx_qwen35.grammar.forms import HEAD
from mlx_qwen35.grammar.regex import literal, without
from mlx_qwen35.grammar.schema import REMARKS, Schema

_NAME = re.compile(r"[^\s<>\"'`=]+")
_CHOICES = ("auto", "none", "required")
_MANY = 64  # parameters that llguidance can tick off; more have to come in their order
# Text before a call holds nothing that could be read as one, and begins with something to be seen.
_BEGINNINGS = ("<tool_call>", "<function=")
_TEXT = f"TEXT: /{without(_BEGINNINGS)}/ & /[^\\s](?s:.*)/\n"


def calls(
    tools: Sequence[Mapping[str, Any]], tool_choice: Any, *, strict: bool, control: Mapping[str, int], form: str | None
) -> str | None:
    """The grammar of an answer with these tools; None: anything. form: the rules of what it may be instead of calls, if
    that has a form. Raises ArgumentError."""
    functions = _functions(tools)
    choice = _choice(tool_choice, functions)
    if choice == "none" or not functions:
        return form or (f"{HEAD}start: TEXT\n{_TEXT}" if functions else None)
    if choice == "auto" and form is None and not (strict or any(f.get("strict") is True for f in functions.values())):
        return None
    chosen = functions if choice in _CHOICES else {choice: functions[choice]}
    rules = [_function(at, name, function, control) for at, (name, function) in enumerate(chosen.items())]
    each = " | ".join(f"call{at}" for at in range(len(rules)))
    several = "calls: call (/\\n/ call)*\ncall: " + each + "\n"
    if choice == "required":
        start = "start: calls\n" + several
    elif choice != "auto":
        start = "start: call0\n"
    elif form is None:
        start = "start: TEXT | TEXT? calls\n" + _TEXT + several
    else:
        start = "start: form | calls\n" + several
        inner = form.removeprefix(HEAD)
        if inner == form:  # it is the user's, with names of its own
            main = HEAD + start.replace("form", "@form", 1) + "".join(rules)
            return json.dumps({"grammars": [{"lark_grammar": main}, {"name": "form", "lark_grammar": form}]})
        rules.insert(0, inner.replace("start:", "form:", 1))
    return HEAD + start + "".join(rules)


def _functions(tools: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    found = {}
    for at, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str):
            raise ArgumentError(f"tools[{at}] has no name; write it as OpenAI's API has tools")
        found[name] = function
    return found


def _choice(tool_choice: Any, functions: Mapping[str, Any]) -> str:
    """ "auto", "none", "required" or the name of a function."""
    choice = tool_choice
    if isinstance(choice, Mapping):
        inner = choice.get("function", choice)
        choice = inner.get("name") if isinstance(inner, Mapping) else None
    if choice is None and tool_choice is None:
        return "auto"
    if not isinstance(choice, str):
        raise ArgumentError(
            f"tool_choice={tool_choice!r} is no choice; give 'auto', 'none', 'required' or a tool's name"
        )
    if choice in functions or choice in ("auto", "none") or (choice == "required" and functions):
        return choice
    names = ", ".join(functions) or "none: give tools="
    raise ArgumentError(f"tool_choice={tool_choice!r} asks for a tool that is not offered (offered are {names})")


def _function(at: int, name: str, function: Mapping[str, Any], control: Mapping[str, int]) -> str:
    """The rules of one function's calls; call<at> is the call."""
    where = f"the tool {name}"
    _check_name(name, where)
    given = next((function[key] for key in ("parameters", "input_schema", "inputSchema") if key in function), None)
    schema = Schema(given if given is not None else {}, where, inside_call=True)
    properties, required = _parameters(schema)
    values = Values(schema, f"p{at}", name, function)
    names = sorted(properties, key=lambda key: key not in required)
    rules = []
    for index, key in enumerate(names):
        _check_name(key, f"{where}, its parameter")
        rules.append(
            f"q{at}_{index}: /{literal(f'<parameter={key}>')}\\n/ {values.rules(index, key, properties[key])}\n"
        )
    opening, ending = (_tag(tag, control) for tag in ("<tool_call>", "</tool_call>"))
    line = literal(f"<function={name}>")
    body = f" a{at}::0" if 0 < len(names) <= _MANY else f" a{at}" if names else ""
    call = f"call{at}: {opening} /\\n{line}\\n/{body} /{literal('</function>')}\\n/ {ending}\n"
    return "".join([call, _order(at, names, len(required)), *rules, *values.terminals])


def _order(at: int, names: Sequence[str], required: int) -> str:
    if not names:
        return ""
    if len(names) > _MANY:
        parts = (f"q{at}_{index}" + ("" if index < required else "?") for index in range(len(names)))
        return f"a{at}: " + " ".join(parts) + "\n"
    end = '""' + (f" %if is_ones([0:{required}])" if required else "")
    more = "".join(
        f"\n    | q{at}_{index} a{at}::set_bit({index}) %if bit_clear({index})" for index in range(len(names))
    )
    return f"a{at}::_ : {end}{more}\n"


def _parameters(schema: Schema) -> tuple[dict[str, tuple[Any, str]], set[str]]:
    """Each parameter's schema and its place, and the names that a call has to have."""
    properties: dict[str, tuple[Any, str]] = {}
    required: set[str] = set()

    def collect(value: Any, path: str, depth: int) -> None:
        if not isinstance(value, Mapping) or depth > 8:
            raise schema.refusal(path, "the parameters of a tool are an object's; give {'type': 'object', ...}")
        for key, inner in value.items():
            here = f"{path}/{key}"
            if key in REMARKS or key.startswith("x-") or key in ("type", "additionalProperties", "strict"):
                continue
            if key == "$ref":
                collect(schema.resolve(inner, path), inner, depth + 1)
            elif key == "allOf" and isinstance(inner, list):
                for index, part in enumerate(inner):
                    collect(part, f"{here}/{index}", depth + 1)
            elif key == "properties" and isinstance(inner, Mapping):
                for name, part in inner.items():
                    if name in properties:
                        raise schema.refusal(here, f"{name!r} is there twice; describe it once")
                    properties[name] = (part, f"{here}/{name}")
            elif key == "required" and isinstance(inner, (list, tuple)):
                required.update(inner)
            else:
                raise schema.refusal(path, f"{key!r} is not supported for a tool's parameters; leave it out")
        if value.get("type", "object") != "object":
            raise schema.refusal(path, f"'type' is {value['type']!r}; the parameters of a tool are an object's")

    root = schema.root
    collect(root if root not in (None, True) else {}, "#", 0)
    for name in sorted(required - properties.keys()):
        free = root.get("additionalProperties", True)
        if free is False:
            raise schema.refusal("#/required", f"{name!r} is required and cannot be there; describe it in 'properties'")
        properties[name] = (free, "#/additionalProperties")
    return properties, required


def _tag(tag: str, control: Mapping[str, int]) -> str:
    return f"<[{control[tag]}]>" if tag in control else f"/{literal(tag)}/"


def _check_name(name: Any, where: str) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ArgumentError(
            f"{where}: the name {name!r} cannot stand in a call; leave out white space, quotes, <, > and ="
        )
