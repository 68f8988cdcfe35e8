"""Work in pieces on all cores: several threads read, compute and write, each a piece of its own from end to end.

Knows threads, order and errors. Knows nothing of what a piece is. What one thread waits for, the disk or MLX (which
lets go of Python's lock), the others overlap; memory is that of as many pieces as there are threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import cache
from typing import TypeVar

from mlx_qwen35.machine.system import processors

Job = TypeVar("Job")
Result = TypeVar("Result")

_FEWEST, _MOST = 3, 16  # on few cores one thread more than these, for the time that the disk takes


def workers() -> int:
    """How many threads work: as many as this process has cores."""
    return min(max(processors(), _FEWEST), _MOST)


@cache
def _pool(size: int) -> ThreadPoolExecutor:
    # Kept for the whole process: MLX gives every thread streams of its own, and never takes their threads back.
    return ThreadPoolExecutor(size, thread_name_prefix="convert")


def run(
    jobs: Iterable[Job],
    work: Callable[[Job], Result],
    take: Callable[[Job, Result], None],
    count: int | None = None,
) -> None:
    """take(job, work(job)) for each job, in no order: `work` on `count` threads, `take` on this one.

    Whatever ends this early, an error of `work` or `take` or Ctrl-C, is raised when no thread works any more.
    """
    count = count or workers()
    pool, coming = _pool(count), iter(jobs)
    running: dict[Future[Result], Job] = {}
    try:
        while True:
            for job in coming:
                running[pool.submit(work, job)] = job
                if len(running) > count:  # one in waiting, so that no thread is idle until this one looks again
                    break
            if not running:
                return
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                take(running.pop(future), future.result())
    finally:
        for future in running:
            future.cancel()
        wait(running)
