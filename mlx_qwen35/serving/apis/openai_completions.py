"""POST /v1/completions, the older of OpenAI's interfaces: a text, or token ids, that a model goes on with.

Knows the fields of its body and the shape of its answers; openai_words.py has what its sisters share. No template is
put around a prompt, and what the model writes is text, tags and all.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from json import dumps
from typing import TYPE_CHECKING, Any

from mlx_qwen35.serving import openai_words as words
from mlx_qwen35.serving.exchange import Answering, Ask, Finished
from mlx_qwen35.serving.fields import Fields
from mlx_qwen35.serving.pulse import told
from mlx_qwen35.serving.refusal import Refusal

if TYPE_CHECKING:
    from mlx_qwen35.text.parts import Part

MOST_PROMPTS = 128

_Told = tuple[int, float, tuple[tuple[int, float], ...]]


class Completions:
    media_type = "text/event-stream"

    def read(self, body: Mapping[str, Any], headers: Mapping[str, str]) -> Ask:
        fields = Fields(body)
        prompts = _prompts(fields)
        options = words.read_limits(fields)
        if fields.text("suffix"):
            raise fields.refused("suffix", "none: these models go on with a text and fill no gaps")
        best = fields.whole("best_of", 1)
        if best is not None and best != options.get("n", 1):
            raise fields.refused("best_of", "as many as n: answers are not ranked here")
        top, echo = words.read_told(fields, "logprobs"), bool(fields.flag("echo"))
        if top is not None:
            if echo:
                raise fields.refused("logprobs", "none beside echo: those of a prompt are not computed")
            options |= {"logprobs": True} | ({"top_logprobs": top} if top else {})
        ask = Ask(
            model=fields.text("model"),
            prompt=prompts[0],
            options=options,
            sampling=words.read_sampling(fields),
            stream=bool(fields.flag("stream")),
            plain=True,
            ttl=fields.number("ttl", 0),
            extra={
                "usage": words.wants_usage(fields),
                "logprobs": top is not None,
                "echo": prompts if echo else None,
            },
            unread=fields.unread,
        )
        return replace(ask, others=[replace(ask, prompt=prompt) for prompt in prompts[1:]])

    def whole(self, ask: Ask, answering: Answering, made: Sequence[Finished]) -> dict[str, Any]:
        choices = []
        for index, one in enumerate(made):
            told = _Legacy(answering)
            for each in one.logprobs:
                told.add(each)
            choices.append(
                {
                    "index": index,
                    "text": _echo(ask, answering, index) + one.text,
                    "logprobs": told.take() if ask.extra.get("logprobs") else None,
                    "finish_reason": words.finish_reason(one.finish_reason),
                }
            )
        return {
            "id": f"cmpl-{answering.id}",
            "object": "text_completion",
            "created": answering.created,
            "model": answering.model,
            "choices": choices,
            "usage": words.usage(answering.usage),
        }

    def stream(self, ask: Ask, answering: Answering) -> AsyncIterator[str]:
        return told(_Writer(ask, answering), answering)

    def refused(self, refusal: Refusal) -> dict[str, Any]:
        return words.error(refusal)


class _Legacy:
    """Log probabilities in the older shape: lists side by side, and where each token begins in the text."""

    def __init__(self, answering: Answering) -> None:
        self._answering, self._offset = answering, 0
        self._new: list[_Told] = []

    def add(self, told: _Told) -> None:
        self._new.append(told)

    def take(self) -> dict[str, Any] | None:
        """Those that were added since; None: none was."""
        if not self._new:
            return None
        made: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        text = self._answering.token_text
        for token, logprob, top in self._new:
            written = text(token)
            made["tokens"].append(written)
            made["token_logprobs"].append(words.number(logprob))
            likeliest = {text(other): words.number(amount) for other, amount in reversed(top)}
            made["top_logprobs"].append({written: words.number(logprob)} | likeliest)
            made["text_offset"].append(self._offset)
            self._offset += len(written)
        self._new = []
        return made


class _Writer:
    """One stream as text."""

    def __init__(self, ask: Ask, answering: Answering) -> None:
        self._ask, self._answering = ask, answering
        self._answers = (ask.options.get("n") or 1) * (1 + len(ask.others))
        self._open = set(range(self._answers))
        self._usage, self._logprobs = ask.extra.get("usage"), ask.extra.get("logprobs")
        self._told = [_Legacy(answering) for _ in range(self._answers)]
        self._head = (
            f'data: {{"id":"cmpl-{answering.id}","object":"text_completion","created":{answering.created},'
            f'"model":{dumps(answering.model)},"choices":['
        )
        self._tail = '],"usage":null}\n\n' if self._usage else "]}\n\n"

    def begin(self) -> str:
        """The prompts, for an echo."""
        if not self._ask.extra.get("echo"):
            return ""
        return "".join(self._chunk(index, _echo(self._ask, self._answering, index)) for index in range(self._answers))

    def alive(self) -> str:
        return self._chunk(min(self._open, default=0), "")

    def part(self, part: Part) -> str:
        """What is new; "" if nothing is."""
        if self._logprobs and part.token is not None and part.logprob is not None:
            self._told[part.index].add((part.token, part.logprob, part.top_logprobs))
        if part.finish_reason is not None:
            return self._finish(part.index, part.text, part.finish_reason)
        return self._chunk(part.index, part.text) if part.text else ""

    def end(self) -> str:
        """What is due when nothing follows."""
        text = "".join(self._finish(index, "", None) for index in sorted(self._open))
        if self._usage:
            text += f'{self._head}],"usage":{dumps(words.usage(self._answering.usage))}}}\n\n'
        return text + words.DONE

    def failed(self, wrong: Exception) -> str:
        return words.failed(wrong)

    def _finish(self, index: int, text: str, reason: str | None) -> str:
        self._open.discard(index)
        return self._chunk(index, text, words.finish_reason(reason))

    def _chunk(self, index: int, text: str, finish: str | None = None) -> str:
        told = dumps(self._told[index].take()) if self._logprobs else "null"
        reason = f'"{finish}"' if finish else "null"
        return (
            f'{self._head}{{"index":{index},"text":{dumps(text)},"logprobs":{told},'
            f'"finish_reason":{reason}}}{self._tail}'
        )


def _prompts(fields: Fields) -> list[str | list[int]]:
    """The prompts: a text, token ids, or a list of either."""
    given = fields.any("prompt")
    if isinstance(given, str) or _is_ids(given):
        given = [given]
    if not isinstance(given, list) or not given or not all(isinstance(each, str) or _is_ids(each) for each in given):
        raise fields.refused("prompt", "a text, a list of token ids, or a list of either")
    if len(given) > MOST_PROMPTS:
        raise fields.refused("prompt", f"at most {MOST_PROMPTS} prompts at once")
    if not all(given):
        raise Refusal("invalid", "prompt is empty: give at least one character or token", "prompt")
    return given


def _is_ids(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(each, int) and not isinstance(each, bool) and each >= 0 for each in value)
    )


def _echo(ask: Ask, answering: Answering, index: int) -> str:
    """The prompt of an answer as text; "" if it is not to be told."""
    prompts = ask.extra.get("echo")
    if not prompts:
        return ""
    prompt = prompts[index // (ask.options.get("n") or 1)]
    if isinstance(prompt, str):
        return prompt
    return b"".join(answering.token_bytes(token) for token in prompt).decode("utf-8", "replace")
