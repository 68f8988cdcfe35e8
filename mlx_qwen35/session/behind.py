"""Session files written behind the back of who computes: a thread that writes bytes which are there already.

Knows files, their folder's lock and how much may lie in it. Knows no sessions; evaluates nothing.

    folder      WHOSE-NAME.path      whole, and never written to again; WHOSE says of which model
                .writing.lock        one process writes and deletes at a time
                .*.partial           being written by who has the lock; what else there is was left by a killed process
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlx_qwen35.errors import Qwen35Error, SessionError
from mlx_qwen35.machine.files import drop_oldest, listed
from mlx_qwen35.session import file
from mlx_qwen35.session.lock import SessionLock

SUFFIX = ".path"
_PATIENCE, _PAUSE = 60.0, 0.05  # seconds that another process may write, and between two tries


class Job:
    """A file to be written. done: it is there; failed: why it never will be, empty where another process kept the
    folder to itself; replaced: a file that says less."""

    def __init__(
        self, path: Path, description: Mapping[str, Any], arrays: Mapping[str, file.Bytes], replaced: Path | None
    ) -> None:
        self.path, self.description, self.replaced = path, description, replaced
        self.arrays: Mapping[str, file.Bytes] = arrays
        self.nbytes = sum(array.values.nbytes for array in arrays.values())
        self.begun = self.done = False
        self.failed: str | None = None

    @property
    def ended(self) -> bool:
        return self.done or self.failed is not None


class Behind:
    """Writes jobs in their order, on a thread that lives while there are some. The folder never has more than
    `most_bytes`: what was used longest ago is deleted first, whose ever it is."""

    def __init__(self, folder: Path, most_bytes: int) -> None:
        self._folder, self._most_bytes = folder, most_bytes
        self._jobs: deque[Job] = deque()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def put(self, job: Job) -> None:
        with self._lock:
            self._jobs.append(job)
        self._start()

    def _start(self) -> None:
        with self._lock:
            if self._jobs and self._thread is None:
                thread = threading.Thread(target=self._work, name="mlx-qwen35 store", daemon=True)
                thread.start()
                self._thread = thread

    def cancel(self, job: Job) -> bool:
        """Whether a job had not begun, and never will."""
        with self._lock:
            if job in self._jobs:
                self._jobs.remove(job)
                return True
            return False

    def wait(self) -> None:
        """Until all is written."""
        self._start()
        while (thread := self._thread) is not None:
            thread.join()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._jobs:
                    self._thread = None
                    return
                job = self._jobs.popleft()
                job.begun = True
            try:
                self._write(job)
                job.done = True
            except SessionError:
                job.failed = ""
            except Qwen35Error as error:
                job.failed = str(error)
            except BaseException as error:  # whatever it is, who computes goes on
                job.failed = f"{type(error).__name__}: {error}"
            job.arrays = {}

    def _write(self, job: Job) -> None:
        until = time.monotonic() + _PATIENCE
        while True:
            lock = SessionLock(self._folder / "writing")
            try:
                with lock:
                    if lock.held:
                        self._remove_left_over()
                    kept = listed(self._folder, f"*{SUFFIX}")
                    drop_oldest(kept, job.nbytes, self._most_bytes, last=job.replaced)
                    file.write(job.path, job.description, job.arrays)
                    if job.replaced is not None:
                        _delete(job.replaced)
                return
            except SessionError:
                if time.monotonic() > until:
                    raise
                time.sleep(_PAUSE)

    def _remove_left_over(self) -> None:
        for partial in listed(self._folder, f".*{SUFFIX}.*.partial"):
            _delete(partial)


def _delete(path: Path) -> None:
    with suppress(OSError):
        path.unlink()


def names_of(folder: Path, whose: str) -> Sequence[str]:
    """The whole files of one model."""
    try:
        return [name for name in os.listdir(folder) if name.startswith(f"{whose}-") and name.endswith(SUFFIX)]
    except OSError:
        return []
