"""POST /v1/messages and /v1/messages/count_tokens, as Anthropic's clients ask and read them.

Knows the shape of answers, events and errors; anthropic_words.py knows what a body says.

A stream: message_start at once; a block after the other, each with its start, its deltas and its stop: thinking, text,
tool_use; message_delta with the reason of the end and the usage; message_stop. Every event has its name on a line of
its own, without which clients read nothing.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from json import dumps
from typing import TYPE_CHECKING, Any

from mlx_qwen35.serving import anthropic_words as words
from mlx_qwen35.serving.catalogue import Catalogue, Question
from mlx_qwen35.serving.exchange import Answering, Ask, Finished, Usage
from mlx_qwen35.serving.fields import Fields
from mlx_qwen35.serving.pulse import told
from mlx_qwen35.serving.refusal import Refusal
from mlx_qwen35.text.call_pieces import remaining
from mlx_qwen35.text.reply import CallDelta, ContentDelta, ReasoningDelta, ToolCall

if TYPE_CHECKING:
    from mlx_qwen35.text.parts import Part

_ERRORS = {
    "unauthorized": "authentication_error",
    "forbidden": "permission_error",
    "not_found": "not_found_error",
    "too_large": "request_too_large",
    "busy": "rate_limit_error",
    "broken": "api_error",
    "unavailable": "overloaded_error",
}


class Messages:
    """POST /v1/messages"""

    media_type = "text/event-stream"

    def read(self, body: Mapping[str, Any], headers: Mapping[str, str]) -> Ask:
        fields = Fields(body)
        messages = words.read_messages(fields)
        options = words.read_tools(fields) | words.read_thinking(fields) | words.read_limits(fields)
        if words.goes_on(messages):
            options["continue_final_message"] = True
        stream = bool(fields.flag("stream"))
        if stream and "tools" in options:
            options["call_pieces"] = True
        return Ask(
            model=fields.text("model"),
            prompt=messages,
            options=options,
            sampling=words.read_sampling(fields),
            stream=stream,
            ttl=fields.number("ttl", 0),
            extra={"one_call": words.one_call(fields)},
            unread=fields.unread,
        )

    def whole(self, ask: Ask, answering: Answering, made: Sequence[Finished]) -> dict[str, Any]:
        one = made[0]
        calls = one.tool_calls[:1] if ask.extra.get("one_call") else one.tool_calls
        content: list[dict[str, Any]] = []
        if one.reasoning:
            content.append({"type": "thinking", "thinking": one.reasoning, "signature": answering.id})
        if one.content:
            content.append({"type": "text", "text": one.content})
        content += [
            {"type": "tool_use", "id": _call_id(answering, at), "name": call.name, "input": call.arguments}
            for at, call in enumerate(calls)
        ]
        end = _end(one.finish_reason, one.stop_string, calls=bool(calls))
        return _message(answering) | {"content": content} | end | {"usage": _usage(answering.usage)}

    def stream(self, ask: Ask, answering: Answering) -> AsyncIterator[str]:
        return told(_Writer(ask, answering), answering)

    def refused(self, refusal: Refusal) -> dict[str, Any]:
        return _error(refusal)

    def questions(self, catalogue: Catalogue) -> Sequence[Question]:
        """POST /v1/messages/count_tokens"""

        async def count(body: Mapping[str, Any], path: Mapping[str, str]) -> dict[str, Any]:
            return {"input_tokens": await catalogue.count(self.read(body, {}))}

        return [Question("POST", "/v1/messages/count_tokens", count, self.refused)]


class _Writer:
    """One stream as text. Nothing here may cost more than some microseconds a token."""

    def __init__(self, ask: Ask, answering: Answering) -> None:
        self._answering, self._one_call = answering, ask.extra.get("one_call")
        self._index, self._open = -1, ""  # the block that was begun last; its type while it is open
        self._calls = self._whole = 0  # calls that were begun, and those of them that are whole
        self._said: str | None = None  # of the call that is being written: what was told of its input
        self._end: tuple[str, str | None] = ("stop", None)

    def begin(self) -> str:
        message = _message(self._answering) | {"content": [], "stop_reason": None, "stop_sequence": None}
        message["usage"] = _usage(self._answering.usage)
        return _event("message_start", {"type": "message_start", "message": message})

    def alive(self) -> str:
        return _PING

    def failed(self, wrong: Exception) -> str:
        return _event("error", _error(Refusal.of(wrong)))

    def part(self, part: Part) -> str:
        """What is new; "" if nothing is."""
        text = ""
        for event in part.events:
            if isinstance(event, ContentDelta):
                text += self._begun("text", '"text":""') + self._delta("text_delta", "text", event.text)
            elif isinstance(event, ReasoningDelta):
                text += self._begun("thinking", '"thinking":"","signature":""')
                text += self._delta("thinking_delta", "thinking", event.text)
            elif isinstance(event, CallDelta) and (self._said is not None or self._may_call):
                text += self._called(event.name, event.arguments)
            elif isinstance(event, ToolCall) and (self._said is not None or self._may_call):
                text += self._called(event.name, remaining(event.arguments, self._said or "")) + self._ended()
                self._said, self._whole = None, self._whole + 1
        if part.finish_reason is not None:
            self._end = part.finish_reason, part.stop_string
        return text

    def end(self) -> str:
        """What is due when nothing follows."""
        data = {
            "type": "message_delta",
            "delta": _end(*self._end, calls=bool(self._whole)),
            "usage": _usage(self._answering.usage),
        }
        return self._ended() + _event("message_delta", data) + _event("message_stop", {"type": "message_stop"})

    def _begun(self, kind: str, empty: str) -> str:
        """The beginning of a block, and the end of the one before, unless it is open. empty: its fields, as JSON."""
        if self._open == kind:
            return ""
        text = self._ended()
        self._index, self._open = self._index + 1, kind
        return text + (
            f'event: content_block_start\ndata: {{"type":"content_block_start","index":{self._index},'
            f'"content_block":{{"type":"{kind}",{empty}}}}}\n\n'
        )

    @property
    def _may_call(self) -> bool:
        return not (self._calls and self._one_call)

    def _called(self, name: str, more: str) -> str:
        """More of a call's input, and its beginning, unless it has begun."""
        text = ""
        if self._said is None:
            empty = f'"id":"{_call_id(self._answering, self._calls)}","name":{dumps(name)},"input":{{}}'
            text, self._said, self._calls = self._ended() + self._begun("tool_use", empty), "", self._calls + 1
        self._said += more
        return text + self._delta("input_json_delta", "partial_json", more)

    def _delta(self, kind: str, field: str, text: str) -> str:
        return (
            f'event: content_block_delta\ndata: {{"type":"content_block_delta","index":{self._index},'
            f'"delta":{{"type":"{kind}","{field}":{dumps(text)}}}}}\n\n'
        )

    def _ended(self) -> str:
        """The end of the block that is open, if one is."""
        if not self._open:
            return ""
        text = self._delta("signature_delta", "signature", self._answering.id) if self._open == "thinking" else ""
        self._open = ""
        return text + _event("content_block_stop", {"type": "content_block_stop", "index": self._index})


