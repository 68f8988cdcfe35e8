"""What a rank does first of all: it comes to rank 0, and from then on each knows whether the other lives.

Imports nothing heavy: a rank that is started is seen before MLX is.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress

from mlx_qwen35.parallel.place import place_of, say_status
from mlx_qwen35.parallel.progress import Progress
from mlx_qwen35.parallel.wire import Watched, Wire, connect

STATUS = 70  # with which a process ends whose group is broken
PATIENCE = 120.0  # seconds for all ranks to come


class Watcher(Watched):
    """Another rank's watch over rank 0: where that is lost, or says that some rank is or hangs, this process ends."""

    def __init__(self, wire: Wire) -> None:
        self.progress = Progress()
        super().__init__(
            wire,
            lambda why: end_at_once(f"rank 0 is lost: {why}"),
            end_at_once,
            lambda: self.progress.sign().packed(),
        )


def come_early() -> Watcher:
    """For a rank whose place the environment says; ends the process where rank 0 is not there."""
    place = place_of()
    try:
        wire = connect(place.host, place.port, PATIENCE)
        wire.tell(rank=place.rank)
    except OSError as error:
        end_at_once(f"rank 0 is not there ({error})")
    return Watcher(wire)


def end_at_once(why: str | None) -> None:
    """What hangs in a call of MLX cannot be interrupted: the process ends."""
    print(f"error: {why}", file=sys.stderr, flush=True)
    with suppress(OSError):
        say_status(STATUS)
    os._exit(STATUS)
