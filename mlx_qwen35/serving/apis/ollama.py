"""Ollama's interface, where a model answers: /api/chat and /api/generate.

Knows Ollama's words: NDJSON lines, options, keep_alive, times in nanoseconds. Knows nothing of which models there are.
Options of other engines are ignored, `num_ctx` among them: room for a conversation is made as it grows here.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from mlx_qwen35.serving.catalogue import without_tag
from mlx_qwen35.serving.exchange import Alive, Answering, Ask, Finished
from mlx_qwen35.serving.fields import Fields
from mlx_qwen35.serving.ollama_lists import refused, when
from mlx_qwen35.serving.openai_words import number, read_sampling
from mlx_qwen35.serving.refusal import Refusal
from mlx_qwen35.text.reply import ToolCall

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
_SECONDS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_DURATION = re.compile(r"(-|\+)?((?:\d+(?:\.\d*)?|\.\d+)(?:ns|us|µs|ms|s|m|h))+")
_STEP = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|ms|s|m|h)")
_MOST_TOLD = 20  # likeliest tokens beside each


class _Ollama:
    """What both ways of asking have in common."""

    media_type = "application/x-ndjson"

    def refused(self, refusal: Refusal) -> dict[str, Any]:
        return refused(refusal)

    def whole(self, ask: Ask, answering: Answering, made: Sequence[Finished]) -> dict[str, Any]:
        if ask.load_only:
            return self._loaded(ask, answering)
        one = made[0]
        said = self._said(one.reasoning, one.content, [_call(call) for call in one.tool_calls])
        told = [_logprob(answering, *each) for each in one.logprobs] if ask.extra["logprobs"] else []
        return _head(answering) | said | _told(told) | _end(answering, one.finish_reason)

    async def stream(self, ask: Ask, answering: Answering) -> AsyncIterator[str]:
        reason, told = "stop", []
        try:
            async for part in answering:
                if isinstance(part, Alive):
                    yield self._line(_head(answering) | self._said("", "", []) | {"done": False})
                    continue
                reason = part.finish_reason or reason
                if ask.extra["logprobs"] and part.logprob is not None:
                    told.append(_logprob(answering, part.token, part.logprob, part.top_logprobs))
                if part.reasoning or part.content or part.tool_calls:
                    said = self._said(part.reasoning, part.content, [_call(call) for call in part.tool_calls])
                    yield self._line(_head(answering) | said | _told(told) | {"done": False})
                    told = []
        except Exception as error:
            yield self._line(refused(Refusal.of(error)))
            return
        if ask.load_only:
            yield self._line(self._loaded(ask, answering))
        else:
            yield self._line(_head(answering) | self._said("", "", []) | _told(told) | _end(answering, reason))

    def _loaded(self, ask: Ask, answering: Answering) -> dict[str, Any]:
        reason = "unload" if ask.ttl == 0 else "load"
        return _head(answering) | self._said("", "", []) | {"done_reason": reason, "done": True}

    def _said(self, reasoning: str, content: str, calls: list[dict[str, Any]]) -> dict[str, Any]:
        raise NotImplementedError

    @staticmethod
    def _line(value: dict[str, Any]) -> str:
        return json.dumps(value, separators=(",", ":")) + "\n"


class OllamaChat(_Ollama):
    """POST /api/chat"""

    def read(self, body: Mapping[str, Any], headers: Mapping[str, str]) -> Ask:
        fields = Fields(body)
        messages = [_message(each, f"messages[{at}].") for at, each in enumerate(fields.list("messages"))]
        tools = fields.list("tools")
        ask = _asked(fields, messages)
        if tools:
            ask.options["tools"] = list(tools)
        return ask

    def _said(self, reasoning: str, content: str, calls: list[dict[str, Any]]) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": content}
        if reasoning:
            message["thinking"] = reasoning
        if calls:
            message["tool_calls"] = calls
        return {"message": message}


class OllamaGenerate(_Ollama):
    """POST /api/generate"""

    def read(self, body: Mapping[str, Any], headers: Mapping[str, str]) -> Ask:
        fields = Fields(body)
        text, system = fields.text("prompt", ""), fields.text("system")
        pictures, raw = _pictures(fields), fields.flag("raw", False)
        if fields.text("suffix"):
            raise Refusal("invalid", "suffix: this model does not fill in the middle: leave it out", "suffix")
        if raw and pictures:
            raise Refusal("invalid", "raw: a bare prompt has no place for images: leave one of the two out", "images")
        if raw:
            ask = _asked(fields, text)
            ask.plain = True
            return ask
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": [*pictures, {"type": "text", "text": text}] if pictures else text})
        return _asked(fields, messages if text or pictures else [])

    def _said(self, reasoning: str, content: str, calls: list[dict[str, Any]]) -> dict[str, Any]:
        return {"response": content} | ({"thinking": reasoning} if reasoning else {})


def seconds(fields: Fields, name: str = "keep_alive") -> float | None:
    """Of a duration: a number, or a text such as "5m" or "1h30m"; below 0 is for ever, math.inf. None: none given."""
    value = fields.any(name)
    if value is None:
        return None
    if isinstance(value, str):
        text = value.strip()
        if _DURATION.fullmatch(text):
            value = sum(float(number) * _SECONDS[unit] for number, unit in _STEP.findall(text))
            value = -value if text.startswith("-") else value
        else:
            try:
                value = float(text)
            except ValueError:
                raise fields.refused(name, 'a duration, such as "5m", 300, 0 or -1') from None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
        raise fields.refused(name, 'a duration, such as "5m", 300, 0 or -1')
    return math.inf if value < 0 or math.isinf(value) else float(value)


def _asked(fields: Fields, prompt: list[dict[str, Any]] | str) -> Ask:
    """What both ways of asking read alike."""
    given = fields.object("options") or Fields({}, "options.")
    options, sampling = _options(given)
    if (form := fields.any("format")) not in (None, ""):
        options["response_format"] = _form(fields, form)
    options |= _thinking(fields)
    top = fields.whole("top_logprobs", 0, _MOST_TOLD)
    if logprobs := bool(fields.flag("logprobs", False) or top):
        options |= {"logprobs": True, "top_logprobs": top or 0}
    name, stream, ttl = fields.text("model"), fields.flag("stream", True), seconds(fields)
    return Ask(
        model=without_tag(name) if name else None,
        prompt=prompt,
        options=options,
        sampling=sampling,
        stream=stream,
        ttl=ttl,
        load_only=not prompt,
        unread=[*fields.unread, *(f"options.{name}" for name in given.unread)],
        extra={"logprobs": logprobs},
    )


def _options(given: Fields) -> tuple[dict[str, Any], dict[str, Any]]:
    """-> options of `Engine.submit`, fields of `Sampling`."""
    sampling = read_sampling(given)
    last = given.whole("repeat_last_n")
    if last == 0:
        sampling["repetition_penalty"] = 1.0
    elif last is not None and last > 0:
        sampling["repetition_context_size"] = last
    options: dict[str, Any] = {}
    if (most := given.whole("num_predict")) is not None and most > 0:  # -1: to the end, -2: as much as there is room
        options["max_tokens"] = most
    if stop := [text for text in given.strings("stop") if text]:
        options["stop"] = stop
    return options, sampling


def _thinking(fields: Fields) -> dict[str, Any]:
    think = fields.any("think")
    if think is None:
        return {}
    if isinstance(think, bool):
        return {"enable_thinking": think}
    if isinstance(think, str) and think in EFFORTS:
        return {"reasoning_effort": think}
    raise fields.refused("think", "true, false or one of " + ", ".join(EFFORTS))


def _form(fields: Fields, form: Any) -> dict[str, Any]:
    if form == "json":
        return {"type": "json_object"}
    if isinstance(form, Mapping):
        return {"type": "json_schema", "json_schema": {"schema": dict(form)}}
    raise fields.refused("format", 'a JSON schema, or "json"')


def _message(given: Any, where: str) -> dict[str, Any]:
    """A message as the engine takes it: pictures before what is said of them."""
    fields = Fields(given, where)
    text = fields.text("content", "")
    message: dict[str, Any] = {"role": fields.text("role", "")}
    pictures = _pictures(fields)
    message["content"] = [*pictures, {"type": "text", "text": text}] if pictures else text
    if thinking := fields.text("thinking"):
        message["reasoning_content"] = thinking
    if calls := fields.list("tool_calls"):
        message["tool_calls"] = list(calls)
    if name := fields.text("tool_name") or fields.text("name"):
        message["name"] = name
    return message


def _pictures(fields: Fields) -> list[dict[str, Any]]:
    """Parts of base64, and of nothing else: no file is read and nothing is fetched for a request."""
    images = fields.list("images")
    if not all(isinstance(image, str) for image in images):
        raise fields.refused("images", "a list of pictures in base64")
    return [{"type": "image", "base64": image.strip()} for image in images]


def _head(answering: Answering) -> dict[str, Any]:
    return {"model": answering.model, "created_at": when(answering.created)}


def _end(answering: Answering, reason: str) -> dict[str, Any]:
    load, prompt, answer = answering.load_seconds, answering.prompt_seconds, answering.answer_seconds
    return {
        "done": True,
        "done_reason": "stop" if reason == "stop" else "length",
        "total_duration": _ns(load + prompt + answer),
        "load_duration": _ns(load),
        "prompt_eval_count": answering.usage.prompt_tokens,
        "prompt_eval_duration": _ns(prompt),
        "eval_count": answering.usage.answer_tokens,
        "eval_duration": _ns(answer),
    }


def _call(call: ToolCall) -> dict[str, Any]:
    return {"function": {"index": call.index, "name": call.name, "arguments": call.arguments}}


def _logprob(answering: Answering, token: int, logprob: float, top: Sequence[tuple[int, float]]) -> dict[str, Any]:
    def told(token: int, logprob: float) -> dict[str, Any]:
        text, raw = answering.token_text(token), answering.token_bytes(token)
        return {"token": text, "logprob": number(logprob), "bytes": list(raw)}

    return told(token, logprob) | ({"top_logprobs": [told(*each) for each in top]} if top else {})


def _told(logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    return {"logprobs": logprobs} if logprobs else {}


def _ns(seconds: float) -> int:
    return max(0, round(seconds * 1e9))
