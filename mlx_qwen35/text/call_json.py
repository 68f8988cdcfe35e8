"""Tool calls in JSON: {"name": ..., "arguments": {...}} in <tool_call>, or the arguments behind a function's tag.

Some templates ask for it, and models write it without being asked. Knows the names that such objects have.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mlx_qwen35.text.arguments import ToolSchemas
from mlx_qwen35.text.call_reading import FRAMES, SPACE, Unreadable, WrittenCall
from mlx_qwen35.text.lenient import NoValue, read_value, read_value_at
from mlx_qwen35.text.tags import Kind, Tag

_NAMES = ("name", "function", "tool", "tool_name")
_BESIDE = {*_NAMES, "id", "type", "index"}
_ARGUMENTS = ("arguments", "parameters", "args", "input")


def read_json(
    text: str, start: int, tags: list[Tag], schemas: ToolSchemas, final: bool
) -> tuple[tuple[WrittenCall, ...], int]:
    """The calls that JSON in <tool_call> asks for, one object or several; raises Unreadable."""
    opening = next((tag for tag in tags if tag.end <= start and tag.kind is Kind.FUNCTION), None)
    objects, at = [], start
    while text.startswith("{", at):
        try:
            found, at = read_value_at(text, at)
        except NoValue as error:
            raise Unreadable(f"the JSON of a call cannot be read: {error}") from None
        objects.append(found)
        at = SPACE.match(text, at).end()
        if text.startswith(",", at):
            at = SPACE.match(text, at + 1).end()
    for closer in reversed(FRAMES):
        at = SPACE.match(text, at).end()
        if text.startswith(closer, at):
            at += len(closer)
        elif closer == "</tool_call>" and not (final and not text[at:].strip()):
            raise Unreadable("something follows the JSON of a call")
    if opening is not None:
        if len(objects) != 1:
            raise Unreadable(f"{opening.name} has several objects for arguments")
        return (WrittenCall(opening.name, values=_arguments_of(objects[0]), raw=text[:at]),), at
    calls = list(_named(objects, schemas))
    raws = [text[:at], *[""] * (len(calls) - 1)]
    return tuple(WrittenCall(name, values=values, raw=raw) for (name, values), raw in zip(calls, raws, strict=True)), at


def _named(objects: list[Any], schemas: ToolSchemas) -> Iterator[tuple[str, dict[str, Any]]]:
    for found in objects:
        inner = found.get("function") if isinstance(found.get("function"), dict) else found
        name = next((inner[key] for key in _NAMES if isinstance(inner.get(key), str)), None)
        if not name:
            raise Unreadable("the JSON of a call names no function")
        key = next((key for key in _ARGUMENTS if key in inner), None)
        if key is None and inner.keys() - _BESIDE:
            raise Unreadable(f"the JSON of a call has its arguments for {name} beside its name")
        if key is None and (not schemas.offers(name) or schemas.required(name)):
            raise Unreadable(f"the JSON of a call has no arguments for {name}")
        yield name, _arguments_of({} if key is None else inner[key])


def _arguments_of(value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        try:
            value = read_value(value)
        except NoValue:
            value = None
    if value is None or not isinstance(value, dict):
        raise Unreadable("the arguments of a call are no object")
    return value


