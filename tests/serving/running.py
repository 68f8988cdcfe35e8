"""A server that really runs, on a free port of this machine, in a thread of this process.

Knows how it is started and ended. Knows nothing of what it is asked.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from mlx_qwen35.serving.pool import Pool
from mlx_qwen35.serving.server import Server, made

T = TypeVar("T")


@dataclass
class Running:
    """url: http://127.0.0.1:PORT; server and pool: to look inside."""

    url: str
    server: Server

    @property
    def pool(self) -> Pool:
        assert self.server.pool is not None
        return self.server.pool

    def call(self, work: Coroutine[Any, Any, T], within: float = 20) -> T:
        """What a coroutine returns on the server's event loop."""
        assert self.server._loop is not None
        return asyncio.run_coroutine_threadsafe(work, self.server._loop).result(within)

    @property
    def idle(self) -> bool:
        """Whether nobody uses a model, and no engine answers anything."""
        places = self.pool.places
        return all(place.busy == 0 and (place.loaded is None or place.loaded.engine.running == 0) for place in places)

    def becomes_idle(self, within: float = 5.0) -> bool:
        """Whether it is, at most so many seconds from now."""
        until = time.monotonic() + within
        while not self.idle and time.monotonic() < until:
            time.sleep(0.01)
        return self.idle


@contextmanager
def running(models: str | Sequence[str] | None = "demo", **options: Any) -> Iterator[Running]:
    """A server with these models; options: as in `serve`."""
    ready, failed = threading.Event(), []
    options.setdefault("grace", 0.5)
    server = made(models, port=0, on_ready=lambda server: ready.set(), **options)

    def work() -> None:
        try:
            server.run()
        except BaseException as error:
            failed.append(error)
        finally:
            ready.set()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        assert ready.wait(60), "the server did not start"
        if failed:
            raise failed[0]
        yield Running(server.url, server)
    finally:
        server.stop()
        thread.join(15)
        if thread.is_alive():
            server.stop()
            thread.join(15)
        assert not thread.is_alive(), "the server did not end"
