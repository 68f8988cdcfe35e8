"""A server whose model is on ranks: a process that watches over the one that serves, and starts it again where a rank
is lost. Meanwhile it answers itself, that nothing is to be had yet.

Knows processes, signals and one socket, which both have. Loads nothing heavy.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress

from mlx_qwen35.parallel.early import STATUS, end_at_once
from mlx_qwen35.text.screen import note

WATCHED, SOCKET, READY = "MLX_QWEN35_WATCHED", "MLX_QWEN35_SOCKET", "MLX_QWEN35_READY"
_LIFE = "MLX_QWEN35_LIFE"  # a descriptor that ends when the process that watches does
_PAUSE, _LONGEST = 1.0, 30.0  # seconds before another start, and after many
_SOUND = 60.0  # seconds of life after which a loss begins a new count


def watch(arguments: Sequence[str], door: socket.socket | None) -> int:
    """Runs this program again with `arguments`, as often as it takes; -> its exit status when it ends for another
    reason than a lost rank. door: where clients come; None: not to this rank."""
    pause, asked = _PAUSE, threading.Event()
    child: subprocess.Popen[bytes] | None = None

    def on_signal(number: int, frame: object) -> None:
        asked.set()
        if child is not None:
            with suppress(ProcessLookupError):
                child.send_signal(number)

    life, held = os.pipe()
    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while True:
            begun = time.monotonic()
            ready, told = os.pipe()
            handed = [told, life] if door is None else [told, life, door.fileno()]
            environment = {**os.environ, WATCHED: "1", READY: str(told), _LIFE: str(life)}
            if door is not None:
                environment[SOCKET] = str(door.fileno())
            command = [sys.executable, "-m", "mlx_qwen35", *arguments]
            child = subprocess.Popen(command, env=environment, pass_fds=handed, start_new_session=True)
            os.close(told)
            _refuse_until(door, ready, child)
            os.close(ready)
            status = child.wait()
            lost = status in (STATUS, -signal.SIGKILL)
            if asked.is_set() or not lost:
                return status if status >= 0 else 128 - status
            pause = _PAUSE if time.monotonic() - begun > _SOUND else min(2 * pause, _LONGEST)
            note(f"A rank is lost: starting again in {pause:.0f} s.")
            until = time.monotonic() + pause
            while time.monotonic() < until and not asked.is_set():
                _refuse(door, 0.2)
            if asked.is_set():
                return 128 + signal.SIGTERM
    finally:
        os.close(life)
        os.close(held)
        for number, handler in before.items():
            signal.signal(number, handler)


def end_with_who_watches() -> None:
    """In the process that serves: it does not outlive the one that would start it again."""

    def wait(given: int) -> None:
        os.read(given, 1)
        end_at_once("the process that watched over this one is gone")

    threading.Thread(target=wait, args=(int(os.environ[_LIFE]),), daemon=True).start()


def tell_ready() -> None:
    """In the process that serves: clients are its own from now on."""
    given = os.environ.pop(READY, None)
    if given is not None:
        os.close(int(given))


def _refuse_until(door: socket.socket | None, ready: int, child: subprocess.Popen[bytes]) -> None:
    """Answers clients until the child does, or has ended: the other end of `ready` is closed."""
    while True:
        found, _, _ = select.select([ready] if door is None else [ready, door], [], [], 0.5)
        if ready in found:
            return
        if door in found:
            _refuse(door, 0.0)


def _refuse(door: socket.socket | None, seconds: float) -> None:
    """One client, if one comes in so many seconds."""
    if door is None:
        time.sleep(seconds)
        return
    if not select.select([door], [], [], seconds)[0]:
        return
    with suppress(OSError):
        door.settimeout(0.1)
        client, _ = door.accept()
        threading.Thread(target=_answer, args=(client,), daemon=True).start()


def _answer(client: socket.socket) -> None:
    message = "the model is on several machines, and not all of them are here: ask again"
    body = json.dumps({"error": {"message": message, "type": "unavailable", "code": "unavailable"}}).encode()
    head = (
        "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 10\r\n"
        f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with suppress(OSError), client:
        client.settimeout(2)
        client.recv(1 << 16)
        client.sendall(head.encode() + body)
        client.shutdown(socket.SHUT_WR)
        client.recv(1 << 16)