def _event(name: str, data: Mapping[str, Any]) -> str:
    """One server-sent event. Its text is ASCII, so that nothing in it is a line end to anybody."""
    return f"event: {name}\ndata: {dumps(data, separators=(',', ':'))}\n\n"


_PING = _event("ping", {"type": "ping"})


def _error(refusal: Refusal) -> dict[str, Any]:
    message = refusal.message
    if refusal.kind == "too_long" and refusal.tokens is not None and refusal.most is not None:
        message = f"prompt is too long: {refusal.tokens} tokens > {refusal.most} maximum"  # clients look for this
    kind = _ERRORS.get(refusal.kind, "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": message}, "request_id": None}


def _message(answering: Answering) -> dict[str, Any]:
    return {"id": f"msg_{answering.id}", "type": "message", "role": "assistant", "model": answering.model}


def _call_id(answering: Answering, at: int) -> str:
    return f"toolu_{answering.id}{at:02d}"


def _end(reason: str, stop: str | None, *, calls: bool) -> dict[str, Any]:
    """Why an answer ended, in Anthropic's words."""
    if reason in ("length", "deadline"):
        return {"stop_reason": "max_tokens", "stop_sequence": None}
    if calls:
        return {"stop_reason": "tool_use", "stop_sequence": None}
    return {"stop_reason": "end_turn" if stop is None else "stop_sequence", "stop_sequence": stop}


def _usage(counted: Usage) -> dict[str, Any]:
    return {
        "input_tokens": counted.prompt_tokens - counted.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": counted.cached_tokens,
        "output_tokens": counted.answer_tokens,
        "output_tokens_details": {"thinking_tokens": counted.reasoning_tokens},
    }
