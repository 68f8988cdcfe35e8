"""The events of a stream of OpenAI's Responses interface: an item after the other, each begun, told and done.

Knows the order and the fields of events. Knows nothing of the response around them.

    reasoning       output_item.added, content_part.added, reasoning_text.delta ..., reasoning_text.done,
                    content_part.done, output_item.done; where a summary was asked for, the same as its text
    message         output_item.added, content_part.added, output_text.delta ..., output_text.done, content_part.done,
                    output_item.done
    function_call   output_item.added, function_call_arguments.delta, .done, output_item.done
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from mlx_qwen35.serving import openai_words as words
from mlx_qwen35.serving import response_items as items
from mlx_qwen35.serving.exchange import Answering, Ask
from mlx_qwen35.text.call_pieces import remaining
from mlx_qwen35.text.reply import CallDelta, ContentDelta, ReasoningDelta, ToolCall

if TYPE_CHECKING:
    from mlx_qwen35.serving.response_tools import Offers
    from mlx_qwen35.text.parts import Part


class ResponseEvents:
    """output: the items that are done; finish_reason: of the last Part."""

    def __init__(self, ask: Ask, answering: Answering) -> None:
        self.output: list[items.Item] = []
        self.finish_reason: str | None = None
        self._offers: Offers = ask.extra["offers"]
        self._summary, self._one_call = ask.extra["summary"], ask.extra["one_call"]
        self._logprobs = ask.extra["logprobs"]
        self._answering, self._names = answering, items.Names(answering.id)
        self._sequence = 0
        self._open, self._name = "", ""  # what is told now: "reasoning", "message" or "call"; its id
        self._calls = 0
        self._call_id = self._said = ""  # of the call that is open: its id for clients, what was told of its arguments
        self._texts: list[str] = []
        self._told: list[dict[str, Any]] = []  # of the message's tokens
        self._new: list[dict[str, Any]] = []  # those of them that no event has had

    def event(self, kind: str, **fields: Any) -> str:
        """One server-sent event. Its text is ASCII, so that nothing in it is a line end to anybody."""
        self._sequence += 1
        data = {"type": kind, "sequence_number": self._sequence - 1, **fields}
        return f"event: {kind}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n"

    def part(self, part: Part) -> str:
        """What is new; "" if nothing is."""
        text = ""
        for event in part.events:
            if isinstance(event, ContentDelta):
                text += self._begun("message")
                self._tell(part)
                text += self._content(event.text)
            elif isinstance(event, ReasoningDelta):
                text += self._begun("reasoning") + self._reasoning(event.text)
            elif isinstance(event, CallDelta) and not self._offers.of(event.name).custom and self._may_call:
                text += self._call_begun(event.name) + self._arguments(event.arguments)
            elif isinstance(event, ToolCall) and self._may_call:
                text += self._call(event)
        if not part.events and self._open == "message":
            self._tell(part)
        self.finish_reason = part.finish_reason or self.finish_reason
        return text

    def ended(self, status: str) -> str:
        """The end of what is open. status: that the item has."""
        kind, self._open = self._open, ""
        if not kind or kind == "call":  # a call that breaks off is not done: a client would make it
            self._call_id = ""
            return ""
        whole, at = "".join(self._texts), {"output_index": len(self.output), "item_id": self._name}
        first = {**at, "content_index": 0}
        if kind == "message":
            part = items.text_part(whole, self._told)
            item = items.message_item(self._name, [part], status)
            text = self.event("response.output_text.done", **first, text=whole, logprobs=self._told)
        else:
            part = {"type": "reasoning_text", "text": whole}
            item = items.reasoning_item(self._name, whole, status, summary=self._summary)
            text = self.event("response.reasoning_text.done", **first, text=whole)
        text += self.event("response.content_part.done", **first, part=part)
        if kind == "reasoning" and self._summary:
            summary = {**at, "summary_index": 0}
            text += self.event("response.reasoning_summary_text.done", **summary, text=whole)
            text += self.event("response.reasoning_summary_part.done", **summary, part=item["summary"][0])
        return text + self._done(item)

    def _begun(self, kind: str) -> str:
        """The beginning of an item, and the end of the one before, unless it is open."""
        if self._open == kind:
            return ""
        text = self.ended("completed")
        self._open, self._texts, self._told, self._new = kind, [], [], []
        at = {"output_index": len(self.output)}
        if kind == "message":
            self._name = self._names.next("msg")
            item, part = items.message_item(self._name, [], "in_progress"), items.text_part("")
        else:
            self._name = self._names.next("rs")
            item = items.reasoning_item(self._name, "", "in_progress", summary=False)
            part = {"type": "reasoning_text", "text": ""}
        at["item_id"] = self._name
        text += self.event("response.output_item.added", output_index=at["output_index"], item=item)
        if kind == "reasoning" and self._summary:
            empty = {"type": "summary_text", "text": ""}
            text += self.event("response.reasoning_summary_part.added", **at, summary_index=0, part=empty)
        return text + self.event("response.content_part.added", **at, content_index=0, part=part)

    def _content(self, said: str) -> str:
        self._texts.append(said)
        told, self._new = self._new, []
        return self.event(
            "response.output_text.delta",
            item_id=self._name,
            output_index=len(self.output),
            content_index=0,
            delta=said,
            logprobs=told,
        )

    def _reasoning(self, said: str) -> str:
        self._texts.append(said)
        at = {"item_id": self._name, "output_index": len(self.output), "delta": said}
        text = self.event("response.reasoning_text.delta", **at, content_index=0)
        if self._summary:
            text += self.event("response.reasoning_summary_text.delta", **at, summary_index=0)
        return text

    @property
    def _may_call(self) -> bool:
        return not (self._calls and self._one_call)

    def _call_begun(self, name: str) -> str:
        """The beginning of a call, unless it is open."""
        if self._open == "call":
            return ""
        text = self.ended("completed")
        self._open, self._name, self._call_id, self._said = "call", self._names.next("fc"), self._names.call(), ""
        item = items.call_item(self._name, self._call_id, name, "", "in_progress", self._offers)
        return text + self.event("response.output_item.added", output_index=len(self.output), item=item)

    def _arguments(self, more: str, kind: str = "function_call_arguments") -> str:
        self._said += more
        return self.event(f"response.{kind}.delta", item_id=self._name, output_index=len(self.output), delta=more)

    def _call(self, call: ToolCall) -> str:
        text = self._call_begun(call.name)
        kind, field = "function_call_arguments", "arguments"
        if self._offers.of(call.name).custom:
            kind, field = "custom_tool_call_input", "input"
            text += self._arguments(self._offers.arguments(call.name, call.arguments), kind)
        else:
            text += self._arguments(remaining(call.arguments, self._said))
        item = items.call_item(self._name, self._call_id, call.name, self._said, "completed", self._offers)
        told = {field: self._said, "name": item["name"]}
        text += self.event(f"response.{kind}.done", item_id=self._name, output_index=len(self.output), **told)
        self._open, self._calls = "", self._calls + 1
        return text + self._done(item)

    def _done(self, item: items.Item) -> str:
        self.output.append(item)
        return self.event("response.output_item.done", output_index=len(self.output) - 1, item=item)

    def _tell(self, part: Part) -> None:
        """A token of the message, with its log probability."""
        if self._logprobs and part.token is not None and part.logprob is not None and not part.finish_reason:
            told = words.told(part.token, part.logprob, part.top_logprobs, self._answering)
            self._told.append(told)
            self._new.append(told)
