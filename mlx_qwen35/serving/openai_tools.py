"""Tools and the choice among them, as bodies of OpenAI's chat interface have them, the older functions too.

Knows the fields; grammar/ knows what a choice makes of an answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlx_qwen35.serving.fields import Fields
from mlx_qwen35.serving.refusal import Refusal

_WORDS = {"auto": "auto", "none": "none", "required": "required", "any": "required"}


def read_tools(fields: Fields) -> dict[str, Any]:
    """Options of `Engine.submit`: tools and, where it says something, tool_choice. Raises Refusal."""
    tools = [_tool(tool, at) for at, tool in enumerate(fields.list("tools"))]
    functions, name = fields.list("functions"), "tool_choice"
    choice, older = fields.any("tool_choice"), fields.any("function_call")
    if functions and not tools:
        tools = [_function(function, f"functions[{at}]") for at, function in enumerate(functions)]
        if choice is None:
            choice, name = older, "function_call"
    if isinstance(choice, Mapping) and choice.get("type") == "allowed_tools":
        tools, choice = _allowed(tools, choice)
    chosen = _choice(choice, name, [tool["function"]["name"] for tool in tools])
    if not tools:
        return {}
    says = chosen != "auto" or any(tool["function"].get("strict") is True for tool in tools)
    return {"tools": tools} | ({"tool_choice": chosen} if says else {})


def older_form(fields: Mapping[str, Any]) -> bool:
    """Whether a body has functions and no tools, so that an answer's call is its function_call."""
    return bool(fields.get("functions")) and not fields.get("tools")


def _tool(tool: Any, at: int) -> dict[str, Any]:
    place = f"tools[{at}]"
    if not isinstance(tool, Mapping):
        raise Refusal("invalid", f'{place} is no tool: write {{"type": "function", "function": {{...}}}}', place)
    kind = tool.get("type", "function")
    if kind != "function":
        raise Refusal("invalid", f"{place} is of type {str(kind)[:40]!r}; tools here are of type 'function'", place)
    return _function(tool.get("function", tool), place)


def _function(function: Any, place: str) -> dict[str, Any]:
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or not name:
        raise Refusal("invalid", f"{place} names no function: give it a name", place)
    parameters = function.get("parameters")
    if parameters is not None and not isinstance(parameters, Mapping):
        raise Refusal("invalid", f"{place}: the parameters of {name[:60]!r} are no JSON schema: give an object", place)
    kept = {key: value for key, value in function.items() if key != "type" and value is not None}
    return {"type": "function", "function": kept}


def _choice(choice: Any, field: str, names: Sequence[str]) -> str:
    """ "auto", "none", "required", or the name of a tool."""
    if choice is None:
        return "auto"
    if isinstance(choice, str) and choice in _WORDS:
        word = _WORDS[choice]
        if word == "required" and not names:
            raise Refusal("invalid", f"{field} is {choice!r}, and there are no tools: give tools", field)
        return word
    inner = choice.get("function", choice) if isinstance(choice, Mapping) else None
    name = inner.get("name") if isinstance(inner, Mapping) else None
    if not isinstance(name, str):
        raise Refusal(
            "invalid",
            f"{field} is no choice: give 'auto', 'none', 'required' or "
            '{"type": "function", "function": {"name": "..."}}',
            field,
        )
    if name not in names:
        raise Refusal("invalid", f"{field} names {name[:60]!r}, and no tool is called so", field)
    return name


def _allowed(tools: list[dict[str, Any]], choice: Mapping[str, Any]) -> tuple[list[dict[str, Any]], Any]:
    """The tools that may be called, and the choice among them."""
    inner = choice.get("allowed_tools", choice)
    listed = inner.get("tools") if isinstance(inner, Mapping) else None
    if not isinstance(listed, list):
        raise Refusal("invalid", "tool_choice has no list of the tools that are allowed", "tool_choice")
    names = {_choice(each, "tool_choice", [tool["function"]["name"] for tool in tools]) for each in listed}
    return [tool for tool in tools if tool["function"]["name"] in names], inner.get("mode")
