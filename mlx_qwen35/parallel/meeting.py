"""How ranks find each other: rank 0 waits, the others come, and what they say of themselves is compared.

Knows wires and MLX's groups. Knows nothing of what is compared.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import mlx.core as mx

from mlx_qwen35.errors import ArgumentError, RankLostError
from mlx_qwen35.parallel.early import STATUS
from mlx_qwen35.parallel.group import Group
from mlx_qwen35.parallel.place import HOSTFILE, Place
from mlx_qwen35.parallel.place import STATUS as STATUS_FILE
from mlx_qwen35.parallel.progress import Progress
from mlx_qwen35.parallel.ranks import Ranks
from mlx_qwen35.parallel.wire import Wire

HERE = 25.0  # seconds for those that are started here, which come before they do anything else
JOINING = 20.0  # seconds for MLX to connect them once all are there
# A process beside one that cannot be interrupted: where nobody closes its input in time, it says why, and ends it.
_GUARD = """
import os, select, signal, sys
process, seconds, why, status = sys.argv[1:]
if not select.select([0], [], [], float(seconds))[0]:
    print("error:", why, file=sys.stderr, flush=True)
    if status:
        with open(status, "w") as file:
            print({lost}, file=file)
    os.kill(int(process), signal.SIGKILL)
"""

Facts = Mapping[str, Any]
_joined: list[Place] = []


def name_of(rank: int, facts: Facts) -> str:
    """A rank in words."""
    return f"rank {rank} ({facts['host']}, process {facts['process']})"


class Door:
    """Where the others come to rank 0, from now on until it is closed."""

    def __init__(self, place: Place, ranks: Ranks) -> None:
        """Raises ArgumentError where nobody can come."""
        self._ranks, self._socket = ranks, socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind((place.host, place.port))
        except OSError as error:
            self._socket.close()
            where = f"{place.host}:{place.port}"
            raise ArgumentError(f"rank 0 cannot wait for the others at {where} ({error})") from None
        self._socket.listen(place.ranks)
        threading.Thread(target=self._let_in, name="mlx-qwen35 door", daemon=True).start()

    def close(self) -> None:
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _let_in(self) -> None:
        with suppress(OSError):
            while True:
                wire = Wire(self._socket.accept()[0])
                try:
                    kind, body = wire.receive(10)
                    self._ranks.admit(int(json.loads(bytes(body))["rank"]), wire)
                except (OSError, ValueError, KeyError, TypeError):  # a stranger
                    wire.close()


def join(place: Place, progress: Progress) -> Group:
    """MLX's group of all ranks, once all have come.

    While MLX waits for the others, it lets no other thread of Python run, and on rank 0 it waits for ever: so nothing
    here would notice that one of them is lost meanwhile. A process that is not connected in time is ended.
    """
    if _joined:
        raise ArgumentError("this process had ranks before, and MLX joins a group once: start another process")
    _joined.append(place)
    others = " or ".join(f"rank {rank}" for rank in range(place.ranks) if rank != place.rank)
    with _ended_in_time(f"{others} is lost: MLX has not connected rank {place.rank} within {JOINING:.0f} seconds"):
        group = mx.distributed.init(strict=True, backend=place.backend)
    if (group.rank(), group.size()) != (place.rank, place.ranks):
        raise RankLostError(
            f"MLX counts this process as rank {group.rank()} of {group.size()}, its environment as {place.rank} of "
            f"{place.ranks}: start all with one hostfile ({HOSTFILE}={os.environ.get(HOSTFILE)})"
        )
    return Group(group, progress)


@contextmanager
def _ended_in_time(why: str) -> Iterator[None]:
    """Inside, this process is ended after JOINING seconds, and `why` said."""
    told = [str(os.getpid()), str(JOINING), why, os.environ.get(STATUS_FILE, "")]
    command = [sys.executable, "-S", "-E", "-c", _GUARD.format(lost=STATUS), *told]
    guard = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        yield
    finally:
        guard.stdin.close()
        guard.wait()


def differences(facts: Sequence[Facts], compared: Sequence[str]) -> str | None:
    """In words what of these facts is not the same everywhere; None: all is."""
    odd = []
    for name in compared:
        values = [each.get(name) for each in facts]
        if isinstance(values[0], dict):
            for key in sorted({key for value in values for key in (value or {})}):
                odd += _odd(f"{name}: {key}", [(value or {}).get(key) for value in values])
        else:
            odd += _odd(name, values)
    if not odd:
        return None
    return f"the ranks do not fit together: {'; '.join(odd)}. Give all the same, and start them again"


def _odd(name: str, values: Sequence[Any]) -> list[str]:
    if all(value == values[0] for value in values):
        return []
    return [f"{name} is " + ", ".join(f"{value!r} on rank {rank}" for rank, value in enumerate(values))]

