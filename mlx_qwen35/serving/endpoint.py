"""One request to a model, from its body to the last byte of its answer, for any Api.

Knows when a status is decided and headers go out, that a client may go away at any time, and what is written to the
log: never what was said. Knows nothing of what an interface's fields mean, or of models.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from mlx_qwen35.serving import http
from mlx_qwen35.serving.answering import EngineAnswering
from mlx_qwen35.serving.http import GoneError, Pace, Receive, Scope, Send
from mlx_qwen35.serving.refusal import Refusal
from mlx_qwen35.serving.together import Together

if TYPE_CHECKING:
    from mlx_qwen35.serving.exchange import Api, Ask
    from mlx_qwen35.serving.metrics import Metrics
    from mlx_qwen35.serving.pool import Pool

log = logging.getLogger("mlx_qwen35.serving")

STATUS_WITHIN = 5.0  # seconds in which what fails has a status of its own; then a stream begins, and tells it


class Endpoint:
    """An ASGI application: POST one body, get one answer."""

    def __init__(self, api: Api, pool: Pool, metrics: Metrics, most_bytes: int) -> None:
        """most_bytes: of a body."""
        self._api, self._pool, self._metrics, self._most_bytes = api, pool, metrics, most_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        told = _Told(scope)
        answering: EngineAnswering | Together | None = None
        try:
            headers = http.headers_of(scope)
            body = await http.read_json(await http.read_body(receive, self._most_bytes))
            told.ask = ask = self._api.read(body, headers)
            making = Together if ask.others else EngineAnswering
            told.answering = answering = await making.of(self._pool, ask)
            answer = self._streamed if ask.stream else self._whole
            await self._while_here(receive, answer(ask, answering, send, told), told.pace)
        except GoneError:
            told.ended = "gone"
        except Exception as error:
            refusal = Refusal.of(error)
            told.ended = told.ended or refusal.kind
            if refusal.kind == "broken":
                log.exception("%s failed", told.path, exc_info=error)
            if told.status:  # headers are out: all that is left is to end
                raise
            told.status = refusal.status
            with suppress(GoneError):
                await http.send_refusal(send, refusal, self._api.refused(refusal))
        finally:
            if answering is not None:
                answering.close()
            told.write(self._metrics)

    async def _while_here(self, receive: Receive, work: Awaitable[None], pace: Pace) -> None:
        """Until it is done, or the client has gone away or takes nothing: then it is cancelled."""
        working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(http.gone(receive))
        try:
            ended: set[asyncio.Future[None]] = set()
            while not ended and not pace.stalled:
                look_again = http.SENT_WITHIN / 4
                ended, _ = await asyncio.wait(
                    {working, leaving}, timeout=look_again, return_when=asyncio.FIRST_COMPLETED
                )
            if not working.done():
                raise GoneError
            working.result()
        finally:
            for task in (working, leaving):
                task.cancel()
            await asyncio.gather(working, leaving, return_exceptions=True)

    async def _whole(self, ask: Ask, answering: EngineAnswering | Together, send: Send, told: _Told) -> None:
        made = await answering.finished()
        value = self._api.whole(ask, answering, made)
        told.status = 200
        await http.send_json(send, 200, value)

    async def _streamed(self, ask: Ask, answering: EngineAnswering | Together, send: Send, told: _Told) -> None:
        await answering.started(STATUS_WITHIN)
        told.status = 200
        await http.begin(send, 200, self._api.media_type, {"cache-control": "no-cache", "x-accel-buffering": "no"})
        stream = self._api.stream(ask, answering)
        try:
            async for text in stream:
                await told.pace.put(send, text.encode("utf-8", "replace"))
        finally:
            if hasattr(stream, "aclose"):
                await stream.aclose()
        await http.put(send, b"", more=False)


class _Told:
    """What the log and the counters learn of a request."""

    def __init__(self, scope: Scope) -> None:
        self.method, self.path = scope["method"], scope["path"]
        self.begun, self.status, self.ended = time.monotonic(), 0, ""
        self.pace = Pace(scope)
        self.ask: Ask | None = None
        self.answering: EngineAnswering | Together | None = None

    def write(self, metrics: Metrics) -> None:
        seconds = time.monotonic() - self.begun
        answering, ask = self.answering, self.ask
        ended = self.ended or (answering.ended if answering else "") or ("gone" if self.status == 0 else "")
        metrics.request(self.path, self.status or 499)
        model, tokens = "-", ""
        if answering is not None:
            usage = answering.usage
            metrics.answered(usage, answering.prompt_seconds if answering.answering else None)
            model = answering.model
            tokens = f"{usage.prompt_tokens}+{usage.answer_tokens} tokens, {usage.cached_tokens} cached, "
        status: Any = self.status or "-"
        log.info("%s %s %s %s %s%.2f s, %s", self.method, self.path, status, model, tokens, seconds, ended or "done")
        if ask is not None and ask.unread:
            log.debug("%s: %d fields ignored: %s", self.path, len(ask.unread), ", ".join(map(str, ask.unread))[:500])
