"""Files, where systems differ: what makes them durable, what passes the page cache by, and what lies among them.

Knows descriptors, names and errors. Knows nothing of what is in a file. Where a system cannot do something, it is left
out or done the next best way, and what is returned says so.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import resource
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np

from mlx_qwen35.machine.system import is_mac

try:
    import fcntl
except ImportError:  # neither locks nor what macOS has in it
    fcntl = None  # type: ignore[assignment]

_MORE_FILES = 256  # that may be open besides
# Of macOS's fcntl.h and sys/mman.h: F_FULLFSYNC, F_NOCACHE, MS_INVALIDATE.
_FULL_FLUSH, _NO_CACHE, _INVALIDATE = 51, 48, 2


def flush(handle: int) -> None:
    """Return when what was written to an open file outlives a loss of power. Raises OSError where it may not.

    On macOS fsync leaves it in the memory of the drive, and F_FULLFSYNC does not; some network disks lack that.
    """
    if is_mac():
        with suppress(OSError):
            fcntl.fcntl(handle, _FULL_FLUSH)
            return
    os.fsync(handle)


def flush_path(path: Path) -> None:
    """The same of a file that is closed, or of a folder: of the names in it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        flush(handle)
    finally:
        os.close(handle)


def flush_names(folder: Path) -> None:
    """The same of a folder, where the system can be told so; elsewhere nothing."""
    with suppress(OSError):
        flush_path(folder)


def reserve(handle: int, nbytes: int) -> None:
    """Give an open file its final length, and the room for it where the system does that; what is there stays.

    A full disk is then an OSError before any work is done, and threads that fill the file need not wait for each other.
    """
    os.truncate(handle, nbytes)
    if nbytes and hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, 0, nbytes)


def open_uncached(path: Path) -> int:
    """A descriptor to write with that passes the page cache by; -1 where there is none."""
    direct = getattr(os, "O_DIRECT", 0)
    if not direct and not is_mac():
        return -1
    try:
        handle = os.open(path, os.O_WRONLY | direct)
    except OSError:
        return -1
    if is_mac() and not pass_cache_by(handle):
        os.close(handle)
        return -1
    return handle


def pass_cache_by(handle: int) -> bool:
    """Have what is read or written from now on not kept in memory; whether that was done: on macOS, where the disk can.

    What is in memory already is given from there all the same.
    """
    with suppress(OSError):
        if is_mac():
            fcntl.fcntl(handle, _NO_CACHE, 1)
            return True
    return False


def can_forget() -> bool:
    """Whether forget() is known to do what it says: macOS has no call for it, and what is tried there may not work."""
    return hasattr(os, "posix_fadvise")


def forget(handle: int, offset: int = 0, nbytes: int = 0) -> bool:
    """Have the system forget what it keeps of an open file in memory, so that the next read comes from the disk.

    nbytes: 0 is to the end of the file. Returns can_forget(). Raises nothing: it is a matter of speed.
    """
    with suppress(OSError, ValueError):
        if can_forget():
            os.posix_fadvise(handle, offset, nbytes, os.POSIX_FADV_DONTNEED)
        elif is_mac():
            _invalidate(handle, offset, nbytes)
    return can_forget()


def _invalidate(handle: int, offset: int, nbytes: int) -> None:
    """msync(MS_INVALIDATE) of a shared mapping, by which fio empties macOS's cache of a file."""
    end = offset + nbytes if nbytes else os.fstat(handle).st_size
    begin = offset - offset % mmap.ALLOCATIONGRANULARITY
    if end <= begin:
        return
    with mmap.mmap(handle, end - begin, access=mmap.ACCESS_READ, offset=begin) as mapped:
        place = np.frombuffer(mapped, np.uint8)
        try:
            ctypes.CDLL(None).msync(ctypes.c_void_p(place.ctypes.data), ctypes.c_size_t(end - begin), _INVALIDATE)
        finally:
            del place  # or the mapping could not be closed


def lock(handle: int) -> bool:
    """Take an open file for this process alone, until it is closed; whether this disk has such locks.

    Raises BlockingIOError if another process has it.
    """
    if fcntl is None:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise BlockingIOError(error.errno, error.strerror) from None
        if error.errno in (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK):
            return False
        raise
    return True


def allow_open(count: int) -> None:
    """Let this process open so many files more, as far as its hard limit goes: macOS begins with 256 in all."""
    with suppress(OSError, ValueError):
        wanted, (soft, hard) = count + _MORE_FILES, resource.getrlimit(resource.RLIMIT_NOFILE)
        if hard != resource.RLIM_INFINITY:
            wanted = min(wanted, hard)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def is_litter(name: str) -> bool:
    """Whether a file is the system's and nobody's data: "._name" beside "name", where macOS keeps attributes on disks
    that have none (also in archives made there), and what Finder notes of a folder."""
    return name.startswith("._") or name in (".DS_Store", ".localized", "__MACOSX")


def drop_oldest(paths: Iterable[Path], room: int, most_bytes: int, last: Path | None = None) -> None:
    """Delete files until `room` more bytes fit into `most_bytes`: those that were changed longest ago, and `last` after
    all others. What is gone meanwhile is left alone."""
    found: dict[Path, os.stat_result] = {}
    for path in paths:
        with suppress(OSError):
            found[path] = path.stat()
    over = sum(status.st_size for status in found.values()) + room - most_bytes
    for path in sorted(found, key=lambda path: (path == last, found[path].st_mtime_ns)):
        if over <= 0:
            return
        with suppress(OSError):
            path.unlink()
        over -= found[path].st_size


def listed(folder: Path, pattern: str = "*") -> Iterator[Path]:
    """folder.glob(pattern) in the order of names, without litter; nothing where it cannot be listed."""
    try:
        found = sorted(folder.glob(pattern))
    except OSError:
        return
    yield from (path for path in found if not any(map(is_litter, path.relative_to(folder).parts)))
