"""Which rank this process is, of how many, and where they meet: from the environment, or made here for processes on one
machine.

Knows environments, ports and hostfiles as MLX and `mlx.launch` have them. Knows no models.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mlx_qwen35.errors import ArgumentError

RANK, HOSTFILE, COORDINATOR, DEVICES = "MLX_RANK", "MLX_HOSTFILE", "MLX_JACCL_COORDINATOR", "MLX_IBV_DEVICES"
MEETING = "MLX_QWEN35_MEETING"  # host:port at which rank 0 waits for the others
STATUS = "MLX_QWEN35_STATUS"  # a file for the exit status, since mlx.launch ends with 0 whatever ranks do
_ABOVE = 4000  # ports above rank 0's first one, where nothing else is said


@dataclass(frozen=True)
class Place:
    """rank: of this process, of `ranks`; backend: MLX's; host, port: where rank 0 waits for the others, over TCP."""

    rank: int
    ranks: int
    backend: str
    host: str
    port: int


def place_of(environment: Mapping[str, str] = os.environ) -> Place | None:
    """As `mlx.launch` has said it; None where this process is alone. Raises ArgumentError for what makes no sense."""
    if RANK not in environment:
        return None
    try:
        rank = int(environment[RANK])
        if HOSTFILE in environment:
            hosts = json.loads(Path(environment[HOSTFILE]).read_text())
            hosts = hosts["hosts"] if isinstance(hosts, dict) else hosts
            ranks, (host, port) = len(hosts), _address(hosts[0][0])
            backend = "ring"
        elif COORDINATOR in environment and DEVICES in environment:
            ranks, backend = len(json.loads(Path(environment[DEVICES]).read_text())), "jaccl"
            host, port = _address(environment[COORDINATOR])
        else:
            return None
        port += _ABOVE if port + _ABOVE < 65536 else -_ABOVE
        if MEETING in environment:
            host, port = _address(environment[MEETING])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ArgumentError(
            f"{RANK} is set, and what goes with it cannot be read ({error!r}): start with mlx.launch"
        ) from None
    if not 0 <= rank < ranks:
        raise ArgumentError(f"{RANK} is {rank}, but there are {ranks} ranks")
    return Place(rank, ranks, backend, host, port) if ranks > 1 else None


def on_this_machine(ranks: int, folder: Path) -> list[dict[str, str]]:
    """The environment of each of so many ranks here, on ports that are free now; the hostfile goes into `folder`."""
    ports = _free_ports(ranks + 1)
    hostfile = folder / f"hosts-{secrets.token_hex(4)}.json"
    hostfile.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in ports[1:]]))
    common = {HOSTFILE: str(hostfile), MEETING: f"127.0.0.1:{ports[0]}"}
    return [common | {RANK: str(rank)} for rank in range(ranks)]


def say_status(status: int) -> None:
    """Write the exit status where the environment wants it."""
    if path := os.environ.get(STATUS):
        partial = Path(f"{path}.{os.getpid()}")
        partial.write_text(f"{status}\n")
        os.replace(partial, path)


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not 0 < int(port) < 65536:
        raise ValueError(f"{text} has no port that can be")
    return host, int(port)


def _free_ports(count: int) -> list[int]:
    held = [socket.socket() for _ in range(count)]
    try:
        for each in held:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in held]
    finally:
        for each in held:
            each.close()
