"""Bytes to their place in an open file; large stretches straight to the disk, past the system's page cache.

Knows descriptors and alignment. Knows nothing of formats.
What is written of a checkpoint is not read again soon. In the page cache it would push out what is, and copying it
there is the larger part of a plain conversion's time (docs/SPEED.md).
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from pathlib import Path

import numpy as np

from mlx_qwen35.machine.files import open_uncached

PAGE = 16384  # of Apple's machines; a multiple of everybody else's, and of the blocks of disks
LEAST = 1 << 18  # bytes that are worth a way of their own
_AT_ONCE = 4 << 20


def write_at(handle: int, data: bytes | memoryview, offset: int) -> None:
    """All of `data` at `offset` of an open file."""
    view = memoryview(data)
    while view:
        count = os.pwrite(handle, view[: 1 << 30], offset)
        offset, view = offset + count, view[count:]


class Writer:
    """Writes to one file, from any number of threads, to places that do not overlap.

    Whole pages of a large stretch go by a descriptor that passes the cache by, what is before and after them by the
    ordinary one: no page goes both ways. Where the file system does not offer that, all goes the ordinary way.
    """

    def __init__(self, path: Path, handle: int):
        """handle: of the same file, open for writing; its length is final. It stays the caller's."""
        self._handle = handle
        self._uncached = open_uncached(path)

    def write(self, data: memoryview, offset: int) -> None:
        """data: bytes. Raises OSError."""
        begin, end = offset + -offset % PAGE, (offset + len(data)) // PAGE * PAGE
        if self._uncached < 0 or end - begin < LEAST:
            write_at(self._handle, data, offset)
            return
        write_at(self._handle, data[: begin - offset], offset)
        room = _room()
        for start in range(begin, end, _AT_ONCE):
            stop = min(start + _AT_ONCE, end)
            stretch = data[start - offset : stop - offset]
            np.copyto(room[: stop - start], np.frombuffer(stretch, np.uint8))  # lets other threads run
            if not self._aligned(room[: stop - start], start):
                write_at(self._handle, stretch, start)
        write_at(self._handle, data[end - offset :], end)

    def _aligned(self, pages: np.ndarray, offset: int) -> bool:
        """Whether all went past the cache. If not, none of it is counted: the ordinary way writes it again."""
        try:
            return os.pwrite(self._uncached, memoryview(pages), offset) == pages.nbytes
        except OSError as error:
            if error.errno != errno.EINVAL:  # this file system wants other alignment, or does not do it at all
                raise
            return False

    def close(self) -> None:
        """A second call does nothing."""
        number, self._uncached = self._uncached, -1
        if number >= 0:
            os.close(number)


_ROOMS = threading.local()


def _room() -> np.ndarray:
    """Memory of this thread that begins with a page, [_AT_ONCE] bytes."""
    if not hasattr(_ROOMS, "pages"):
        _ROOMS.pages = np.frombuffer(mmap.mmap(-1, _AT_ONCE), np.uint8)
    return _ROOMS.pages
