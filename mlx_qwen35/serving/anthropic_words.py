"""What a body of Anthropic's Messages interface says: messages, tools, thinking, limits.

Knows its fields and blocks, and turns what text/messages.py does not read into what it does. Knows nothing of answers.

    system, a text or blocks        system messages; a first block that only bills is dropped: it differs in each chat
    document, search_result         texts
    tool_result with is_error       its content, which says that it is an error
    tool_reference                  a text; its tool is offered from then on
    blocks of server tools          left out, as those tools are
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mlx_qwen35.errors import PromptError
from mlx_qwen35.serving.fields import Fields
from mlx_qwen35.serving.messages_given import file_text, given_messages
from mlx_qwen35.serving.refusal import Refusal
from mlx_qwen35.text.variables import check_effort

_BILLING = "x-anthropic-billing-header"
_CUSTOM = (None, "custom")  # types of tools that the client calls
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def read_messages(fields: Fields) -> list[dict[str, Any]]:
    """The system text and the messages, as `Engine.submit` takes them. Raises Refusal."""
    messages = fields.list("messages")
    if not messages:
        raise Refusal("invalid", 'messages is empty: give at least {"role": "user", "content": "..."}', "messages")
    made = [_message(message, f"messages.{at}.content") for at, message in enumerate(messages)]
    return given_messages([{"role": "system", "content": text} for text in _system(fields)] + made)


def read_tools(fields: Fields) -> dict[str, Any]:
    """Options of `Engine.submit`: tools and tool_choice. Raises Refusal."""
    referred = {part["tool_name"] for part in _references(fields.list("messages"))}
    tools = []
    for at, given in enumerate(fields.list("tools")):
        tool = Fields(given, f"tools.{at}.")
        if tool.any("type") not in _CUSTOM:
            continue
        name = tool.text("name")
        if not name:
            raise Refusal("invalid", f"tools.{at} has no name: give it one", f"tools.{at}.name")
        if tool.flag("defer_loading") and name not in referred:
            continue
        schema = tool.any("input_schema", {})
        if not isinstance(schema, Mapping):
            raise tool.refused("input_schema", "a JSON schema")
        function = {"name": name, "description": tool.text("description"), "parameters": schema}
        function["strict"] = tool.flag("strict") or None
        tools.append({"type": "function", "function": {k: v for k, v in function.items() if v is not None}})
    choice = fields.object("tool_choice")
    options: dict[str, Any] = {"tools": tools} if tools else {}
    word = choice and choice.one_of("type", (*_CHOICES, "tool"), "auto")
    if not choice or word == "auto":
        return options
    named = choice.text("name") if word == "tool" else None
    names = [tool["function"]["name"] for tool in tools]
    if word == "tool" and named not in names or word == "any" and not names:
        raise Refusal("invalid", f"tool_choice asks for a call of {named or 'a tool'}, which is not among tools",
                      "tool_choice")  # fmt: skip
    return options | ({"tool_choice": named or _CHOICES[word]} if tools else {})


def one_call(fields: Fields) -> bool:
    """Whether an answer may hold one call at the most."""
    choice = fields.object("tool_choice")
    return bool(choice and choice.flag("disable_parallel_tool_use"))


def read_thinking(fields: Fields) -> dict[str, Any]:
    """Options of `Engine.submit`. Adaptive thinking is the model's own way, and so is none that is said. Raises
    Refusal."""
    thinking, output = fields.object("thinking"), fields.object("output_config")
    options: dict[str, Any] = {}
    kind = thinking and thinking.one_of("type", ("enabled", "disabled", "adaptive"))
    if thinking and kind == "enabled":
        budget = thinking.whole("budget_tokens", 0)
        options = {"enable_thinking": True} | ({} if budget is None else {"thinking_budget": budget})
    elif kind == "disabled":
        return {"enable_thinking": False}
    try:
        effort = check_effort(output and output.text("effort"))
    except PromptError as error:
        raise Refusal("invalid", str(error), "output_config.effort") from None
    if effort == "none":
        return {"enable_thinking": False}
    return options | ({"reasoning_effort": effort} if effort else {})


def read_limits(fields: Fields) -> dict[str, Any]:
    """Options of `Engine.submit`: how long, up to what text, in which form. Raises Refusal."""
    stops = [text for text in fields.strings("stop_sequences") if text]
    given = {"max_tokens": fields.whole("max_tokens", 0), "stop": stops or None, "response_format": _format(fields)}
    return {name: value for name, value in given.items() if value is not None}


def read_sampling(fields: Fields) -> dict[str, Any]:
    """Fields of `Sampling`. Raises Refusal."""
    top_p, top_k = fields.number("top_p", 0, 1), fields.whole("top_k", -1)
    given = {
        "temperature": fields.number("temperature", 0),
        "top_p": None if top_p is None else max(top_p, 1e-6),  # 0 is meant as: only the likeliest
        "top_k": None if top_k is None else max(top_k, 0),
    }
    return {name: value for name, value in given.items() if value is not None}


def goes_on(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the answer is to go on with the last of the read messages."""
    last = messages[-1]
    return last["role"] == "assistant" and bool(last["content"]) and not last.get("tool_calls")


