"""MLX's GPU and the limits on its memory, as several that ask for one at a time share them.

Knows MLX's devices. Knows nothing of models. `mx.device_info()` without an argument is the default device's, which may
be the CPU on a Mac: here the GPU is always asked by name.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx

_WORKING_SET = "max_recommended_working_set_size"


def has_metal() -> bool:
    """Whether MLX computes on an Apple GPU here, if it is asked to."""
    return mx.metal.is_available()


def gpu_info() -> dict[str, Any]:
    """What MLX says of the GPU, whatever the default device is; {} where there is none."""
    try:
        return dict(mx.device_info(mx.gpu))
    except (RuntimeError, ValueError):
        return {}


def working_set() -> int | None:
    """Bytes that Metal recommends to use at most, by the memory of the Mac and sysctl iogpu.wired_limit_mb; None where
    there is no Metal, or it does not say."""
    return int(gpu_info().get(_WORKING_SET, 0)) or None if has_metal() else None


def gpu_memory() -> int | None:
    """Bytes of the GPU's memory, which on a Mac is the machine's; None where MLX has no GPU or does not know."""
    info = gpu_info()
    return next((int(info[key]) for key in ("memory_size", "total_memory") if info.get(key)), None)


class _Limit:
    """One of MLX's limits, which hold for the whole process.

    The first who asks notes what was there, the last to let go puts it back; in between the strictest or widest holds.
    """

    def __init__(self, setter: str, choose: Callable[[list[int]], int]):
        """setter: its name in mlx.core, a function from the new limit in bytes to the one before."""
        self._setter, self._choose = setter, choose
        self._lock = threading.RLock()  # a garbage collection within may let go of another
        self._asked: dict[object, int] = {}
        self._before = 0

    def ask(self, nbytes: int) -> Callable[[], None]:
        """Returns the function that lets go; a second call of it does nothing. What MLX refuses is as if not asked."""
        key = object()
        with self._lock:
            before = self._set(self._choose([*self._asked.values(), nbytes]))
            if before is None:
                return lambda: None
            if not self._asked:
                self._before = before
            self._asked[key] = nbytes

        asker = os.getpid()

        def let_go() -> None:
            if os.getpid() != asker:
                return  # a forked child, which collects what its parent had: MLX's locks may be held there for ever
            with self._lock:
                if self._asked.pop(key, None) is not None:
                    left = [*self._asked.values()]
                    self._set(self._choose(left) if left else self._before)

        return let_go

    def _set(self, nbytes: int) -> int | None:
        """The limit before; None where MLX refuses: that may be slow, and is no reason not to answer."""
        try:
            return getattr(mx, self._setter)(nbytes)
        except (ValueError, RuntimeError):
            return None


_CACHE, _WIRED = _Limit("set_cache_limit", min), _Limit("set_wired_limit", max)


def limit_cache(nbytes: int) -> Callable[[], None]:
    """Let MLX keep at most so many bytes of spare buffers, until the function that is returned is called."""
    return _CACHE.ask(nbytes)


def keep_wired(nbytes: int | None = None) -> Callable[[], None]:
    """Have macOS keep arrays of up to so many bytes in place, neither compressed nor swapped, until the function that
    is returned is called. None: all that Metal recommends, which is the most that MLX takes. Without Metal: nothing.

    It has an effect from macOS 15 on.
    """
    most = working_set()
    if most is None:
        return lambda: None
    return _WIRED.ask(most if nbytes is None else min(nbytes, most))


@contextmanager
def wired() -> Iterator[None]:
    """keep_wired() within a block; what was queued in it is done before it is let go of."""
    let_go = keep_wired()
    try:
        yield
    finally:
        if has_metal():
            mx.synchronize()
        let_go()
