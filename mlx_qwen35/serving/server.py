"""`serve`: a socket, the models and the routes put together, until a signal ends them.

Knows arguments, signals and the order of starting and ending. Knows nothing of requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_qwen35 import checks
from mlx_qwen35.errors import ArgumentError, Qwen35Error

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from mlx_qwen35.serving.guard import Doors
    from mlx_qwen35.serving.loaded import Loading, LoadingOptions
    from mlx_qwen35.serving.places import Place
    from mlx_qwen35.serving.pool import Pool

log = logging.getLogger("mlx_qwen35.serving")

SOCKET = "MLX_QWEN35_SOCKET"  # a descriptor that listens already, of the process that watches over this one
_LAST = 3.0  # seconds after `grace` in which ended answers are told so


class ServerError(Qwen35Error):
    """The server cannot be started as it was asked for."""


@dataclass
class Server:
    """A server that is not running yet. places: models, in the order in which they are named; named: as in Pool.

    url: where it answers. `run` blocks until `stop`, or a signal where it is called in the main thread.
    """

    doors: Doors
    how: Loading
    places: Sequence[Place]
    port: int = 1234
    named: bool = True
    ttl: float = 3600
    grace: float = 10.0
    preload: bool = True
    on_ready: Callable[[Server], None] | None = None
    url: str = ""
    pool: Pool | None = None
    _socket: socket.socket | None = field(default=None, repr=False)
    _loop: asyncio.AbstractEventLoop | None = field(default=None, repr=False)
    _signals: int = 0
    _task: asyncio.Task[None] | None = field(default=None, repr=False)
    _uvicorn: Any = field(default=None, repr=False)
    _ready: threading.Event = field(default_factory=threading.Event, repr=False)

    def bind(self) -> None:
        """Takes the port. Raises ServerError where another has it."""
        if self._socket is None:
            given = os.environ.get(SOCKET)
            self._socket = socket.socket(fileno=int(given)) if given else bound(self.doors.host, self.port)
            self.port = self._socket.getsockname()[1]
            host = f"[{self.doors.host}]" if ":" in self.doors.host else self.doors.host
            self.url = f"http://{host}:{self.port}"

    def run(self) -> None:
        """Answers until it is stopped; raises KeyboardInterrupt where it was not left the time to end by itself."""
        self.bind()
        try:
            asyncio.run(self._main())
        except asyncio.CancelledError:  # a second signal, or one before it answered
            raise KeyboardInterrupt from None
        finally:
            if self._socket is not None:
                self._socket.close()

    def stop(self) -> None:
        """As a first signal does, from any thread; a second call as a second one."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._signalled)

    async def _main(self) -> None:
        import uvicorn

        from mlx_qwen35.serving import app
        from mlx_qwen35.serving.connection import Connection
        from mlx_qwen35.serving.pool import Pool

        class Quiet(uvicorn.Server):
            @contextlib.contextmanager
            def capture_signals(self) -> Iterator[None]:
                yield

        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._loop.add_signal_handler(number, self._signalled)
        self.pool = pool = Pool(self.places, self.how, ttl=self.ttl, named=self.named)
        config = uvicorn.Config(
            app.build(pool, self.doors),
            http=Connection,
            ws="none",
            loop="asyncio",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=math.ceil(self.grace + _LAST),
        )
        self._uvicorn = Quiet(config)
        try:
            if self.preload and self.places:
                await _load(pool, self.places[0].name)
            telling = asyncio.ensure_future(self._tell())
            await self._uvicorn.serve(sockets=[self._socket])
            telling.cancel()
        finally:
            await pool.close()

    async def _tell(self) -> None:
        while not self._uvicorn.started:
            await asyncio.sleep(0.005)
        self._ready.set()
        if self.on_ready is not None:
            self.on_ready(self)

    def _signalled(self) -> None:
        self._signals += 1
        if self._signals > 1 or not self._ready.is_set():
            self._task.cancel()
            return
        assert self.pool is not None and self._loop is not None
        log.info("closing: answers have %g s to end", self.grace)
        self.pool.closing = True
        self._uvicorn.should_exit = True
        self._loop.call_later(self.grace, lambda: asyncio.ensure_future(self.pool.close()))


async def _load(pool: Pool, name: str) -> None:
    """The first model, before anybody asks: what is wrong with it ends the server, as that error."""
    from mlx_qwen35.serving.refusal import Refusal

    try:
        (await pool.lease(await pool.look_up(name))).release()
    except Refusal as refusal:
        why = refusal.__cause__
        raise why if isinstance(why, Qwen35Error) else ServerError(str(refusal)) from why