def _format(fields: Fields) -> dict[str, Any] | None:
    output = fields.object("output_config")
    older = fields.object("output_format")
    given = (output and output.object("format")) or older
    if not given or given.one_of("type", ("json_schema", "text")) != "json_schema":
        return None
    schema = given.any("schema")
    if not isinstance(schema, Mapping):
        raise given.refused("schema", "a JSON schema")
    return {"type": "json_schema", "json_schema": {"schema": schema}}


def _system(fields: Fields) -> Iterator[str]:
    system = fields.any("system")
    if system is None or isinstance(system, str):
        texts = [system or ""]
    elif isinstance(system, list):
        texts = [Fields(block, f"system.{at}.").text("text", "") for at, block in enumerate(system)]
    else:
        raise fields.refused("system", "a text or a list of blocks of text")
    if texts and texts[0].startswith(_BILLING) and "\n" not in texts[0].strip():
        texts = texts[1:]
    return filter(None, texts)


def _message(message: Any, where: str) -> Any:
    if not isinstance(message, Mapping) or not isinstance(message.get("content"), list):
        return message
    return {**message, "content": list(_blocks(message["content"], where))}


def _blocks(blocks: Sequence[Any], where: str) -> Iterator[Any]:
    """The blocks of a content, as text/messages.py reads them."""
    for at, block in enumerate(blocks):
        kind, place = block.get("type") if isinstance(block, Mapping) else None, f"{where}.{at}"
        if kind == "document":
            yield from _document(Fields(block, f"{place}."), place)
        elif kind == "search_result":
            found = Fields(block, f"{place}.")
            text = "\n".join(Fields(part).text("text", "") or "" for part in found.list("content"))
            yield _file(found.text("title") or found.text("source"), text)
        elif kind == "tool_result":
            yield {**block, "content": _result(block, f"{place}.content")}
        elif not _is_servers(kind):
            yield block


def _is_servers(kind: Any) -> bool:
    """Whether a type is that of a block which a tool on the server made; there are none here."""
    if not isinstance(kind, str) or kind in ("tool_use", "tool_result"):
        return False
    return kind in ("server_tool_use", "container_upload", "mcp_tool_use") or kind.endswith("_tool_result")


def _document(document: Fields, place: str) -> Iterator[dict[str, Any]]:
    source, title = document.object("source"), document.text("title")
    kind = source and source.text("type")
    if source and kind == "text":
        yield _file(title, source.text("data") or "")
    elif source and kind == "content":
        content = source.any("content", [])
        if isinstance(content, str):
            yield _file(title, content)
        else:
            yield from _blocks(content, f"{place}.source.content")
    elif source and kind == "base64":
        yield file_text(title, source.text("data") or "", place, source.text("media_type"))
    else:
        raise Refusal("invalid", f"{place} is a document that is not sent along: send its text", place)


def _file(title: str | None, text: str) -> dict[str, str]:
    return {"type": "text", "text": f'<file name="{title or "document"}">\n{text}\n</file>\n'}


def _result(block: Mapping[str, Any], where: str) -> Any:
    """The content of a tool's result."""
    content = block.get("content")
    if isinstance(content, list):
        found = [part["tool_name"] for part in content if _is_reference(part)]
        content = [part for part in _blocks(content, where) if not _is_reference(part)]
        if found:
            content.append({"type": "text", "text": f"Tools that can be called now: {', '.join(found)}"})
    if block.get("is_error") is not True:
        return content
    first = content if isinstance(content, str) else content[0].get("text") if content else ""
    if "error" in str(first)[:80].lower():
        return content
    if isinstance(content, list):
        return [{"type": "text", "text": "Error: "}, *content]
    return f"Error: {content or 'the tool failed'}"


def _is_reference(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "tool_reference" and isinstance(part.get("tool_name"), str)


def _references(messages: Sequence[Any]) -> Iterator[Mapping[str, Any]]:
    """All tool_reference parts of all tools' results."""
    for message in messages:
        content = message.get("content") if isinstance(message, Mapping) else None
        for block in content if isinstance(content, list) else ():
            inner = block.get("content") if isinstance(block, Mapping) else None
            yield from filter(_is_reference, inner if isinstance(inner, list) else ())
