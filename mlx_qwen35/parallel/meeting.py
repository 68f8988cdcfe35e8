"""How ranks find each other: rank 0 waits, the others come, and what they say of themselves is compared.

Knows wires and MLX's groups. Knows nothing of what is compared.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import mlx.core as mx

from mlx_qwen35.errors import ArgumentError, RankLostError
from mlx_qwen35.parallel.group import Group
from mlx_qwen35.parallel.place import HOSTFILE, Place
from mlx_qwen35.parallel.wire import FAILED, TOLD, Wire, connect

PATIENCE = 120.0  # seconds for all ranks to come
_JOINING = 60  # seconds for MLX to connect them once all are there

Facts = Mapping[str, Any]
_joined: list[Place] = []


def name_of(rank: int, facts: Facts) -> str:
    """A rank in words."""
    return f"rank {rank} ({facts['host']}, process {facts['process']})"


def wait_for_others(
    place: Place, facts: Facts, compared: Sequence[str], children: Mapping[int, subprocess.Popen[bytes]]
) -> tuple[list[Wire], list[Facts]]:
    """On rank 0: (a wire to each of the others, what all say of themselves).

    compared: the facts in which all have to agree; a fact that is an object is compared by its keys. Raises
    ArgumentError, on every rank with the same words, where they do not, and RankLostError where one does not come.
    """
    wires: dict[int, Wire] = {}
    told: dict[int, Facts] = {0: facts}
    with _listening(place) as door:
        until = time.monotonic() + PATIENCE
        while len(wires) < place.ranks - 1:
            door.settimeout(0.2)
            with suppress(TimeoutError):
                wire = Wire(door.accept()[0])
                with suppress(OSError, ValueError, KeyError, TypeError):  # a stranger
                    kind, body = wire.receive(10)
                    said = json.loads(bytes(body))
                    if kind == TOLD and 0 < said["rank"] < place.ranks and said["rank"] not in wires:
                        wires[said["rank"]], told[said["rank"]] = wire, said["facts"]
                        continue
                wire.close()
            gone = [rank for rank, child in children.items() if rank not in wires and child.poll() is not None]
            if gone or time.monotonic() > until:
                absent = gone or [rank for rank in range(1, place.ranks) if rank not in wires]
                why = "ended before it came" if gone else f"did not come to {place.host}:{place.port}"
                text = f"rank {', '.join(map(str, absent))} {why}; there are to be {place.ranks} ranks"
                _refuse(wires.values(), text)
                raise RankLostError(text)
    ordered, facts_of = [wires[rank] for rank in sorted(wires)], [told[rank] for rank in range(place.ranks)]
    problem = differences(facts_of, compared)
    if problem:
        _refuse(ordered, problem)
        raise ArgumentError(problem)
    for wire in ordered:
        wire.tell(welcome=[name_of(rank, each) for rank, each in enumerate(facts_of)])
    return ordered, facts_of


def come(place: Place, facts: Facts) -> Wire:
    """On the others. Raises ArgumentError with rank 0's words where it does not fit, and RankLostError."""
    try:
        wire = connect(place.host, place.port, PATIENCE)
        wire.tell(rank=place.rank, facts=dict(facts))
        kind, body = wire.receive(2 * PATIENCE)
    except OSError as error:
        raise RankLostError(f"rank 0 at {place.host}:{place.port} is not there ({error})") from None
    if kind == FAILED:
        raise ArgumentError(body.decode())
    return wire


def join(place: Place) -> Group:
    """MLX's group of all ranks. A process that is not connected after a minute ends: that cannot be interrupted."""
    if _joined:
        raise ArgumentError("this process had ranks before, and MLX joins a group once: start another process")
    _joined.append(place)
    faulthandler.dump_traceback_later(_JOINING, exit=True, file=sys.__stderr__ or sys.stderr)
    try:
        group = mx.distributed.init(strict=True, backend=place.backend)
    finally:
        faulthandler.cancel_dump_traceback_later()
    if (group.rank(), group.size()) != (place.rank, place.ranks):
        raise RankLostError(
            f"MLX counts this process as rank {group.rank()} of {group.size()}, its environment as {place.rank} of "
            f"{place.ranks}: start all with one hostfile ({HOSTFILE}={os.environ.get(HOSTFILE)})"
        )
    return Group(group)


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


def _listening(place: Place) -> socket.socket:
    door = socket.socket()
    door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        door.bind((place.host, place.port))
    except OSError as error:
        door.close()
        raise ArgumentError(f"rank 0 cannot wait for the others at {place.host}:{place.port} ({error})") from None
    door.listen(place.ranks)
    return door


def _refuse(wires: Any, text: str) -> None:
    for wire in wires:
        with suppress(OSError):
            wire.send(FAILED, text.encode())
            wire.close()
