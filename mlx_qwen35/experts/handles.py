"""An open file of experts: its bytes, and whether they are still those of the file that was opened.

Knows one file. Knows nothing of experts. A file that is replaced under its name (as a download or a conversion does it)
goes on being the old one here; one that is changed in place is noticed after the reading, and never taken for good.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from ..errors import ExpertReadError
from ..machine.files import allow_open

_AT_HAND = getattr(os, "RWF_NOWAIT", None)  # Linux: only what lies in the page cache

# What a try later may change nothing about, as long as this file is open.
_GONE = (errno.EBADF, errno.ESTALE, errno.ENODEV, errno.ENXIO)


class Handle:
    """A file, open for reading. What it raises is ExpertReadError, with the file's name and what to do."""

    def __init__(self, path: Path, least: int = 0):
        """least: bytes that the file has to have."""
        self.path = path
        try:
            self._number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ExpertReadError(
                f"{path} cannot be opened ({error.strerror}): put the file back, or change its permissions, and load "
                "the model again"
            ) from error
        self._stamp = self._look()
        if self._stamp[0] < least:
            size = self._stamp[0]
            self.close()
            raise ExpertReadError(
                f"{path} has {size} bytes, its experts {least}: restore the file, and load the model again"
            )

    def read(self, buffers: Sequence[memoryview], offset: int, waits: Callable[[], None] | None = None) -> int:
        """Fill buffers (of bytes), one after the other, with those from `offset` on; -> how many they are.

        waits: called before the disk is waited for; where the system cannot tell, before anything is read.
        """
        left = total = sum(map(len, buffers))
        if waits is not None:
            count = self._at_hand(buffers, offset)
            if count == total:
                return total
            waits()
            left, offset, buffers = left - count, offset + count, _after(buffers, count)
        try:
            while count := os.preadv(self._number, buffers, offset):
                if count == left:
                    return total
                left -= count
                offset += count
                buffers = _after(buffers, count)  # as much as the system gives at once
        except OSError as error:
            raise ExpertReadError(f"{self.path} cannot be read ({error.strerror}): {_advice(error)}") from error
        raise ExpertReadError(
            f"{self.path} ends {left} bytes too early: it was cut off while it was in use. Restore the file, and load "
            "the model again"
        )

    def _at_hand(self, buffers: Sequence[memoryview], offset: int) -> int:
        """As read, as far as no disk has to be waited for; -> bytes. What else is wrong shows when they are read."""
        if _AT_HAND is None:
            return 0
        try:
            return os.preadv(self._number, buffers, offset, _AT_HAND)
        except OSError:
            return 0

    def check(self) -> None:
        """Raise if the file is not what it was when it was opened; to be asked after reading."""
        try:
            now = self._look()
        except OSError as error:
            raise ExpertReadError(f"{self.path} cannot be read ({error.strerror}): {_advice(error)}") from error
        if now != self._stamp:
            raise ExpertReadError(
                f"{self.path} was changed while it was in use: what is read now may not belong to this model. Load the "
                "model again"
            )

    def close(self) -> None:
        """A second call does nothing."""
        number, self._number = self._number, -1
        if number >= 0:
            os.close(number)

    def _look(self) -> tuple[int, int, int, int]:
        found = os.fstat(self._number)
        return found.st_size, found.st_mtime_ns, found.st_ino, found.st_dev


def open_all(least: Iterable[tuple[Path, int]]) -> dict[Path, Handle]:
    """Handles of (file, bytes that it has to have); all of them, or none and an ExpertReadError."""
    handles: dict[Path, Handle] = {}
    wanted = list(least)
    allow_open(len(wanted))
    try:
        for path, size in wanted:
            handles[path] = Handle(path, size)
    except BaseException:
        for handle in handles.values():
            handle.close()
        raise
    return handles


def _after(buffers: Sequence[memoryview], count: int) -> list[memoryview]:
    """What is left of buffers when their first `count` bytes are filled."""
    rest = []
    for buffer in buffers:
        if count < buffer.nbytes:
            rest.append(buffer[count:])
        count = max(0, count - buffer.nbytes)
    return rest


def _advice(error: OSError) -> str:
    if error.errno in _GONE:
        return "it is not open any more, load the model again"
    return "check the disk and the file's permissions, then ask again"
