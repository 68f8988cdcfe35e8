"""The items of OpenAI's Responses interface, in and out: as messages, and as what an answer is made of.

Knows the types of items and their fields. Knows nothing of requests and streams.

    message                                         a message
    reasoning, function_call, custom_tool_call      parts of one assistant's message, with what it says between them
    function_call_output, custom_tool_call_output   a tool's message
    what a server's own tools leave                 left out
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mlx_qwen35.serving.messages_given import given_messages
from mlx_qwen35.serving.refusal import Refusal
from mlx_qwen35.serving.response_tools import Offers

Item = dict[str, Any]


def items_of(given: Any, find: Callable[[str], Item | None]) -> list[Any]:
    """The items of an input, which may be a text. find: the item that a reference means. Raises Refusal."""
    if given is None:
        return []
    if isinstance(given, str):
        return [{"type": "message", "role": "user", "content": given}]
    if not isinstance(given, list):
        raise Refusal("invalid", "input is neither a text nor a list of items", "input")
    items = []
    for at, item in enumerate(given):
        if not isinstance(item, Mapping):
            raise Refusal("invalid", f"input[{at}] is no item: give an object with a type", f"input[{at}]")
        if item.get("type") == "item_reference" or item.keys() == {"id"}:
            name = str(item.get("id"))
            found = find(name)
            if found is None:
                raise Refusal("not_found", f"Item with id '{name[:80]}' not found.", f"input[{at}].id")
            item = found
        items.append(item)
    return items


def messages_of(items: Sequence[Mapping[str, Any]], instructions: str | None, offers: Offers) -> list[dict[str, Any]]:
    """As `Engine.submit` takes them. Raises Refusal."""
    made: list[dict[str, Any]] = [{"role": "system", "content": instructions}] if instructions else []
    answer: dict[str, Any] | None = None  # the assistant's message that goes on
    for item in items:
        kind = item.get("type") or ("message" if "role" in item else None)
        if kind == "message" and item.get("role") != "assistant" or str(kind).endswith("_call_output"):
            answer = None
        if kind == "message" and item.get("role") == "assistant":
            answer = _begun(made, answer, "content", "tool_calls")
            answer["content"] = item.get("content")
        elif kind == "message":
            made.append({"role": item.get("role"), "content": item.get("content")})
        elif kind == "reasoning":
            if thought := _thought(item):
                answer = _begun(made, answer, "content", "tool_calls", "reasoning_content")
                answer["reasoning_content"] = thought
        elif kind in ("function_call", "custom_tool_call"):
            answer = _begun(made, answer)
            answer.setdefault("tool_calls", []).append(_call(item, offers))
        elif kind in ("function_call_output", "custom_tool_call_output"):
            made.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": _output(item.get("output"))})
    return given_messages(made, "input")


def _begun(made: list[dict[str, Any]], answer: dict[str, Any] | None, *before: str) -> dict[str, Any]:
    """The assistant's message that goes on, or a new one where that has one of `before` already."""
    if answer is not None and not any(answer.get(name) for name in before):
        return answer
    made.append({"role": "assistant", "content": ""})
    return made[-1]


def _thought(item: Mapping[str, Any]) -> str:
    """The whole of the reasoning where it is there, else its summary."""
    for name, between in (("content", ""), ("summary", "\n\n")):
        parts = item.get(name)
        texts = [part.get("text") for part in parts if isinstance(part, Mapping)] if isinstance(parts, list) else []
        if text := between.join(text for text in texts if isinstance(text, str)):
            return text
    return ""


def _call(item: Mapping[str, Any], offers: Offers) -> dict[str, Any]:
    name, namespace = item.get("name"), item.get("namespace")
    name = offers.seen(name, namespace) if isinstance(name, str) else name
    arguments = item.get("arguments")
    if item["type"] == "custom_tool_call":
        arguments = {"input": item.get("input")}
    return {"id": item.get("call_id"), "type": "function", "function": {"name": name, "arguments": arguments}}


def _output(output: Any) -> Any:
    """What a tool gave, as a content."""
    if output is None or isinstance(output, str):
        return output or ""
    if isinstance(output, list) and all(isinstance(part, Mapping) and "type" in part for part in output):
        return output
    return json.dumps(output, ensure_ascii=False)


# Of answers


def reasoning_item(name: str, text: str, status: str, *, summary: bool) -> Item:
    """summary: whether one was asked for; it is the reasoning itself, which some clients show only there."""
    return {
        "id": name,
        "type": "reasoning",
        "summary": [{"type": "summary_text", "text": text}] if summary and text else [],
        "content": [{"type": "reasoning_text", "text": text}] if text else [],
        "encrypted_content": None,
        "status": status,
    }


def text_part(text: str, logprobs: Sequence[Mapping[str, Any]] = ()) -> Item:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(logprobs)}


def message_item(name: str, parts: Sequence[Item], status: str) -> Item:
    return {"id": name, "type": "message", "role": "assistant", "content": list(parts), "status": status}


def call_item(name: str, call_id: str, tool: str, arguments: str, status: str, offers: Offers) -> Item:
    """A call, under the client's own name for the tool; arguments: as `Offers.arguments` has them."""
    offered = offers.of(tool)
    kind, field = ("custom_tool_call", "input") if offered.custom else ("function_call", "arguments")
    item = {"id": name, "type": kind, "call_id": call_id, "name": offered.name, field: arguments, "status": status}
    return item | ({"namespace": offered.namespace} if offered.namespace else {})


class Names:
    """Ids for the items of one response, none of which any other has."""

    def __init__(self, response: str) -> None:
        self._response, self._items, self._calls = response, 0, 0

    def next(self, kind: str) -> str:
        """For an item. kind: how it begins: "rs", "msg", "fc"."""
        self._items += 1
        return f"{kind}_{self._response}{self._items - 1:02d}"

    def call(self) -> str:
        self._calls += 1
        return f"call_{self._response}{self._calls - 1:02d}"
