"""One connection of uvicorn's, with what that lacks: a limit of time on the head of a request, and a short way for the
pieces of a stream.

Knows uvicorn's protocol and the chunks of HTTP/1.1. Knows nothing of what is asked.
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from mlx_qwen35.serving.http import WIRE

HEAD_WITHIN = 20.0  # seconds from a connection, or a request's first byte, to the end of its headers
_LATE = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


class Connection(H11Protocol):
    """H11Protocol that waits for no head for ever, and leaves a Wire in the scope's state."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.app_state = {**self.app_state, WIRE: Wire(self)}
        self._late: asyncio.TimerHandle | None = None
        self._heard = False  # of the head that is waited for

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        self._heard = True
        super().data_received(data)
        if self.conn.their_state is h11.IDLE:  # the head has begun, and is not whole
            self._wait()
        elif self._late is not None:
            self._late.cancel()
            self._late = None

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._late is not None:
            self._late.cancel()

    def on_response_complete(self) -> None:
        self._heard = False
        super().on_response_complete()

    def _wait(self) -> None:
        if self._late is None:
            self._late = self.loop.call_later(HEAD_WITHIN, self._give_up)

    def _give_up(self) -> None:
        self._late = None
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            if self._heard:
                self.transport.write(_LATE)
            self.transport.close()


class Wire:
    """What a streamed answer is written to, once its headers are out: as ASGI's `send` does, at a third of its cost."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def put(self, body: bytes) -> None:
        """One chunk, for a client of HTTP/1.1 that was told no length. Raises OSError where it has gone."""
        connection = self._connection
        if connection.flow.write_paused and not connection.cycle.disconnected:
            await connection.flow.drain()
        if connection.cycle.disconnected:
            raise ConnectionResetError
        if body:
            connection.transport.write(b"%x\r\n%b\r\n" % (len(body), body))
