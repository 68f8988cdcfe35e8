"""Work shared out among the cores of a CPU: MLX runs an operation there on one core, but each stream on another.

Knows streams, threads and how to cut a range. Knows no operation.
A lane is a stream; the first is the default one. It stays lazy, and suits shares of a few operations. Shares of many go
to threads and are evaluated there (`on_all_cores`). Either way the bits are those that one core alone would give,
because only independent rows are shared out.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import TypeVar

import mlx.core as mx

from mlx_qwen35.machine.system import processors

Made = TypeVar("Made")
Part = TypeVar("Part")

# Quantized weights, times rows, that are worth a lane of their own: 0.2 ms, where handing over takes 0.02 ms.
LEAST_SHARED = 2**18
LEAST_ON_CORES = 2**24  # multiplications of a product that OpenBLAS had better take on all cores: some milliseconds
_MOST = 16  # lanes; a decode step has no more work to share out


# Unique per thread, as MLX's default streams are; without a thread of their own until something runs in them.
_OTHERS = [mx.new_thread_local_stream(mx.cpu) for _ in range(min(processors(), _MOST) - 1)]
_NOW = threading.local()  # shared: whether what this thread computes is a share already


def lane_count() -> int:
    """How many there are: a core each, 16 at most."""
    return len(_OTHERS) + 1


def in_lanes(compute: Callable[[slice], Made], count: int, *, least: int = 1, aligned: int = 1) -> list[Made]:
    """compute(rows) for slices that cut `count` rows into about equal parts of at least `least`, each in its lane.

    aligned: they begin at a multiple of it.

    compute has to make everything it needs of a slice itself, slices of weights too: what another lane makes is waited
    for. Returns what it makes of each part, arrays lazy as ever, in order.
    """
    parts = max(1, min(lane_count(), count // max(least, aligned)))
    if parts == 1 or getattr(_NOW, "shared", False):  # what is in a lane stays there
        return [compute(slice(0, count))]
    cuts = [*(count * part // parts // aligned * aligned for part in range(parts)), count]
    made = []
    _NOW.shared = True
    try:
        for lane, (start, stop) in enumerate(zip(cuts, cuts[1:], strict=False)):
            with mx.stream(_OTHERS[lane - 1]) if lane else nullcontext():
                made.append(compute(slice(start, stop)))
    finally:
        _NOW.shared = False
    return made


def in_turning_lanes(compute: Callable[[Part], Made], parts: Sequence[Part]) -> list[Made]:
    """compute(part) for each, in the second lane and so on, then in the first, which has what is not shared out to do
    as well, and in the second again.

    For parts of many operations: MLX takes up only some hundred at a time, in the order of the results, so that of
    longer shares (`in_lanes`) one lane's would be done before another's begin.
    """
    if len(parts) == 1 or lane_count() == 1 or getattr(_NOW, "shared", False):
        return [compute(part) for part in parts]
    made = []
    _NOW.shared = True
    try:
        for number, part in enumerate(parts):
            lane = (number + 1) % lane_count()
            with mx.stream(_OTHERS[lane - 1]) if lane else nullcontext():
                made.append(compute(part))
    finally:
        _NOW.shared = False
    return made


def together(parts: list[mx.array]) -> mx.array:
    """Parts of the last axis as one. To be called in the lane that needs it, so that no lane waits for two others."""
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-1)


def on_all_cores(compute: Callable[[int], mx.array], count: int) -> list[mx.array]:
    """compute(number) for each of `count` numbers, evaluated, each by a thread of its own, as many at a time as there
    are cores.

    For shares of many operations: MLX takes up only some ten at a time, so that lanes would wait for each other.
    What compute needs has to be evaluated already. The bits are those of one core.
    """

    def share(number: int) -> mx.array:
        _NOW.shared = True
        made = compute(number)
        mx.eval(made)
        return made

    cores = lane_count()
    if cores == 1 or count == 1:
        made = [compute(number) for number in range(count)]
        mx.eval(made)
        return made
    with _ONE_THREAD_OF_BLAS:
        shares = []
        try:
            for number in range(count):
                shares.append(_pool(cores).submit(share, number))
            return [each.result() for each in shares]
        finally:  # an error or Ctrl-C: nothing computes any more when it is raised
            for each in shares:
                each.cancel()
            wait(shares)


def on_one_core(compute: Callable[[int], mx.array], count: int) -> list[mx.array]:
    """compute(number) for each of `count` numbers, evaluated one after the other, for products of 10 to 20 us: BLAS
    would share each out, and hand over and wait for longer than that."""
    with _ONE_THREAD_OF_BLAS:
        made = [compute(number) for number in range(count)]
        mx.eval(made)
    return made


def on_cores_worth_waking(products: int) -> AbstractContextManager[None]:
    """Inside, everything has to be evaluated that is begun there. products: multiplications of a usual product of it;
    of few, OpenBLAS would take each on all cores, and wake and wait for them for longer than that saves.

    What was queued before is computed first.
    """
    if products >= LEAST_ON_CORES or mx.default_device().type != mx.cpu or lane_count() == 1:
        return nullcontext()
    mx.synchronize()
    return _ONE_THREAD_OF_BLAS


@cache
def _pool(size: int) -> ThreadPoolExecutor:
    # Kept for the whole process: MLX gives every thread streams of its own, and never takes their threads back.
    return ThreadPoolExecutor(size, thread_name_prefix="share")


class _OneThreadOfBlas:
    """OpenBLAS, where that is the BLAS of this process, does not share products out a second time.

    Its number of threads is the process's: the first thread to come in writes it down, the last to go out puts it back.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside, self._before = 0, 1

    def __enter__(self) -> None:
        blas = ctypes.CDLL(None)
        with self._lock:
            if not self._inside and hasattr(blas, "openblas_set_num_threads"):
                self._before = blas.openblas_get_num_threads()
                blas.openblas_set_num_threads(1)
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        blas = ctypes.CDLL(None)
        with self._lock:
            self._inside -= 1
            if not self._inside and hasattr(blas, "openblas_set_num_threads"):
                blas.openblas_set_num_threads(self._before)


_ONE_THREAD_OF_BLAS = _OneThreadOfBlas()
