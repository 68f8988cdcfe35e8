"""One program at a time on one session file: a lock beside it, which the system lets go of when the program is gone.

Knows files and processes. Knows nothing of what a session holds.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from mlx_qwen35.errors import SessionError
from mlx_qwen35.machine.files import lock

_TRIES = 100


class SessionLock:
    """The right to write a session file, from `with` to its end. Raises SessionError if another program has it.

    It is an advisory lock on a file beside, .NAME.lock, so a program that was killed has lost it, and what is left of
    its file means nothing. Where the disk knows no locks there is none.
    """

    def __init__(self, path: str | Path) -> None:
        """path: behind links it is the file they lead to; its folder is there."""
        self.path = Path(os.path.realpath(path))
        self._beside = self.path.with_name(f".{self.path.name}.lock")
        self._handle = -1
        self.held = False  # whether there is a lock, and it is this one's

    def __enter__(self) -> SessionLock:
        for _ in range(_TRIES):
            try:
                self._handle = os.open(self._beside, os.O_RDWR | os.O_CREAT, 0o666)
            except OSError:  # what cannot be locked cannot be written either, and whoever writes says so
                return self
            try:
                held = lock(self._handle)
            except BlockingIOError:
                self._refuse()
            if self._is_in_place():
                os.truncate(self._handle, 0)
                os.pwrite(self._handle, f"{os.getpid()}\n".encode(), 0)
                self.held = held
                return self
            os.close(self._handle)  # it was another program's, which has just deleted it
        self._handle = -1
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._handle >= 0:
            with suppress(OSError):
                if self._is_in_place():
                    self._beside.unlink()
            os.close(self._handle)
            self._handle, self.held = -1, False

    def _is_in_place(self) -> bool:
        """Whether the file that is locked is still the one that others will open."""
        try:
            return os.path.samestat(os.fstat(self._handle), os.stat(self._beside))
        except OSError:
            return False

    def _refuse(self) -> None:
        process = os.pread(self._handle, 20, 0).decode(errors="replace").strip()
        os.close(self._handle)
        self._handle = -1
        who = f"process {process}" if process.isdigit() else "another process"
        raise SessionError(
            f"{self.path} is in use by another program ({who}): end that one first, or give another file"
        )
