"""Messages as they come over HTTP: in one form, with nothing in them that would read this machine's files.

Knows parts that are files, and arguments that other models broke; text/messages.py knows the rest. Knows no interface.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import unquote_to_bytes

from mlx_qwen35.errors import PromptError
from mlx_qwen35.serving.refusal import Refusal
from mlx_qwen35.text.lenient import NoValue, read_value
from mlx_qwen35.text.messages import check_messages, media_parts

_FILE_PARTS = ("file", "input_file")
_TEXTS = ("application/json", "application/xml", "application/javascript", "application/yaml", "application/x-yaml",
          "application/toml", "application/sql", "application/x-sh", "application/octet-stream")  # fmt: skip
_SENT = ("data:", "http://", "https://")


def given_messages(messages: Sequence[Any], param: str = "messages") -> list[dict[str, Any]]:
    """Messages of OpenAI's or Anthropic's form, checked as `check_messages` does it; those of a client whose earlier
    model wrote broken arguments go on. param: the field that they came in.

    Raises Refusal: for what is no message, for pictures and videos that are neither sent along (data:) nor on the web
    (http, https; whether these are fetched is another's to say), for files that are no text.
    """
    if not messages:
        raise Refusal("invalid", f'{param} is empty: give at least {{"role": "user", "content": "..."}}', param)
    try:
        made = check_messages([_mended(message, f"{param}[{at}]") for at, message in enumerate(messages)])
    except PromptError as error:
        raise Refusal("invalid", str(error), param) from None
    for part in media_parts(made):
        each = part.source if isinstance(part.source, (list, tuple)) and part.source else [part.source]
        if not all(isinstance(one, str) and one[:8].lower().startswith(_SENT) for one in each):
            raise Refusal(
                "invalid",
                f"{part.where} is not sent along: give its {part.kind} as a data: URL, or an http(s) one",
                param,
            )
    return made


def file_text(name: str | None, data: str, where: str, media_type: str | None = None) -> dict[str, Any]:
    """A file that was sent as base64 or as a data: URL, as a part: a picture, a video, or text with its name around
    it. Raises Refusal for what is none of them."""
    head, comma, body = data.partition(",") if data[:5].lower() == "data:" else ("", "", data)
    kind = (head[5:].partition(";")[0] if head else media_type or "").strip().lower()
    if kind.startswith(("image/", "video/")):
        shown = kind.partition("/")[0]
        return {"type": shown, "url": data if comma else f"data:{kind};base64,{data}"}
    shown_name = name or "file"
    if (
        kind
        and not kind.startswith("text/")
        and kind.partition("+")[0] not in _TEXTS
        and not kind.endswith(("+json", "+xml"))
    ):
        raise Refusal(
            "invalid", f"{where}: {shown_name} is of type {kind}; text, pictures and videos are read here", where
        )
    try:
        plain = bool(head) and not head.lower().endswith(";base64")
        raw = unquote_to_bytes(body) if plain else base64.b64decode(body, validate=True)
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise Refusal("invalid", f"{where}: {shown_name} is no text in UTF-8", where) from None
    except (binascii.Error, ValueError):
        raise Refusal("invalid", f"{where}: {shown_name} is not base64: encode it again", where) from None
    return {"type": "text", "text": f'<file name="{shown_name}">\n{text}\n</file>'}


def _mended(message: Any, where: str) -> Any:
    """A message whose files are texts and whose arguments are JSON objects."""
    if not isinstance(message, Mapping):
        return message
    changed: dict[str, Any] = {}
    content, calls = message.get("content"), message.get("tool_calls")
    if isinstance(content, list) and any(_is_file(part) for part in content):
        changed["content"] = [
            _file(part, f"{where}.content[{at}]") if _is_file(part) else part for at, part in enumerate(content)
        ]
    if isinstance(calls, list):
        changed["tool_calls"] = [_mended_call(call) for call in calls]
    if isinstance(message.get("function_call"), Mapping):
        changed["function_call"] = _mended_call(message["function_call"])
    return {**message, **changed} if changed else message


def _is_file(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") in _FILE_PARTS


def _file(part: Mapping[str, Any], where: str) -> dict[str, Any]:
    file = part.get("file") if isinstance(part.get("file"), Mapping) else part
    name, data = file.get("filename"), file.get("file_data")
    if not isinstance(data, str):
        raise Refusal("invalid", f"{where} has no file_data: send the file along, as base64; none is kept here", where)
    return file_text(name if isinstance(name, str) else None, data, where)


def _mended_call(call: Any) -> Any:
    """A call whose arguments are a JSON object as text, if they were text: what is broken is read as far as that can
    be, or else stands as the one argument that it is."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    written = function.get("arguments") if isinstance(function, Mapping) else None
    if not isinstance(written, str) or not written.strip():
        return call
    try:
        if isinstance(json.loads(written), dict):
            return call
    except (ValueError, RecursionError):
        pass
    try:
        value = read_value(written)
    except NoValue:
        value = None
    function = {**function, "arguments": value if isinstance(value, dict) else {"arguments": written}}
    return {**call, "function": function} if "function" in call else function
