"""POST /v1/responses, GET and DELETE /v1/responses/{id}, as OpenAI's clients and Codex ask and read them.

Knows the fields of a body, the shape of a response, and which earlier ones are kept; response_items.py and
response_tools.py know what it is made of, response_events.py the events of a stream.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from mlx_qwen35.serving import openai_words as words
from mlx_qwen35.serving import response_items as items
from mlx_qwen35.serving.catalogue import Catalogue, Question
from mlx_qwen35.serving.exchange import Answering, Ask, Finished
from mlx_qwen35.serving.fields import Fields
from mlx_qwen35.serving.kept import Kept
from mlx_qwen35.serving.openai_thinking import read_thinking
from mlx_qwen35.serving.pulse import told
from mlx_qwen35.serving.refusal import Refusal
from mlx_qwen35.serving.response_events import ResponseEvents
from mlx_qwen35.serving.response_tools import read_tools

_LOGPROBS = "message.output_text.logprobs"
_UNSERVED = {
    "background": "answers are made while you wait: leave it out, or give false",
    "conversation": "conversations are not kept: give previous_response_id, or all items as input",
    "prompt": "templates of prompts are not kept: give input and instructions",
}
_SHOWN = ("instructions", "metadata", "parallel_tool_calls", "tool_choice", "tools", "truncation", "user", "store",
          "max_output_tokens", "temperature", "top_p", "top_logprobs", "prompt_cache_key")  # fmt: skip
_EMPTY = {"metadata": {}, "parallel_tool_calls": True, "tool_choice": "auto", "tools": [], "truncation": "disabled"}
_ERRORS = {"too_long": "context_length_exceeded", "busy": "rate_limit_exceeded", "invalid": "invalid_prompt"}
_ITEM = re.compile(r"[a-z]+_([0-9a-f]{24})\d\d+")


@dataclass
class _Turn:
    """items: what its request brought; response: the answer, as it was given."""

    items: list[Any]
    response: dict[str, Any]


class Responses:
    """POST /v1/responses"""

    media_type = "text/event-stream"

    def __init__(self, kept: Kept[_Turn] | None = None) -> None:
        self._kept: Kept[_Turn] = Kept() if kept is None else kept

    def read(self, body: Mapping[str, Any], headers: Mapping[str, str]) -> Ask:
        fields = Fields(body)
        for name, words_for_it in _UNSERVED.items():
            if fields.any(name):
                raise Refusal("invalid", f"{name}: {words_for_it}", name)
        offers, instructions = read_tools(fields), fields.text("instructions")
        before = fields.text("previous_response_id")
        new = items.items_of(fields.any("input"), self._item)
        messages = items.messages_of([*self._until(before), *new], instructions, offers)
        options = offers.options | read_thinking(fields)
        if (most := fields.whole("max_output_tokens", -1)) is not None and most >= 0:
            options["max_tokens"] = most
        form, top = _format(fields), words.read_told(fields, "top_logprobs")
        if form is not None:
            options["response_format"] = form
        if told := bool(top) or _LOGPROBS in fields.strings("include"):
            options |= {"logprobs": True} | ({"top_logprobs": top} if top else {})
        stream = bool(fields.flag("stream"))
        if stream and "tools" in options:
            options["call_pieces"] = True
        reasoning = fields.any("reasoning") if isinstance(fields.any("reasoning"), Mapping) else {}
        summary = reasoning.get("summary") or reasoning.get("generate_summary")
        return Ask(
            model=fields.text("model"),
            prompt=messages,
            options=options,
            sampling=words.read_sampling(fields),
            stream=stream,
            ttl=fields.number("ttl", 0),
            extra={
                "offers": offers,
                "items": new,
                "before": before,
                "store": fields.flag("store", True),
                "one_call": fields.flag("parallel_tool_calls") is False,
                "summary": bool(summary),
                "logprobs": told,
                "shown": _shown(fields, before, {"effort": reasoning.get("effort"), "summary": summary}),
            },
            unread=fields.unread,
        )

    def whole(self, ask: Ask, answering: Answering, made: Sequence[Finished]) -> dict[str, Any]:
        one, offers = made[0], ask.extra["offers"]
        status, names = _status(one.finish_reason), items.Names(answering.id)
        output = []
        if one.reasoning:
            output.append(
                items.reasoning_item(names.next("rs"), one.reasoning, "completed", summary=ask.extra["summary"])
            )
        if one.content:
            told = _logprobs(one, answering) if ask.extra["logprobs"] else ()
            output.append(items.message_item(names.next("msg"), [items.text_part(one.content, told)], status))
        for call in one.tool_calls[:1] if ask.extra["one_call"] else one.tool_calls:
            arguments = offers.arguments(call.name, call.arguments)
            name, call_id = names.next("fc"), names.call()
            output.append(items.call_item(name, call_id, call.name, arguments, "completed", offers))
        return self._ended(ask, answering, output, status)

    def stream(self, ask: Ask, answering: Answering) -> AsyncIterator[str]:
        return told(_Writer(self, ask, answering), answering)

    def refused(self, refusal: Refusal) -> dict[str, Any]:
        made = words.error(refusal)
        if refusal.param == "previous_response_id":
            made["error"]["code"] = "previous_response_not_found"
        return made

    def questions(self, catalogue: Catalogue) -> Sequence[Question]:
        """Answers that are kept, and tokens of a prompt."""

        async def get(body: Mapping[str, Any], path: Mapping[str, str]) -> dict[str, Any]:
            turn = self._kept.get(path["id"])
            if turn is None:
                raise _gone(path["id"])
            return turn.response

        async def delete(body: Mapping[str, Any], path: Mapping[str, str]) -> dict[str, Any]:
            if not self._kept.drop(path["id"]):
                raise _gone(path["id"])
            return {"id": path["id"], "object": "response", "deleted": True}

        async def count(body: Mapping[str, Any], path: Mapping[str, str]) -> dict[str, Any]:
            return {"object": "response.input_tokens", "input_tokens": await catalogue.count(self.read(body, {}))}

        return [
            Question("GET", "/v1/responses/{id}", get, self.refused),
            Question("DELETE", "/v1/responses/{id}", delete, self.refused),
            Question("POST", "/v1/responses/input_tokens", count, self.refused),
        ]

    def _until(self, before: str | None) -> list[Any]:
        """The items of a conversation up to a response, that with them."""
        if before is None:
            return []
        turns = self._kept.until(before)
        if turns is None:
            name = "previous_response_id"
            raise Refusal("invalid", f"Previous response with id '{before[:80]}' not found.", name)
        return [item for turn in turns for item in (*turn.items, *turn.response["output"])]

    def _item(self, name: str) -> items.Item | None:
        """The item of that id, of a response that is kept."""
        found = _ITEM.fullmatch(name)
        turn = self._kept.get(f"resp_{found[1]}") if found else None
        return next((item for item in turn.response["output"] if item["id"] == name), None) if turn else None

    def _ended(self, ask: Ask, answering: Answering, output: list[items.Item], status: str) -> dict[str, Any]:
        """The response, which is kept."""
        response = _response(ask, answering, output, status)
        if ask.extra["store"]:
            new = ask.extra["items"]
            nbytes = len(json.dumps(new)) + len(json.dumps(response))
            self._kept.add(response["id"], _Turn(new, response), nbytes, before=ask.extra["before"])
        return response


def _gone(name: str) -> Refusal:
    return Refusal("not_found", f"Response with id '{name[:80]}' not found.", "id")


def _status(reason: str | None) -> str:
    return "incomplete" if reason in ("length", "deadline", "cancelled") else "completed"


class _Writer(ResponseEvents):
    """One stream as text: the events of the response around those of its items."""

    def __init__(self, api: Responses, ask: Ask, answering: Answering) -> None:
        super().__init__(ask, answering)
        self._ended = partial(api._ended, ask, answering)
        self._response = _response(ask, answering, [], "in_progress")

    def begin(self) -> str:
        return self.event("response.created", response=self._response) + self.alive()

    def alive(self) -> str:
        return self.event("response.in_progress", response=self._response)

    def end(self) -> str:
        status = _status(self.finish_reason)
        last = self.ended(status)
        return last + self.event(f"response.{status}", response=self._ended(self.output, status))

    def failed(self, wrong: Exception) -> str:
        return self.event("response.failed", response=_failed(self._response, Refusal.of(wrong)))


def _response(ask: Ask, answering: Answering, output: list[items.Item], status: str) -> dict[str, Any]:
    counted, ended = answering.usage, status != "in_progress"
    usage = {
        "input_tokens": counted.prompt_tokens,
        "input_tokens_details": {"cached_tokens": counted.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": counted.answer_tokens,
        "output_tokens_details": {"reasoning_tokens": counted.reasoning_tokens},
        "total_tokens": counted.prompt_tokens + counted.answer_tokens,
    }
    return {
        "id": f"resp_{answering.id}",
        "object": "response",
        "created_at": answering.created,
        "completed_at": int(time.time()) if status == "completed" else None,
        "status": status,
        "background": False,
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "model": answering.model,
        "output": output,
        "usage": usage if ended else None,
        **ask.extra["shown"],
    }


def _failed(begun: Mapping[str, Any], refusal: Refusal) -> dict[str, Any]:
    error = {"code": _ERRORS.get(refusal.kind, "server_error"), "message": words.error(refusal)["error"]["message"]}
    return {**begun, "status": "failed", "error": error}


def _shown(fields: Fields, before: str | None, reasoning: dict[str, Any]) -> dict[str, Any]:
    """What a response says of its request."""
    text = fields.any("text")
    shown = {name: fields.any(name, _EMPTY.get(name)) for name in _SHOWN}
    shown["store"] = fields.flag("store", True)
    shown["text"] = {"format": {"type": "text"}} | (dict(text) if isinstance(text, Mapping) else {})
    return shown | {"previous_response_id": before, "reasoning": reasoning, "service_tier": "default"}


def _format(fields: Fields) -> dict[str, Any] | None:
    """The response_format as `Engine.submit` takes it; None: any."""
    text = fields.object("text")
    given = text and text.object("format")
    kind = given and given.one_of("type", ("text", "json_object", "json_schema"))
    if not given or kind in (None, "text"):
        return None
    if kind == "json_object":
        return {"type": "json_object"}
    inner = {name: given.any(name) for name in ("name", "schema", "strict") if given.any(name) is not None}
    if "schema" not in inner:
        raise given.refused("schema", "a JSON schema")
    return {"type": "json_schema", "json_schema": inner}


def _logprobs(one: Finished, answering: Answering) -> list[dict[str, Any]]:
    """Of the tokens of the content: what follows the reasoning, as far as it is needed."""
    texts = [answering.token_text(token) for token, _, _ in one.logprobs]
    first = max((at + 1 for at, text in enumerate(texts) if "</think>" in text), default=0) if one.reasoning else 0
    while first < len(texts) and not texts[first].strip():
        first += 1
    found, length = [], 0
    for each, text in zip(one.logprobs[first:], texts[first:], strict=True):
        if length >= len(one.content):
            break
        found.append(words.told(*each, answering))
        length += len(text)
    return found
