"""Messages as clients of OpenAI's and Anthropic's interfaces send them, checked and in the form that templates read.

Knows roles, tool calls and results, and where reasoning is kept; text/contents.py knows the parts of a content. Knows
nothing of templates, but for what Qwen3.5's take out of an answer that holds its own reasoning.

    developer       a system message                    function         a tool's result
    several system messages at the beginning            one, joined by blank lines
    a system message later on                           a user's, where it stands: the beginning stays as it was
    reasoning, thinking, parts of type thinking         reasoning_content; redacted_thinking is left out
    parts of type tool_use, function_call               tool_calls
    parts of type tool_result                           messages of role tool
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any

from mlx_qwen35.errors import PromptError
from mlx_qwen35.text.contents import KINDS, MediaPart, content_part

Messages = Sequence[Mapping[str, Any]]

_ROLES = {"developer": "system", "function": "tool"}
_REASONING = ("reasoning_content", "reasoning", "thinking")
_THINKING_PARTS = ("thinking", "reasoning", "reasoning_text", "redacted_thinking")


def check_messages(messages: Messages) -> list[dict[str, Any]]:
    """Copies in the form that chat templates read, but for the MediaParts in their contents and for system messages
    that stand where `in_order` puts none. The caller's messages are left as they are. Raises PromptError that names
    the message and says what to write."""
    return [made for at, message in enumerate(messages) for made in _messages(message, f"messages[{at}]")]


def in_order(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Checked messages with at most one system message, the first: several there are joined by blank lines, and later
    ones become messages of the user where they stand (an empty one is left out), so that what comes before them makes
    the same prompt with them and without."""
    leading = list(takewhile(lambda message: message["role"] == "system", messages))
    joined = [{**leading[0], "content": _joined([m["content"] for m in leading])}] if len(leading) > 1 else leading
    made = [dict(message) for message in joined]
    for message in messages[len(leading) :]:
        if message["role"] != "system":
            made.append(dict(message))
        elif message["content"]:
            made.append({**message, "role": "user"})
    return made


def with_system(messages: list[dict[str, Any]], system: str | None) -> list[dict[str, Any]]:
    """The same with a system message before them."""
    if system is None:
        return messages
    if messages[0]["role"] == "system":
        raise PromptError("system= is given, but the messages begin with a system message; use one of the two")
    return [{"role": "system", "content": system}, *messages]


def with_media(
    messages: list[dict[str, Any]], *, images: Sequence[Any] = (), videos: Sequence[Any] = ()
) -> list[dict[str, Any]]:
    """The same with the images and videos in the parts that have no source, in order; those of a kind without such
    parts go before the content of the last user message, images first. Raises PromptError where parts and sources are
    not equally many."""
    first: list[MediaPart] = []
    sources: dict[MediaPart, Any] = {}
    empty = [part for part in media_parts(messages) if part.source is None]
    for kind, given in zip(KINDS, (images, videos), strict=True):
        if isinstance(given, (str, bytes)) or not isinstance(given, Sequence):
            raise PromptError(f"{kind}s= is a list of {kind}s, not of type {type(given).__name__}; write [{kind}]")
        places = [part for part in empty if part.kind == kind]
        if not places:
            first += [MediaPart(kind, source, f"{kind}s[{at}]") for at, source in enumerate(given)]
        elif len(places) != len(given):
            raise PromptError(
                f"{len(places)} {kind} parts of the messages have no source ({places[0].where} is the first), and "
                f"{kind}s= holds {len(given)}; give one for each"
            )
        else:
            sources |= zip(places, given, strict=True)
    filled = each_part(messages, lambda part: replace(part, source=sources[part]) if part in sources else part)
    if not first:
        return filled
    at = max((at for at, message in enumerate(filled) if message["role"] == "user"), default=None)
    if at is None:
        raise PromptError("images= and videos= go with a message of the user, and there is none; add one")
    content = filled[at].get("content") or []
    filled[at]["content"] = [*first, *([{"type": "text", "text": content}] if isinstance(content, str) else content)]
    return filled


def media_parts(messages: Sequence[Mapping[str, Any]]) -> list[MediaPart]:
    """The pictures and videos of checked messages, in order."""
    contents = [message["content"] for message in messages if isinstance(message.get("content"), list)]
    return [part for content in contents for part in content if isinstance(part, MediaPart)]


def each_part(messages: Sequence[Mapping[str, Any]], change: Callable[[MediaPart], Any]) -> list[dict[str, Any]]:
    """Copies of checked messages with change(part) in place of every MediaPart, called in their order."""
    copies = [dict(message) for message in messages]
    for message in copies:
        if isinstance(message.get("content"), list):
            message["content"] = [change(p) if isinstance(p, MediaPart) else p for p in message["content"]]
    return copies


