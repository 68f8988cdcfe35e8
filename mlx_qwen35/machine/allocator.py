"""What the C library does with memory that is given back to it. Knows glibc. Knows nothing of who asks for memory."""

from __future__ import annotations

import ctypes
from functools import cache

# glibc keeps what is freed for the next who asks, up to twice the largest piece that it has seen freed, but never
# learns from a larger one than this.
_LARGEST = 2**25 - 2**16


@cache
def keep_freed_memory() -> None:
    """From now on memory that was freed stays with this process, up to 64 MiB, and need not be cleared by the system
    again for whoever asks next. Of glibc; elsewhere nothing happens.

    Work in blocks of some MiB asks for as much again and again. (glibc comes to this by itself when a piece of 32 MiB
    has been freed. This one is never written to.)
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return
    library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    library.free.restype, library.free.argtypes = None, [ctypes.c_void_p]
    library.free(library.malloc(_LARGEST))
