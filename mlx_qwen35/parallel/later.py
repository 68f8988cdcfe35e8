"""Shares of a store's paths, written behind the back of a rank that computes.

Knows files, their folder and how much of it this rank may take; what was used longest ago goes first, whose ever it
is. Evaluates nothing.

    folder      WHOSE-NAME.path                     rank 0's (session/behind.py)
                WHOSE-NAME.path.rank1of2-NAME       another rank's share, on its own disk

Neither asks whether the other is still there: a path of which either is gone cannot be read, and is computed again.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from glob import escape
from pathlib import Path

from mlx_qwen35.machine.files import drop_oldest, listed
from mlx_qwen35.parallel import kept

_WAITING = 4  # shares that wait to be written; an older one is left out
_LEFT_OVER = 3600.0  # seconds after which a file that is not whole is nobody's


@dataclass(frozen=True)
class Job:
    """path: of rank 0's file; replaced: of one that says less; most_bytes: of this rank's shares in the folder."""

    path: Path
    name: str
    share: kept.Share
    replaced: Path | None
    most_bytes: int


class Later:
    """Writes jobs in their order, on a thread that lives while there are some."""

    def __init__(self, rank: int, ranks: int) -> None:
        self._rank, self._ranks = rank, ranks
        self._jobs: deque[Job] = deque()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._problem: OSError | None = None

    def put(self, job: Job) -> None:
        """Raises OSError for what went wrong with an earlier one, and for a folder that cannot be."""
        job.path.parent.mkdir(0o700, parents=True, exist_ok=True)
        with self._lock:
            problem, self._problem = self._problem, None
            if problem is not None:
                raise problem
            self._jobs.append(job)
            if len(self._jobs) > _WAITING:
                self._jobs.popleft()
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="mlx-qwen35 shares", daemon=True)
                self._thread.start()

    def wait(self) -> None:
        """Until all is written."""
        while (thread := self._thread) is not None:
            thread.join()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._jobs:
                    self._thread = None
                    return
                job = self._jobs.popleft()
            try:
                self._write(job)
            except OSError as error:
                self._problem = error
            except Exception as error:  # whatever it is, what comes later is written, and who waits does not for ever
                self._problem = OSError(f"{type(error).__name__}: {error}")

    def _write(self, job: Job) -> None:
        folder = job.path.parent
        mine = f"*.rank{self._rank}of{self._ranks}-*"
        for partial in listed(folder, f".{mine}.safetensors"):
            with suppress(OSError):
                if time.time() - partial.stat().st_mtime > _LEFT_OVER:
                    partial.unlink()
        drop_oldest(listed(folder, mine), job.share.nbytes, job.most_bytes)
        kept.put(kept.path_of(job.path, self._rank, self._ranks, job.name), job.name, job.share)
        if job.replaced is not None:
            for share in listed(folder, f"{escape(job.replaced.name)}{mine[1:]}"):
                share.unlink(missing_ok=True)
