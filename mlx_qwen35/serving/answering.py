"""What a client asked, while a model of the pool answers it.

Knows when a model is loaded, asked and let go, what is counted, and how long a client may hear nothing. Knows neither
HTTP nor any interface.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import TYPE_CHECKING

from mlx_qwen35.serving import exchange
from mlx_qwen35.serving.exchange import Alive, Ask, Finished, Usage
from mlx_qwen35.serving.refusal import Refusal
from mlx_qwen35.text.reply import ReasoningDelta

if TYPE_CHECKING:
    from mlx_qwen35.engine.answer import Answer
    from mlx_qwen35.serving.places import Place
    from mlx_qwen35.serving.pool import Lease, Pool
    from mlx_qwen35.text.parts import Part


class EngineAnswering:
    """An Answering. It begins at once, and has to be closed. ended: how, for the log: a finish_reason or an error."""

    def __init__(self, pool: Pool, place: Place, ask: Ask) -> None:
        self.model, self.id, self.created = place.name, secrets.token_hex(12), int(time.time())
        self.usage = Usage()
        self.prompt_seconds = self.answer_seconds = self.load_seconds = 0.0
        self.ended = ""
        self.begun = self._asked = time.monotonic()
        self.answering = False  # a first token came
        self._pool, self._place, self._ask = pool, place, ask
        self._lease: Lease | None = None
        self._answer: Answer | None = None
        self._progress = (0, 0)
        self._counts: dict[int, _Count] = {}
        self._closed = False
        self._starting = asyncio.ensure_future(self._start())
        self._starting.add_done_callback(lambda task: task.cancelled() or task.exception())  # it is told elsewhere

    @classmethod
    async def of(cls, pool: Pool, ask: Ask) -> EngineAnswering:
        """Raises Refusal not_found."""
        look_up = pool.look_up if ask.load_only else pool.look_up_answerer
        return cls(pool, await look_up(ask.model), ask)

    async def started(self, within: float | None = None) -> bool:
        """Whether the model has what was asked, after at most so many seconds. Raises Refusal."""
        await asyncio.wait([self._starting], timeout=within)
        if not self._starting.done():
            return False
        try:
            self._starting.result()
        except asyncio.CancelledError:
            raise Refusal("unavailable", "the server is closing", retry_after=5) from None
        except Exception as error:
            raise self._refused(error) from error
        return True

    async def __aiter__(self) -> AsyncIterator[Part | Alive]:
        try:
            while not await self.started(exchange.ALIVE_EVERY):
                yield self._alive()
            while self._answer is not None:
                try:
                    parts = await self._answer.some(exchange.ALIVE_EVERY)
                except Exception as error:
                    raise self._refused(error) from error
                if parts is None:
                    return
                if not parts:
                    yield self._alive()
                for part in parts:
                    self._count(part)
                    yield part
        finally:
            self.close()

    async def finished(self) -> list[Finished]:
        """All answers, when they have ended."""
        made = [Finished() for _ in range(self._ask.options.get("n") or 1)]
        texts = [([], [], []) for _ in made]
        async for part in self:
            if isinstance(part, Alive):
                continue
            one, (text, reasoning, content) = made[part.index], texts[part.index]
            text.append(part.text)
            reasoning.append(part.reasoning)
            content.append(part.content)
            one.tool_calls += part.tool_calls
            if part.token is not None:
                one.tokens.append(part.token)
                if part.logprob is not None:
                    one.logprobs.append((part.token, part.logprob, part.top_logprobs))
            one.finish_reason, one.stop_string = part.finish_reason or one.finish_reason, part.stop_string
        for one, (text, reasoning, content) in zip(made, texts, strict=True):
            one.text, one.reasoning, one.content = "".join(text), "".join(reasoning), "".join(content)
        return made if self._answer is not None else []

    def token_text(self, token: int) -> str:
        """A token as text."""
        return self._tokenizer.decode([token])

    def token_bytes(self, token: int) -> bytes:
        """A token as bytes."""
        return self._tokenizer.token_bytes(token)

    def close(self) -> None:
        """Whoever asked wants no more: ends what runs, and lets the model go."""
        if self._closed:
            return
        self._closed = True
        if not self._starting.done():
            self._starting.cancel()
        if self._answer is not None and not self._answer.done:
            self._answer.cancel()
        if self._lease is not None:
            self._lease.release()

    @property
    def _tokenizer(self):  # noqa: ANN202
        assert self._lease is not None, "no token before the model is there"
        return self._lease.loaded.processor.tokenizer

    async def _start(self) -> None:
        lease = await self._pool.lease(self._place, self._ask.ttl)
        self._lease, self.load_seconds = lease, lease.load_seconds
        self._asked = time.monotonic()
        if self._closed:
            lease.release()
            return
        if self._ask.load_only:
            return
        reading = asyncio.ensure_future(self._pool.in_thread(lambda: lease.loaded.submit(self._ask, self._read)))
        try:
            with lease.loaded.engine.expecting():
                self._answer = await asyncio.shield(reading)
        except asyncio.CancelledError:
            reading.add_done_callback(_cancel)  # the thread goes on until the prompt is read
            raise
        self.usage.prompt_tokens = self._answer.prompt_tokens
        self._progress = (0, self._answer.prompt_tokens)
        if self._closed:
            self._answer.cancel()

    def _read(self, done: int, total: int) -> None:
        """Called by the engine's thread."""
        self._progress = (done, total)

    def _alive(self) -> Alive:
        if self._lease is None:
            return Alive(loading=self._place.share)
        return Alive(*self._progress)

    def _count(self, part: Part) -> None:
        now = time.monotonic()
        if not self.answering:
            self.answering = True
            self.prompt_seconds = now - self._asked
            self.usage.cached_tokens = min(part.cached_tokens, self.usage.prompt_tokens)
        self.answer_seconds = now - self._asked - self.prompt_seconds
        count = self._counts.get(part.index)
        if count is None:
            count = self._counts[part.index] = _Count()
        count.add(part, self.usage)
        if part.finish_reason == "cancelled" and not self._closed:
            raise self._refused(Refusal("unavailable", "the server is closing: ask again", retry_after=5))
        self.ended = part.finish_reason or self.ended

    def _refused(self, error: BaseException) -> Refusal:
        refusal = Refusal.of(error)
        self.ended = f"{refusal.kind}: {type(error).__name__}" if refusal is not error else refusal.kind
        return refusal


class _Count:
    """Tokens of one answer, and those in its reasoning: a token that shows nothing yet is of what comes next."""

    def __init__(self) -> None:
        self._tokens = self._open = 0

    def add(self, part: Part, usage: Usage) -> None:
        """The next part; what it adds goes to the usage of the request."""
        usage.answer_tokens += part.generation_tokens - self._tokens
        self._tokens = part.generation_tokens
        self._open += part.token is not None
        if part.events:
            if any(isinstance(event, ReasoningDelta) for event in part.events):
                usage.reasoning_tokens += self._open
            self._open = 0


def _cancel(reading: asyncio.Future[Answer]) -> None:
    with suppress(BaseException):
        reading.result().cancel()
