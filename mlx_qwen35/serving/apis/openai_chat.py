"""POST /v1/chat/completions, as OpenAI's clients and those that imitate them ask and read it.

Knows the fields of its body and the shape of its answers; openai_words.py has what its sisters share.

A stream: the role of each answer once, at the beginning; then reasoning (under both names that clients know), content
and calls as they come; finish_reason once for each; the usage, where it was asked for; [DONE].
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from json import dumps
from json.encoder import encode_basestring_ascii as quoted
from typing import TYPE_CHECKING, Any

from mlx_qwen35.serving import openai_words as words
from mlx_qwen35.serving.exchange import Answering, Ask, Finished
from mlx_qwen35.serving.fields import Fields
from mlx_qwen35.serving.messages_given import given_messages
from mlx_qwen35.serving.openai_thinking import read_thinking
from mlx_qwen35.serving.openai_tools import older_form, read_tools
from mlx_qwen35.serving.pulse import told
from mlx_qwen35.serving.refusal import Refusal
from mlx_qwen35.text.call_pieces import as_json, remaining
from mlx_qwen35.text.reply import CallDelta, ContentDelta, ReasoningDelta, ToolCall

if TYPE_CHECKING:
    from mlx_qwen35.text.parts import Part

_FORMATS = ("text", "json_object", "json_schema", "regex", "grammar", "gbnf")


class ChatCompletions:
    media_type = "text/event-stream"

    def read(self, body: Mapping[str, Any], headers: Mapping[str, str]) -> Ask:
        fields = Fields(body)
        messages = fields.list("messages")
        options = read_tools(fields) | read_thinking(fields) | words.read_limits(fields)
        shape = _format(fields)
        if shape is not None:
            options["response_format"] = shape
        if fields.flag("continue_final_message"):
            options["continue_final_message"] = True
        wanted, top = fields.flag("logprobs"), words.read_told(fields, "top_logprobs")
        if wanted or top:
            options |= {"logprobs": True} | ({"top_logprobs": top} if top else {})
        one_call, older = fields.flag("parallel_tool_calls") is False, older_form(body)
        stream = bool(fields.flag("stream"))
        if stream and "tools" in options and not older:
            options["call_pieces"] = True
        return Ask(
            model=fields.text("model"),
            prompt=given_messages(messages),
            options=options,
            sampling=words.read_sampling(fields),
            stream=stream,
            ttl=fields.number("ttl", 0),
            extra={
                "usage": words.wants_usage(fields),
                "one_call": one_call,
                "logprobs": "logprobs" in options,
                "older": older,
            },
            unread=fields.unread,
        )

    def whole(self, ask: Ask, answering: Answering, made: Sequence[Finished]) -> dict[str, Any]:
        ids = _CallIds(answering.id)
        return {
            "id": f"chatcmpl-{answering.id}",
            "object": "chat.completion",
            "created": answering.created,
            "model": answering.model,
            "choices": [_choice(index, one, ask, answering, ids) for index, one in enumerate(made)],
            "usage": words.usage(answering.usage),
        }

    def stream(self, ask: Ask, answering: Answering) -> AsyncIterator[str]:
        return told(_Writer(ask, answering), answering)

    def refused(self, refusal: Refusal) -> dict[str, Any]:
        return words.error(refusal)


class _CallIds:
    """An id for each call of a request, none of which any other has."""

    def __init__(self, request: str) -> None:
        self._request, self._count = request, 0

    def next(self) -> str:
        self._count += 1
        return f"call_{self._request}{self._count:02d}"


class _Writer:
    """One stream as text. Nothing here may cost more than some microseconds a token."""

    def __init__(self, ask: Ask, answering: Answering) -> None:
        self._answering = answering
        self._answers = ask.options.get("n") or 1
        self._one_call, self._older = ask.extra.get("one_call"), ask.extra.get("older")
        self._usage, self._logprobs = ask.extra.get("usage"), ask.extra.get("logprobs")
        self._ids = _CallIds(answering.id)
        self._calls = [0] * self._answers
        self._pieces: dict[int, str] = {}  # of the call that each answer writes: what was told of its arguments
        self._open = set(range(self._answers))
        self._told: list[list[dict[str, Any]]] = [[] for _ in range(self._answers)]
        self._head, self._tail = "", '"usage":null}\n\n' if self._usage else ""

    def begin(self) -> str:
        """The roles."""
        model, made = dumps(self._answering.model), self._answering
        self._head = (
            f'data: {{"id":"chatcmpl-{made.id}","object":"chat.completion.chunk","created":{made.created},'
            f'"model":{model},"choices":['
        )
        self._tail = '],"usage":null}\n\n' if self._usage else "]}\n\n"
        return "".join(self._chunk(index, '{"role":"assistant","content":""}') for index in range(self._answers))

    def alive(self) -> str:
        return self._chunk(min(self._open, default=0), "{}")

    def part(self, part: Part) -> str:
        """What is new; "" if nothing is."""
        index, text = part.index, ""
        if self._logprobs and part.token is not None and part.logprob is not None:
            self._told[index].append(words.told(part.token, part.logprob, part.top_logprobs, self._answering))
        for event in part.events:
            if isinstance(event, ContentDelta):
                text += self._chunk(index, f'{{"content":{quoted(event.text)}}}')
            elif isinstance(event, ReasoningDelta):
                said = quoted(event.text)
                text += self._chunk(index, f'{{"reasoning_content":{said},"reasoning":{said}}}')
            elif isinstance(event, CallDelta):
                text += self._piece(index, event)
            elif isinstance(event, ToolCall):
                text += self._call(index, event)
        if part.finish_reason is not None:
            text += self._finish(index, part.finish_reason)
        return text

    def end(self) -> str:
        """What is due when nothing follows."""
        text = "".join(self._finish(index, None) for index in sorted(self._open))
        if self._usage:
            text += f'{self._head}],"usage":{dumps(words.usage(self._answering.usage))}}}\n\n'
        return text + words.DONE

    def failed(self, wrong: Exception) -> str:
        return words.failed(wrong)

    def _finish(self, index: int, reason: str | None) -> str:
        self._open.discard(index)
        said = words.finish_reason(reason, calls=bool(self._calls[index]))
        return self._chunk(index, "{}", "function_call" if self._older and said == "tool_calls" else said)

    def _piece(self, index: int, piece: CallDelta) -> str:
        if self._calls[index] and self._one_call:
            return ""
        text = "" if index in self._pieces else self._call_begun(index, piece.name)
        self._pieces[index] = self._pieces.get(index, "") + piece.arguments
        return text + self._arguments(index, piece.arguments)

    def _call(self, index: int, call: ToolCall) -> str:
        at = self._calls[index]
        if at and (self._one_call or self._older):
            return ""
        if self._older:
            name, arguments = dumps(call.name), dumps(as_json(call.arguments))
            text = self._chunk(index, f'{{"function_call":{{"name":{name},"arguments":""}}}}')
            text += self._chunk(index, f'{{"function_call":{{"arguments":{arguments}}}}}')
        else:
            text = "" if index in self._pieces else self._call_begun(index, call.name)
            text += self._arguments(index, remaining(call.arguments, self._pieces.pop(index, "")))
        self._calls[index] += 1
        return text

    def _call_begun(self, index: int, name: str) -> str:
        head = f'"index":{self._calls[index]},"id":"{self._ids.next()}","type":"function"'
        return self._chunk(index, f'{{"tool_calls":[{{{head},"function":{{"name":{dumps(name)},"arguments":""}}}}]}}')

    def _arguments(self, index: int, more: str) -> str:
        at = self._calls[index]
        return self._chunk(index, f'{{"tool_calls":[{{"index":{at},"function":{{"arguments":{dumps(more)}}}}}]}}')

    def _chunk(self, index: int, delta: str, finish: str | None = None) -> str:
        """delta: as JSON. What was told of tokens since the last chunk goes with it."""
        logprobs = ""
        if self._logprobs and self._told[index]:
            logprobs = f'"logprobs":{dumps({"content": self._told[index], "refusal": None})},'
            self._told[index] = []
        reason = f'"{finish}"' if finish else "null"
        return f'{self._head}{{"index":{index},"delta":{delta},{logprobs}"finish_reason":{reason}}}{self._tail}'


def _format(fields: Fields) -> Any:
    """The response_format as `Engine.submit` takes it; None: any."""
    given = fields.object("response_format")
    if given is None:
        return None
    kind = given.one_of("type", _FORMATS)
    value = dict(fields.any("response_format"))
    if kind is None:
        raise fields.refused("response_format", 'an object with a type, such as {"type": "json_object"}')
    if kind == "text":
        return None
    if kind == "json_object" and isinstance(value.get("schema"), Mapping):
        return {"type": "json_schema", "json_schema": {"schema": value["schema"]}}
    if kind == "json_schema" and "json_schema" not in value and "schema" in value:
        return {"type": "json_schema", "json_schema": {"schema": value["schema"]}}
    if kind == "json_schema":
        inner = given.object("json_schema")
        if inner is None or inner.any("schema") is None:
            raise Refusal(
                "invalid",
                'response_format has no schema: write {"type": "json_schema", "json_schema": {"name": ..., '
                '"schema": ...}}',
                "response_format.json_schema",
            )
    return value


def _choice(index: int, one: Finished, ask: Ask, answering: Answering, ids: _CallIds) -> dict[str, Any]:
    calls = one.tool_calls[:1] if ask.extra.get("one_call") or ask.extra.get("older") else one.tool_calls
    message: dict[str, Any] = {
        "role": "assistant",
        "content": one.content if one.content or not calls else None,
        "refusal": None,
    }
    if one.reasoning:
        message |= {"reasoning_content": one.reasoning, "reasoning": one.reasoning}
    reason = words.finish_reason(one.finish_reason, calls=bool(calls))
    if calls and ask.extra.get("older"):
        message["function_call"], reason = _function(calls[0]), "function_call"
    elif calls:
        message["tool_calls"] = [{"id": ids.next(), "type": "function", "function": _function(call)} for call in calls]
    logprobs = None
    if ask.extra.get("logprobs"):
        logprobs = {"content": [words.told(*each, answering) for each in one.logprobs], "refusal": None}
    return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}


def _function(call: ToolCall) -> dict[str, str]:
    return {"name": call.name, "arguments": as_json(call.arguments)}