def split_reasoning(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Checked messages, with the reasoning of answers that hold it in their content ("<think>...</think>So", as a
    model wrote them) as their reasoning_content. All else that these tags are spelled in stays text."""
    copies = [dict(message) for message in messages]
    for message in copies:
        if message["role"] != "assistant" or isinstance(message.get("reasoning_content"), str):
            continue
        content = message["content"]
        first = list(takewhile(lambda part: part.get("type") == "text", content)) if isinstance(content, list) else []
        text = content if isinstance(content, str) else "".join(part["text"] for part in first)
        if (found := _split(text.strip())) is None:
            continue
        message["reasoning_content"], answer = found
        rest = content[len(first) :] if isinstance(content, list) else []
        message["content"] = [{"type": "text", "text": answer}, *rest] if rest else answer
    return copies


def _split(text: str) -> tuple[str, str] | None:
    """The reasoning that a reply begins with, and its answer; None if it begins with none. Either it opens <think>, or
    the prompt did: then it is closed as models close it, on a line of its own before a blank line or the end."""
    if text.startswith("<think>"):
        end = re.search(r"</think>(?=\n|$)", text) or re.search("</think>", text)
    else:
        end = re.search(r"(?:^|(?<=\n))</think>(?=\n\n)|(?<=\n)</think>$", text)
        if end and "<think>" in text[: end.start()]:
            return None
    if end is None:
        return None
    return text[: end.start()].removeprefix("<think>").strip("\n"), text[end.end() :].lstrip("\n")


def _messages(message: Any, where: str) -> list[dict[str, Any]]:
    """One message, or the results of tools and the rest of a user's message that holds both."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise PromptError(f'{where} is no message; write {{"role": "user", "content": "..."}}')
    message = {**message, "role": _ROLES.get(message["role"], message["role"])}
    content = message.get("content")
    if not content and isinstance(message.get("refusal"), str):
        content = message["refusal"]
    if not (content is None or isinstance(content, (str, list, tuple))):
        kind = type(content).__name__
        raise PromptError(f"{where}.content is of type {kind}; write text (json.dumps for a tool's result)")
    parts = [] if isinstance(content, str) else [(p, f"{where}.content[{at}]") for at, p in enumerate(content or ())]
    if message["role"] == "assistant":
        return [_answer(message, content, parts, where)]
    if not any(_type(part) == "tool_result" for part, _ in parts):
        return [{**message, "content": content if isinstance(content, str) else _parts(parts)}]
    made: list[dict[str, Any]] = []
    for part, place in parts:
        if _type(part) == "tool_result":
            result = {"role": "tool", "tool_call_id": part.get("tool_use_id"), "content": part.get("content")}
            made += _messages(result, place)
        elif made and made[-1]["role"] == message["role"]:
            made[-1]["content"].append(content_part(part, place))
        else:
            made.append({**message, "content": [content_part(part, place)]})
    return made


def _answer(message: dict[str, Any], content: Any, parts: list[tuple[Any, str]], where: str) -> dict[str, Any]:
    """An assistant's message: what it thought, said and called."""
    thought = [_thought(part, place) for part, place in parts if _type(part) in _THINKING_PARTS]
    calls = message.pop("tool_calls", None)
    if calls is None and message.get("function_call") is not None:
        calls = [message.pop("function_call")]
    if calls is not None and not isinstance(calls, (list, tuple)):
        raise PromptError(f"{where}.tool_calls is of type {type(calls).__name__}; it must be a list")
    made = [_tool_call(call, f"{where}.tool_calls[{at}]") for at, call in enumerate(calls or ())]
    made += [_tool_use(part, place) for part, place in parts if _type(part) == "tool_use"]
    said = [(p, place) for p, place in parts if _type(p) not in (*_THINKING_PARTS, "tool_use")]
    message["content"] = content if isinstance(content, str) else _parts(said)
    if made:
        message["tool_calls"] = made
    reasoning = _reasoning(message, "\n\n".join(filter(None, thought)) if thought else None, where)
    message.pop("reasoning_content", None)
    return message if reasoning is None else {**message, "reasoning_content": reasoning}


def _reasoning(message: Mapping[str, Any], thought: str | None, where: str) -> str | None:
    """The first that is not empty, else the first that is there."""
    own = message.get("reasoning_content")
    if own is not None and not isinstance(own, str):
        raise PromptError(f"{where}.reasoning_content is of type {type(own).__name__}; write text")
    found = [value for value in (*map(message.get, _REASONING), thought) if isinstance(value, str)]
    return next(filter(None, found), found[0] if found else None)


def _type(part: Any) -> str | None:
    return part.get("type") if isinstance(part, Mapping) else None


def _parts(parts: Iterable[tuple[Any, str]]) -> list[dict[str, str] | MediaPart] | str:
    return [content_part(part, place) for part, place in parts] or ""


def _thought(part: Mapping[str, Any], where: str) -> str:
    if part["type"] == "redacted_thinking":
        return ""
    text = next((part[key] for key in ("thinking", "reasoning", "text") if isinstance(part.get(key), str)), None)
    if text is None:
        raise PromptError(f'{where} has no reasoning; write {{"type": "thinking", "thinking": "..."}}')
    return text


def _joined(contents: Sequence[Any]) -> Any:
    """Contents with blank lines between those that are not empty; text, unless one shows something."""
    lists = [[{"type": "text", "text": c}] if isinstance(c, str) else c for c in contents if c]
    if any(isinstance(part, MediaPart) for parts in lists for part in parts):
        return [part for parts in lists for part in ({"type": "text", "text": "\n\n"}, *parts)][1:]
    texts = ("".join(part["text"] for part in parts).strip() for parts in lists)
    return "\n\n".join(filter(None, texts))


def _tool_use(part: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A call as Anthropic's API has it."""
    function = {"name": part.get("name"), "arguments": part.get("input")}
    return _tool_call({"id": part.get("id"), "type": "function", "function": function}, where)


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    """The call with its arguments as a dict: OpenAI's API carries them as JSON text, templates loop over them."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise PromptError(f'{where} is no call; write {{"function": {{"name": "...", "arguments": {{...}}}}}}')
    function = dict(function)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError) as error:
            raise PromptError(f"{where}: the arguments are not valid JSON ({error}); pass a dict") from None
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, Mapping):
        raise PromptError(f"{where}: the arguments are a {type(arguments).__name__}; pass a dict, or one as JSON")
    function["arguments"] = dict(arguments)
    return {**call, "function": function} if "function" in call else function
