"""The parts of a message's content, in whatever spelling they come, in one form.

Knows texts, pictures and videos as OpenAI's, Anthropic's, MCP's and LM Studio's interfaces write them. Passes what
stands for a picture or a video on without looking at it. Knows nothing of roles.

    text    "..."  {"type": "text" | "input_text" | "output_text", "text": "..."}  {"type": "refusal", "refusal": "..."}
            {"type": "text" | "message", "content": "..."}  {"type": "tool_reference", "tool_name": "..."}
    image   {"type": "image", "image": X}  {"type": "image", "url" | "path" | "base64" | "data" | "data_url": X}
            {"type": "image", "source": {"type": "base64", "media_type": ..., "data": X} | {"type": "url", "url": X}}
            {"type": "image_url", "image_url": {"url": X} | X}  {"type": "input_image", "image_url": X}
            {"type": "image"}, filled later
    video   likewise

A part that shows something becomes a MediaPart; a MediaPart is left as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlx_qwen35.errors import PromptError

KINDS = ("image", "video")
_TEXT_KEYS = {
    "": ("text",),
    "text": ("text", "content"),
    "message": ("text", "content"),
    "refusal": ("refusal", "text"),
    "tool_reference": ("tool_name",),
}


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


def content_part(part: Any, where: str) -> dict[str, str] | MediaPart:
    """A part as templates read it, {"type": "text", "text": ...}, or a MediaPart. Raises PromptError if it is none."""
    if isinstance(part, MediaPart):
        return part
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, Mapping):
        raise PromptError(f'{where} is no part of a message; write {{"type": "text", "text": "..."}}')
    named = str(part.get("type") or "")
    for kind in KINDS:
        if named in (kind, f"{kind}_url", f"input_{kind}") or (not named and {kind, f"{kind}_url"} & {*part}):
            return _media_part(part, kind, where)
    for key in _TEXT_KEYS.get(named, ("text",)):
        if isinstance(part.get(key), str):
            return {"type": "text", "text": part[key]}
    of_type = f" and is of type {named!r}" if named not in ("", "text") else ""
    raise PromptError(f'{where} has no text{of_type}; write {{"type": "text", "text": "..."}}, or an image or video')


def _media_part(part: Mapping[str, Any], kind: str, where: str) -> MediaPart:
    keys = (kind, f"{kind}_url", "url", "path", "base64", "data", "data_url", "source")
    found = [(key, part[key]) for key in keys if part.get(key) is not None]
    if len(found) > 1:
        raise PromptError(f"{where} has a source in {found[0][0]!r} and in {found[1][0]!r}; give one")
    key, source = found[0] if found else ("", None)
    holder = part
    if isinstance(source, Mapping):
        holder = source
        form = next((name for name in ("url", "data") if isinstance(source.get(name), str)), None)
        if form is None:
            raise PromptError(f'{where}.{key} has no url; write {{"{kind}_url": {{"url": "..."}}}}')
        key, source = form, source[form]
    if key in ("base64", "data") and isinstance(source, str) and not source.startswith("data:"):
        written = holder.get("media_type") or holder.get("mimeType") or holder.get("mime_type") or f"{kind}/*"
        source = f"data:{written};base64,{source}"
    for name in ("fps", "max_pixels"):
        value = part.get(name)
        if value is not None and (not isinstance(value, (int, float)) or isinstance(value, bool) or value <= 0):
            raise PromptError(f"{where}.{name} is {value!r}; give a number above 0")
    return MediaPart(kind, source, where, part.get("fps"), part.get("max_pixels"))