def serve(
    models: str | Path | Sequence[str | Path] | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 1234,
    api_key: str | None = None,
    memory: int | str | None = None,
    parallel: int = 4,
    most_waiting: int = 64,
    ttl: float = 3600,
    cache_dir: str | Path | None = None,
    mtp: bool = False,
    cors: Sequence[str] = (),
    allowed_hosts: Sequence[str] = (),
    allow_anyone: bool = False,
    grace: float = 10.0,
    most_body_bytes: int | None = None,
    on_ready: Callable[[Server], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    **loading: Unpack[LoadingOptions],
) -> None:
    """Answers by HTTP until Ctrl-C or SIGTERM: the APIs of OpenAI, Anthropic, LM Studio and Ollama, and a page.

    models: names or folders, as `load` takes them; the first is loaded at once, the others when they are asked for, and
    what is not on this machine is downloaded before. One alone answers to every name. None: all models that are on this
    machine, each loaded when it is asked for. Nothing is downloaded because of a request.
    host, port: what is listened on; for more than this machine, api_key is asked of everyone, or allow_anyone says that
    none is wanted. cors: origins of web pages that may use it. allowed_hosts: other names that it is reached by.
    memory: the most that the process may take, as `load` has it: idle models go to make room. parallel: answers that a
    model computes at once; most_waiting: that may wait beside them, others are refused (429). ttl: seconds after which
    an idle model is unloaded; 0: never. cache_dir: a folder in which what was computed outlasts the process. mtp: let
    models' own MTP heads draft. loading: fetch=True, which lets pictures be read from http(s); lookup=False, without
    copies of what was said before; and context_length, yarn, kv_bits, kv_group_size, quantized_kv_start, dtype, exact,
    kernels, warm_start, ranks and plan, as `load` has them; a model on ranks is the only one, and stays.
    grace: seconds that answers have to end after a signal; a second one ends them at once. most_body_bytes: of a
    request. on_ready: called once with the Server, when it answers. on_progress: of downloads.
    Raises ArgumentError for what makes no sense, and Qwen35Error where a model or the port is not available.
    """
    made(
        models, host=host, port=port, api_key=api_key, memory=memory, parallel=parallel, most_waiting=most_waiting,
        ttl=ttl, cache_dir=cache_dir, mtp=mtp, cors=cors, allowed_hosts=allowed_hosts, allow_anyone=allow_anyone,
        grace=grace, most_body_bytes=most_body_bytes, on_ready=on_ready, on_progress=on_progress, **loading,
    ).run()  # fmt: skip


def made(
    models: str | Path | Sequence[str | Path] | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 1234,
    api_key: str | None = None,
    ttl: float = 3600,
    cors: Sequence[str] = (),
    allowed_hosts: Sequence[str] = (),
    allow_anyone: bool = False,
    grace: float = 10.0,
    most_body_bytes: int | None = None,
    on_ready: Callable[[Server], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    **loading: Any,
) -> Server:
    """A server that has its port and runs with `run`. Arguments and errors as in `serve`."""
    check_installed()
    from mlx_qwen35.serving import places
    from mlx_qwen35.serving.guard import MOST_BYTES, Doors, is_loopback
    from mlx_qwen35.serving.loaded import Loading

    if not is_loopback(host) and not api_key and not allow_anyone:
        raise ArgumentError(
            f"other machines can reach {host}: give an api_key (--api-key), or allow_anyone (--allow-anyone)"
        )
    doors = Doors(host, api_key or None, tuple(cors), tuple(allowed_hosts), most_body_bytes or MOST_BYTES)
    check_numbers(port=port, ttl=ttl, grace=grace, **loading)
    names = [models] if isinstance(models, (str, Path)) else list(models or ())
    try:
        how = Loading(**loading)
    except TypeError as error:
        raise ArgumentError(f"serve: {error}") from None
    server = Server(doors, how, (), port, bool(names), ttl=ttl, grace=grace, preload=bool(names), on_ready=on_ready)
    server.bind()  # before anything that takes its time
    try:
        server.places = places.named(names, on_progress, mtp=how.mtp) if names else places.on_this_machine()
    except BaseException:
        server._socket.close()
        raise
    return server


def check_numbers(port: int, ttl: float, grace: float, parallel: int = 4, most_waiting: int = 64, **_: Any) -> None:
    """Raises ArgumentError where they make no sense."""
    checks.whole("port", port, 0, 65535)
    checks.whole("parallel", parallel, 1)
    checks.whole("most_waiting", most_waiting, 0)
    for name, value in (("ttl", ttl), ("grace", grace)):
        checks.number(name, value)
        if value < 0:
            raise ArgumentError(f"{name} is {value}; give seconds, 0 or more")


def check_installed() -> None:
    """Raises ServerError with what to install where the extra is missing."""
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        raise ServerError(f"{error.name} is missing for the server: pip install starlette uvicorn") from None


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises ServerError."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
            0
        ]
    except (OSError, UnicodeError) as error:
        raise ServerError(f"{host} is no address of this machine ({error}): give another --host") from None
    bound = socket.socket(family, kind)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(1024)  # at once: until then another could bind it, too
    except OSError as error:
        bound.close()
        raise ServerError(
            f"port {port} of {host} is not available ({error.strerror}): end what uses it, or give another --port"
        ) from None
    return bound
