"""Messages between rank 0 and each other rank, over TCP beside the group, and the sign that a rank lives.

Knows sockets, threads and time. Knows no arrays and no models. Every wait has an end.

    kind    body
    ping    a progress.Sign, or nothing; once a second, from a thread of its own
    told    JSON: the handshake, what is saved, what went well
    frame   int32
    bytes   an array's
    failed  text: which rank is lost, and why; who gets it ends
    end     nothing: the sender ends in good order
"""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any

PING, TOLD, FRAME, BYTES, FAILED, END = b"p", b"t", b"f", b"b", b"x", b"e"
EVERY = 1.0  # seconds between two signs of life
SILENCE = 12.0  # seconds without one, after which a rank is lost
_HEAD = struct.Struct("!cQ")
_MOST = 1 << 40


class Wire:
    """A connection to another rank. heard: when anything came last; sign: what the last ping said. Read by one thread,
    written to by any."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(None)
        self._socket, self._sending = connection, threading.Lock()
        self.heard, self.sign = time.monotonic(), b""

    def send(self, kind: bytes, body: bytes | memoryview = b"") -> None:
        """Raises OSError where the other is gone."""
        with self._sending:
            self._socket.sendall(_HEAD.pack(kind, len(body)))
            if len(body):
                self._socket.sendall(body)

    def tell(self, **what: Any) -> None:
        self.send(TOLD, json.dumps(what).encode())

    def receive(self, seconds: float | None = None) -> tuple[bytes, bytearray]:
        """The next message but pings. Raises OSError where the other is gone or silent for so long."""
        until = None if seconds is None else time.monotonic() + seconds
        while True:
            kind, size = _HEAD.unpack(self._read(_HEAD.size, until))
            if size > _MOST or kind not in (PING, TOLD, FRAME, BYTES, FAILED, END):
                raise OSError("this is no rank of this program")
            body = self._read(size, until)
            if kind != PING:
                return kind, body
            self.sign = bytes(body)

    def _read(self, size: int, until: float | None) -> bytearray:
        body = bytearray(size)
        view = memoryview(body)
        while view:
            self._socket.settimeout(None if until is None else max(0.01, until - time.monotonic()))
            count = self._socket.recv_into(view)
            if not count:
                raise ConnectionResetError("the connection was closed")
            self.heard = time.monotonic()
            view = view[count:]
        return body

    def close(self) -> None:
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


class Watched:
    """A wire whose messages come in a queue, while a thread listens for signs of life and another gives them.

    on_lost(why): called once, from a thread, where the other is gone, silent, or has said what is wrong; on_failed:
    likewise for the last, with its text. sign: what goes with a sign of life.
    """

    def __init__(
        self,
        wire: Wire,
        on_lost: Callable[[str], None],
        on_failed: Callable[[str], None],
        sign: Callable[[], bytes] = bytes,
    ) -> None:
        self.wire, self.ended, self._sign = wire, False, sign
        self._messages: SimpleQueue[tuple[bytes, bytearray]] = SimpleQueue()
        self._on_lost, self._on_failed = on_lost, on_failed
        self._lock, self._over = threading.Lock(), False
        wire.heard = time.monotonic()
        for work in (self._listen, self._beat, self._watch):
            threading.Thread(target=work, name="mlx-qwen35 rank", daemon=True).start()

    def next(self, seconds: float | None = None) -> tuple[bytes, bytearray] | None:
        """The next message; None: none came in so many seconds."""
        try:
            return self._messages.get(timeout=seconds)
        except Empty:
            return None

    def send(self, kind: bytes, body: bytes | memoryview = b"") -> None:
        """What cannot be sent is told by `on_lost`."""
        try:
            self.wire.send(kind, body)
        except OSError as error:
            self._lost(f"its connection broke ({error})")

    def tell(self, **what: Any) -> None:
        self.send(TOLD, json.dumps(what).encode())

    def close(self) -> None:
        """Nothing is watched any more."""
        with self._lock:
            self._over = True
        with suppress(OSError):
            self.wire.send(END)
        self.wire.close()

    def _listen(self) -> None:
        try:
            while True:
                kind, body = self.wire.receive()
                if kind == FAILED:
                    self._once(self._on_failed, body.decode(errors="replace"))
                if kind == END:
                    self.ended = True
                    with self._lock:
                        self._over = True
                self._messages.put((kind, body))
        except OSError as error:
            self._lost(f"its connection broke ({error})")

    def _beat(self) -> None:
        while not self._over:
            try:
                self.wire.send(PING, self._sign())
            except OSError as error:
                self._lost(f"its connection broke ({error})")
                return
            time.sleep(EVERY)

    def _watch(self) -> None:
        """Apart from what sends: that may wait for the very one that is silent."""
        while not self._over:
            silent = time.monotonic() - self.wire.heard
            if silent > SILENCE:
                self._lost(f"nothing was heard of it for {silent:.0f} seconds: it hangs, was stopped, or is unplugged")
                self.wire.close()  # who waits to send is told
            time.sleep(EVERY)

    def _lost(self, why: str) -> None:
        self._once(self._on_lost, why)

    def _once(self, told: Callable[[str], None], text: str) -> None:
        with self._lock:
            over, self._over = self._over, True
        if not over:
            told(text)


def connect(host: str, port: int, seconds: float) -> Wire:
    """To rank 0, which may not be there yet. Raises TimeoutError."""
    until = time.monotonic() + seconds
    while True:
        try:
            return Wire(socket.create_connection((host, port), timeout=max(0.1, min(5.0, until - time.monotonic()))))
        except OSError as error:
            if time.monotonic() > until:
                raise TimeoutError(f"rank 0 does not answer at {host}:{port} ({error})") from None
            time.sleep(0.1)
