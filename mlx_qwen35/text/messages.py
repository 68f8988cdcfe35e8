"""Messages, as OpenAI's API and Hugging Face's templates write them, checked and in one form.

Knows roles, parts of a content, tool calls. Knows nothing of templates, and passes what stands for a picture or a
video on without looking at it.

A part that shows something becomes a MediaPart, whatever form it was written in:

    {"type": "image", "image": X}  {"type": "image", "url" | "path" | "base64": X}  {"type": "image"}, filled later
    {"type": "image_url", "image_url": {"url": X} | X}  {"type": "input_image", "image_url": X}, and so for video

and a MediaPart is left as it is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mlx_qwen35.errors import PromptError

Messages = Sequence[Mapping[str, Any]]

KINDS = ("image", "video")


@dataclass(frozen=True, eq=False)
class MediaPart:
    """A picture or video in a message. source: what stands for it, None where it is given beside the messages; fps,
    max_pixels: how to read this one, None: like all. where: its place, for errors."""

    kind: str
    source: Any
    where: str
    fps: float | None = None
    max_pixels: int | None = None

    def __str__(self) -> str:
        return f"{self.where} ({'an image' if self.kind == 'image' else 'a video'})"


def check_messages(messages: Messages) -> list[dict[str, Any]]:
    """Copies in the form that chat templates read, but for the MediaParts in their contents. The caller's messages are
    left as they are. Raises PromptError that names the message and says what to write."""
    return [_message(message, f"messages[{at}]") for at, message in enumerate(messages)]


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
            raise PromptError(f"{kind}s= is a list of {kind}s, not a {type(given).__name__}; write [{kind}]")
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


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise PromptError(f'{where} is no message; write {{"role": "user", "content": "..."}}')
    message = dict(message)
    content = message.get("content")
    if isinstance(content, (list, tuple)):
        message["content"] = [_part(part, f"{where}.content[{at}]") for at, part in enumerate(content)]
    elif content is not None and not isinstance(content, str):
        raise PromptError(f"{where}.content is a {type(content).__name__}; write text (json.dumps for a tool's result)")
    if isinstance(message.get("reasoning"), str) and message.get("reasoning_content") is None:
        message["reasoning_content"] = message["reasoning"]
    calls = message.get("tool_calls")
    if calls is not None:
        if not isinstance(calls, (list, tuple)):
            raise PromptError(f"{where}.tool_calls is a {type(calls).__name__}; it must be a list")
        message["tool_calls"] = [_tool_call(call, f"{where}.tool_calls[{at}]") for at, call in enumerate(calls)]
    return message


def _part(part: Any, where: str) -> dict[str, Any] | MediaPart:
    if isinstance(part, MediaPart):
        return part
    if not isinstance(part, Mapping):
        raise PromptError(f'{where} is no part of a message; write {{"type": "text", "text": "..."}}')
    named = str(part.get("type", ""))
    for kind in KINDS:
        if named in (kind, f"{kind}_url", f"input_{kind}") or (not named and {kind, f"{kind}_url"} & {*part}):
            return _media_part(part, kind, where)
    if not isinstance(part.get("text"), str):
        of_type = f" and is of type {named!r}" if named not in ("", "text") else ""
        raise PromptError(
            f'{where} has no text{of_type}; write {{"type": "text", "text": "..."}}, or an image or video'
        )
    return {**part, "type": "text"}


def _media_part(part: Mapping[str, Any], kind: str, where: str) -> MediaPart:
    keys = (kind, f"{kind}_url", "url", "path", "base64", "data")
    found = [(key, part[key]) for key in keys if part.get(key) is not None]
    if len(found) > 1:
        raise PromptError(f"{where} has a source in {found[0][0]!r} and in {found[1][0]!r}; give one")
    key, source = found[0] if found else ("", None)
    if isinstance(source, Mapping):  # {"image_url": {"url": ...}}
        if not isinstance(source.get("url"), str):
            raise PromptError(f'{where}.{key} has no url; write {{"{kind}_url": {{"url": "..."}}}}')
        source = source["url"]
    if key in ("base64", "data") and isinstance(source, str) and not source.startswith("data:"):
        source = f"data:{kind}/*;base64,{source}"
    for name in ("fps", "max_pixels"):
        value = part.get(name)
        if value is not None and (not isinstance(value, (int, float)) or isinstance(value, bool) or value <= 0):
            raise PromptError(f"{where}.{name} is {value!r}; a number above 0 is due")
    return MediaPart(kind, source, where, part.get("fps"), part.get("max_pixels"))


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
