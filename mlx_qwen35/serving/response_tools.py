"""Tools and the choice among them, as bodies of OpenAI's Responses interface have them.

Knows flat functions, functions in namespaces and tools of free text, and under which name a model sees each. Knows
nothing of what a model makes of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlx_qwen35.serving.fields import Fields
from mlx_qwen35.serving.refusal import Refusal

_TEXT = {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]}


@dataclass(frozen=True)
class Offered:
    """A tool by its client's name for it. custom: it takes one text in place of arguments."""

    name: str
    namespace: str | None = None
    custom: bool = False


@dataclass
class Offers:
    """options: of `Engine.submit`. The names that the model sees are those of the client, and those that two namespaces
    have in common have their namespace's before them."""

    options: dict[str, Any] = field(default_factory=dict)
    by_name: dict[str, Offered] = field(default_factory=dict)

    def of(self, name: str) -> Offered:
        """The tool of a name that the model wrote."""
        return self.by_name.get(name) or Offered(name)

    def seen(self, name: str, namespace: str | None) -> str:
        """The name under which the model sees a client's tool."""
        found = (seen for seen, tool in self.by_name.items() if (tool.name, tool.namespace) == (name, namespace))
        return next(found, name)

    def arguments(self, name: str, arguments: Mapping[str, Any]) -> str:
        """What the model wrote, as its client reads it: JSON, or the text of a custom tool."""
        if self.of(name).custom and isinstance(arguments.get("input"), str):
            return arguments["input"]
        return json.dumps(arguments, ensure_ascii=False)


def read_tools(fields: Fields) -> Offers:
    """Tools that run on a server (web_search and the like) are ignored: there are none here. Raises Refusal."""
    found = list(_tools(fields.list("tools"), "tools", None))
    names = [tool.name for tool, _ in found]
    offers, tools = Offers(), []
    for tool, function in found:
        clear = names.count(tool.name) == 1 or tool.namespace is None
        seen = tool.name if clear else f"{tool.namespace}__{tool.name}"
        offers.by_name[seen] = tool
        tools.append({"type": "function", "function": {"name": seen, **function}})
    chosen, word = _chosen(fields.any("tool_choice"), offers)
    if chosen is not None:
        tools = [tool for tool in tools if tool["function"]["name"] in chosen]
    if word == "required" and not tools:
        raise Refusal("invalid", "tool_choice asks for a call, and there are no tools: give tools", "tool_choice")
    if tools:
        offers.options = {"tools": tools} | ({"tool_choice": word} if word != "auto" else {})
    return offers


def _tools(given: Sequence[Any], where: str, namespace: str | None) -> Iterator[tuple[Offered, dict[str, Any]]]:
    """Each with its function, but for the name."""
    for at, each in enumerate(given):
        place = f"{where}[{at}]"
        tool = Fields(each, f"{place}.")
        kind = tool.text("type", "function")
        if kind == "namespace":
            yield from _tools(tool.list("tools"), f"{place}.tools", tool.text("name"))
        elif kind in ("function", "custom"):
            inner = tool.object("function") or tool
            name = inner.text("name")
            if not name:
                raise Refusal("invalid", f"{place} has no name: give it one", f"{place}.name")
            schema = _TEXT if kind == "custom" else inner.any("parameters", {})
            if not isinstance(schema, Mapping):
                raise inner.refused("parameters", "a JSON schema")
            says = [inner.text("description"), _grammar(tool) if kind == "custom" else None]
            function: dict[str, Any] = {"description": "\n\n".join(filter(None, says)), "parameters": schema}
            if not function["description"]:
                del function["description"]
            if inner.flag("strict") and kind == "function":
                function["strict"] = True
            yield Offered(name, namespace, kind == "custom"), function


def _grammar(tool: Fields) -> str | None:
    """What a custom tool says of the form of its text."""
    form = tool.object("format")
    definition = form and form.text("definition")
    return f"The input has this form ({form.text('syntax', 'grammar')}):\n{definition}" if form and definition else None


def _chosen(choice: Any, offers: Offers) -> tuple[set[str] | None, str]:
    """-> (the names that may be called, None for all; "auto", "none", "required" or one name)."""
    if choice is None:
        return None, "auto"
    if isinstance(choice, str) and choice in ("auto", "none", "required"):
        return None, choice
    kind = choice.get("type") if isinstance(choice, Mapping) else None
    if kind in ("function", "custom"):
        return None, _named(choice, offers)
    if kind == "allowed_tools":
        inner = Fields(choice, "tool_choice.")
        mode = inner.one_of("mode", ("auto", "required"), "auto")
        allowed = [tool for tool in inner.list("tools") if _kind(tool) in ("function", "custom")]
        return {_named(tool, offers) for tool in allowed}, mode or "auto"
    if isinstance(kind, str):  # a tool of the server, of which there are none
        return None, "auto"
    raise Refusal(
        "invalid",
        'tool_choice is no choice: give "auto", "none", "required" or {"type": "function", "name": "..."}',
        "tool_choice",
    )


def _kind(tool: Any) -> Any:
    return tool.get("type", "function") if isinstance(tool, Mapping) else None


def _named(choice: Mapping[str, Any], offers: Offers) -> str:
    inner = choice.get("function") if isinstance(choice.get("function"), Mapping) else choice
    name, namespace = inner.get("name"), inner.get("namespace")
    seen = [key for key, tool in offers.by_name.items() if tool.name == name and namespace in (None, tool.namespace)]
    if not seen:
        raise Refusal("invalid", f"tool_choice names {str(name)[:60]!r}, and no tool is called so", "tool_choice")
    return seen[0]
