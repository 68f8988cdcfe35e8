"""An Answering that plays what it is given, for the tests of interfaces: no model, no HTTP.

answering = Fake([thinks("Hm."), says("Yes"), calls("look", {"at": 1}), Alive(3, 9), ends("stop")])
chunks = streamed(Api(), ask, answering)        # the pieces of the stream
events(chunks)                                  # [(event or None, data as JSON, or "[DONE]")]
answered(Api(), ask, answering)                 # the JSON without streaming
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

from mlx_qwen35.serving.exchange import Alive, Api, Ask, Finished, Usage
from mlx_qwen35.text.messages import check_messages, in_order
from mlx_qwen35.text.parts import Part
from mlx_qwen35.text.reply import ContentDelta, Event, IncompleteCall, ReasoningDelta, ToolCall

ID = "0123456789abcdef01234567"
CREATED = 1_764_000_000
SECONDS = 10.0  # that a stream may take


def part(
    text: str = "",
    events: Sequence[Event] = (),
    *,
    token: int | None = 1,
    finish: str | None = None,
    index: int = 0,
    logprob: float | None = None,
    top: Sequence[tuple[int, float]] = (),
    stop: str | None = None,
) -> Part:
    """A Part whose numbers are made up."""
    return Part(
        text=text,
        token=token,
        logprobs=None,
        events=tuple(events),
        prompt_tokens=7,
        prompt_tps=70.0,
        cached_tokens=4,
        generation_tokens=1,
        generation_tps=10.0,
        peak_memory=0.5,
        finish_reason=finish,
        index=index,
        logprob=logprob,
        top_logprobs=tuple(top),
        stop_string=stop,
    )


def says(text: str, **options: Any) -> Part:
    return part(text, [ContentDelta(text)], **options)


def thinks(text: str, **options: Any) -> Part:
    return part(text, [ReasoningDelta(text)], **options)


def calls(name: str, arguments: dict[str, Any], at: int = 0, **options: Any) -> Part:
    """A whole call, the one at `at` of its answer."""
    raw = f"<tool_call>\n<function={name}>\n</function>\n</tool_call>"
    return part(raw, [ToolCall(name, arguments, raw, at)], **options)


def breaks_off(name: str, raw: str, **options: Any) -> Part:
    """A call that has no end, which is content too."""
    return part(raw, [ContentDelta(raw), IncompleteCall(name, raw, "the reply ends inside it")], **options)


def ends(reason: str = "stop", *, token: int | None = 2, **options: Any) -> Part:
    return part(token=token, finish=reason, **options)


class Fake:
    """Plays `items`: Parts and Alives are given out, an error is raised. closed: whether its reader closed it early.

    usage: whole from the start; None: of 11 prompt tokens 4 were cached, and each Part with a token counts.
    """

    def __init__(
        self,
        items: Sequence[Part | Alive | BaseException],
        *,
        model: str = "demo",
        usage: Usage | None = None,
        texts: dict[int, str] | None = None,
        pause: float = 0.0,
    ) -> None:
        """texts: what tokens are as text, for those whose text is not their number; pause: seconds before each item."""
        self.items, self.pause, self.texts = list(items), pause, texts or {}
        self.model, self.id, self.created = model, ID, CREATED
        self._counts = usage is None
        self.usage = Usage(prompt_tokens=11, cached_tokens=4) if usage is None else usage
        self.prompt_seconds, self.answer_seconds, self.load_seconds = 0.25, 0.5, 0.0
        self.closed = False

    async def __aiter__(self) -> AsyncIterator[Part | Alive]:
        whole = False
        try:
            for item in self.items:
                await asyncio.sleep(self.pause)
                if isinstance(item, BaseException):
                    raise item
                self._count(item)
                yield item
            whole = True
        finally:
            self.closed = not whole

    async def finished(self) -> list[Finished]:
        made: dict[int, Finished] = {}
        async for item in self:
            if isinstance(item, Alive):
                continue
            answer = made.setdefault(item.index, Finished())
            answer.text += item.text
            answer.reasoning += item.reasoning
            answer.content += item.content
            answer.tool_calls += item.tool_calls
            if item.token is not None:
                answer.tokens.append(item.token)
                if item.logprob is not None:
                    answer.logprobs.append((item.token, item.logprob, item.top_logprobs))
            answer.finish_reason = item.finish_reason or answer.finish_reason
            answer.stop_string = item.stop_string
        return [made[index] for index in sorted(made)]

    def token_text(self, token: int) -> str:
        return self.texts.get(token, str(token))

    def token_bytes(self, token: int) -> bytes:
        return self.token_text(token).encode()

    def _count(self, item: Part | Alive) -> None:
        if self._counts and isinstance(item, Part) and item.token is not None:
            self.usage.answer_tokens += 1
            self.usage.reasoning_tokens += bool(item.reasoning)


def read(api: Api, body: dict[str, Any], **headers: str) -> Ask:
    """What a body asks, after a turn through JSON."""
    return api.read(json.loads(json.dumps(body)), headers)


def answered(api: Api, ask: Ask, answering: Fake) -> dict[str, Any]:
    """The JSON of an answer without streaming, after a turn through JSON; errors are raised."""

    async def run() -> dict[str, Any]:
        return api.whole(ask, answering, await answering.finished())

    return json.loads(json.dumps(asyncio.run(asyncio.wait_for(run(), SECONDS))))


def streamed(api: Api, ask: Ask, answering: Fake, most: int | None = None) -> list[str]:
    """The pieces of a stream; most: after so many its reader goes away."""

    async def run() -> list[str]:
        pieces: list[str] = []
        stream = api.stream(ask, answering)
        async for piece in stream:
            pieces.append(piece)
            if len(pieces) == most:
                await stream.aclose()
                break
        return pieces

    return asyncio.run(asyncio.wait_for(run(), SECONDS))


def events(pieces: Sequence[str]) -> list[tuple[str | None, Any]]:
    """The events of a stream of server-sent events: (its name or None, its data as JSON, or as text if it is none)."""
    found = []
    for block in "".join(pieces).replace("\r\n", "\n").split("\n\n"):
        lines = [line for line in block.split("\n") if line and not line.startswith(":")]
        if not lines:
            continue
        fields = [line.partition(":")[::2] for line in lines]
        name = next((value.strip() for key, value in fields if key == "event"), None)
        data = "\n".join(value.removeprefix(" ") for key, value in fields if key == "data")
        try:
            found.append((name, json.loads(data)))
        except ValueError:
            found.append((name, data))
    return found


def lines(pieces: Sequence[str]) -> list[Any]:
    """The JSON lines of a stream of them."""
    return [json.loads(line) for line in "".join(pieces).split("\n") if line.strip()]


def said(messages: Sequence[Any]) -> list[tuple[str, str]]:
    """Messages without pictures as a template gets them: (role, text) of each."""

    def text(content: Any) -> str:
        return content if isinstance(content, str) else "".join(part["text"] for part in content)

    return [(message["role"], text(message["content"])) for message in in_order(check_messages(messages))]
