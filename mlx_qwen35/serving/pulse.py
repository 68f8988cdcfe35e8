"""The one loop of a stream of server-sent events, and when a client has to hear something, whatever it is.

Knows a clock, and that an interface writes what is told. Knows no interface.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Protocol

from mlx_qwen35.serving import exchange
from mlx_qwen35.serving.exchange import Alive, Answering

if TYPE_CHECKING:
    from mlx_qwen35.text.parts import Part


class Writer(Protocol):
    """One stream as text; "" where there is nothing to tell."""

    def begin(self) -> str: ...

    def part(self, part: Part) -> str:
        """What is new."""

    def alive(self) -> str:
        """A real event that says nothing."""

    def end(self) -> str:
        """What is due when nothing follows."""

    def failed(self, wrong: Exception) -> str:
        """An error, which ends the stream."""


async def told(writer: Writer, answering: Answering) -> AsyncIterator[str]:
    """The pieces of a stream. While a long call is written there are Parts of which nothing can be told yet: after
    ALIVE_EVERY seconds without a word there is an `alive`."""
    last = time.monotonic()
    try:
        begun = writer.begin()
        if begun:
            yield begun
        async for item in answering:
            text = writer.alive() if isinstance(item, Alive) else writer.part(item)
            if not text and time.monotonic() - last >= exchange.ALIVE_EVERY:
                text = writer.alive()
            if text:
                last = time.monotonic()
                yield text
        yield writer.end()
    except Exception as wrong:
        yield writer.failed(wrong)
