"""LM Studio's own interface, where a model answers: POST /api/v1/chat, with or without a stream.

Knows its words: input items, events in their order, output items, stats, chats that go on from a response_id. Knows
nothing of which models there are. Chats are kept in memory, the latest of them, for as long as the server runs.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_qwen35.serving.exchange import Alive, Answering, Ask, Finished
from mlx_qwen35.serving.fields import Fields
from mlx_qwen35.serving.kept import MOST, MOST_BYTES, Kept
from mlx_qwen35.serving.lmstudio_lists import refused
from mlx_qwen35.serving.openai_words import read_sampling
from mlx_qwen35.serving.refusal import Refusal
from mlx_qwen35.text.reply import ToolCall

REASONING = ("off", "low", "medium", "high", "on")
Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class _Turn:
    """system: the text before the whole conversation, None where there is none. said: a question and its answer."""

    system: str | None
    said: Messages


class LMStudioChat:
    """POST /api/v1/chat"""

    media_type = "text/event-stream"

    def __init__(self, most: int = MOST, most_bytes: int = MOST_BYTES) -> None:
        """How much is kept of earlier answers, as `Kept` has it."""
        self._kept: Kept[_Turn] = Kept(most, most_bytes)

    def read(self, body: Mapping[str, Any], headers: Mapping[str, str]) -> Ask:
        fields = Fields(body)
        given = _content(fields)
        if fields.list("integrations"):
            raise Refusal(
                "invalid", "integrations: this server calls no tools itself: leave them out, and give tools to "
                "/v1/chat/completions or /v1/responses", "integrations",
            )  # fmt: skip
        before = fields.text("previous_response_id")
        turns = self._turns(before)
        system = fields.text("system_prompt", turns[-1].system if turns else None)
        messages = [{"role": "system", "content": system}] if system else []
        messages += [message for turn in turns for message in turn.said]
        messages.append({"role": "user", "content": given})
        options: dict[str, Any] = {}
        if (most := fields.whole("max_output_tokens", -1)) is not None and most >= 0:
            options["max_tokens"] = most
        options |= _thinking(fields.one_of("reasoning", REASONING))
        fields.whole("context_length", 1)  # room for a conversation is made as it grows
        return Ask(
            model=fields.text("model"),
            prompt=messages,
            options=options,
            sampling=read_sampling(fields),
            stream=fields.flag("stream", False),
            ttl=fields.number("ttl", 0),
            extra={"store": fields.flag("store", True), "before": before, "system": system},
            unread=fields.unread,
        )

    def whole(self, ask: Ask, answering: Answering, made: Sequence[Finished]) -> dict[str, Any]:
        one = made[0]
        return self._result(ask, answering, one.reasoning, one.content, one.tool_calls)

    async def stream(self, ask: Ask, answering: Answering) -> AsyncIterator[str]:
        yield _event("chat.start", model_instance_id=answering.model)
        course, wrong = _Course(answering), None
        try:
            async for item in answering:
                for event in course.on(item) if isinstance(item, Alive) else course.part(item):
                    yield event
        except Exception as error:
            wrong = error
        for event in course.end():
            yield event
        if wrong is not None:
            yield _event("error", **refused(Refusal.of(wrong)))
        said = course.said
        result = self._result(ask, answering, said["reasoning"], said["message"], course.calls, keep=wrong is None)
        yield _event("chat.end", result=result)

    def refused(self, refusal: Refusal) -> dict[str, Any]:
        return refused(refusal)

    def _turns(self, response: str | None) -> list[_Turn]:
        """The conversation up to a response."""
        found = [] if response is None else self._kept.until(response)
        if found is None:
            raise Refusal(
                "invalid", "previous_response_id: that response is not kept (any more, or the server was started "
                "since): send the conversation again", "previous_response_id",
            )  # fmt: skip
        return found

    def _keep(self, ask: Ask, name: str, answer: dict[str, Any]) -> bool:
        """Whether it is kept now: what it went on from may be gone, or it may be too large."""
        turn = _Turn(ask.extra["system"], [ask.prompt[-1], answer])
        size = sum(len(json.dumps(message)) for message in turn.said) + len(turn.system or "")
        self._kept.add(name, turn, size, ask.extra["before"])
        return self._kept.get(name) is not None

    def _result(
        self,
        ask: Ask,
        answering: Answering,
        reasoning: str,
        content: str,
        calls: Sequence[ToolCall],
        *,
        keep: bool = True,
    ) -> dict[str, Any]:
        output = [{"type": "reasoning", "content": reasoning}] if reasoning else []
        if content or not (reasoning or calls):
            output.append({"type": "message", "content": content})
        output += [{"type": "invalid_tool_call", **_unknown(call)} for call in calls]
        usage, spent = answering.usage, answering.answer_seconds
        stats = {
            "input_tokens": usage.prompt_tokens,
            "total_output_tokens": usage.answer_tokens,
            "reasoning_output_tokens": usage.reasoning_tokens,
            "tokens_per_second": usage.answer_tokens / spent if spent > 0 else 0.0,
            "time_to_first_token_seconds": answering.prompt_seconds,
        }
        if answering.load_seconds > 0:
            stats["model_load_time_seconds"] = answering.load_seconds
        made: dict[str, Any] = {"model_instance_id": answering.model, "output": output, "stats": stats}
        if keep and ask.extra["store"]:
            said = {"role": "assistant", "content": content or "".join(call.raw for call in calls)}
            if reasoning:
                said["reasoning_content"] = reasoning
            if self._keep(ask, f"resp_{answering.id}", said):
                made["response_id"] = f"resp_{answering.id}"
        return made


class _Course:
    """Where the events of one answer are: loading, then the prompt, then parts of the answer, each begun and ended
    once it has begun."""

    def __init__(self, answering: Answering) -> None:
        self._answering = answering
        self._stage: str | None = None  # model_load, prompt_processing, reasoning, message
        self._answers = False
        self.said = {"reasoning": "", "message": ""}
        self.calls: list[ToolCall] = []

    def on(self, alive: Alive) -> list[str]:
        if self._answers:
            # Nothing in this interface says only that it goes on; where a text is open, an empty piece of it does.
            open_text = self._stage in self.said
            return [_event(f"{self._stage}.delta", content="")] if open_text else [": it goes on\n\n"]
        if alive.loading is not None:
            events = self._enter("model_load")
            model = self._answering.model
            return [*events, _event("model_load.progress", model_instance_id=model, progress=alive.loading)]
        share = min(1.0, alive.done / alive.total) if alive.total else 0.0
        return [*self._prompt(), _event("prompt_processing.progress", progress=share)]

    def part(self, part: Any) -> list[str]:
        events = [] if self._answers else [*self._prompt(), *self._enter(None)]
        self._answers = True
        for kind, text in (("reasoning", part.reasoning), ("message", part.content)):
            if text:
                self.said[kind] += text
                events += [*self._enter(kind), _event(f"{kind}.delta", content=text)]
        for call in part.tool_calls:
            self.calls.append(call)
            events += [*self._enter(None), _event("tool_call.failure", **_unknown(call))]
        return events

    def end(self) -> list[str]:
        return self._enter(None)

    def _prompt(self) -> list[str]:
        loaded = self._stage is None and self._answering.load_seconds > 0
        return [*(self._enter("model_load") if loaded else ()), *self._enter("prompt_processing")]

    def _enter(self, stage: str | None) -> list[str]:
        """The events that end where it is and begin `stage`; none where it is there already."""
        if stage == self._stage:
            return []
        left, self._stage = self._stage, stage
        events = []
        if left == "model_load":
            more = {"model_instance_id": self._answering.model, "load_time_seconds": self._answering.load_seconds}
            events.append(_event("model_load.end", **more))
        elif left is not None:
            events.append(_event(f"{left}.end"))
        if stage is not None:
            more = {"model_instance_id": self._answering.model} if stage == "model_load" else {}
            events.append(_event(f"{stage}.start", **more))
        return events


def _content(fields: Fields) -> str | list[dict[str, Any]]:
    """What the user says, in the form of a message's content."""
    given = fields.any("input")
    if isinstance(given, str):
        return given
    if not isinstance(given, list) or not given:
        raise fields.refused("input", "a text, or a list of texts and images")
    return [_item(Fields(each, f"input[{at}].")) for at, each in enumerate(given)]


def _item(fields: Fields) -> dict[str, Any]:
    if fields.one_of("type", ("message", "text", "image")) == "image":
        url = fields.text("data_url")
        if not url or not url.startswith("data:"):
            raise fields.refused("data_url", "a picture as a data: URL")
        return {"type": "image_url", "image_url": {"url": url}}
    text = fields.text("content")
    if text is None:
        raise fields.refused("content", "a text")
    return {"type": "text", "text": text}


def _thinking(reasoning: str | None) -> dict[str, Any]:
    if reasoning is None:
        return {}
    if reasoning in ("off", "on"):
        return {"enable_thinking": reasoning == "on"}
    return {"reasoning_effort": reasoning}


def _unknown(call: ToolCall) -> dict[str, Any]:
    """A call of a tool, where none was given."""
    return {
        "reason": f"there is no tool of the name {call.name}",
        "metadata": {"type": "invalid_name", "tool_name": call.name, "arguments": call.arguments},
    }


def _event(kind: str, **fields: Any) -> str:
    """One server-sent event."""
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields}, separators=(',', ':'))}\n\n"
