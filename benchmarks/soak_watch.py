"""What an engine is at, in words, for when nothing moves any more; and what memory a process holds over time.

Knows the insides of loop, scheduler and store, and reads them from another thread: what it tells may be of two moments.
"""

from __future__ import annotations

import ctypes
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from mlx_qwen35.machine.system import resident_memory

STILL = 12.0  # seconds in which nothing was computed and nobody came or went


class Watcher:
    """Told to look now and then, it tells the state of an engine whenever nothing has moved for `still` seconds."""

    def __init__(self, engine: Any, *, still: float = STILL, tell: Callable[[str], None] | None = None) -> None:
        self._engine, self._still = engine, still
        self._tell = tell or (lambda text: print(text, file=sys.stderr, flush=True))
        self._seen, self._since, self._told = None, time.monotonic(), False
        self.times = 0  # that it stood still

    def look(self) -> None:
        seen, now = progress(self._engine), time.monotonic()
        if seen != self._seen or not self._engine.running:
            self._seen, self._since, self._told = seen, now, False
        elif now - self._since >= self._still and not self._told:
            self._told, self.times = True, self.times + 1
            self._tell(f"nothing has moved for {now - self._since:.0f} s\n{described(self._engine)}")


def progress(engine: Any) -> tuple:
    """Other numbers whenever something was computed or somebody came or went."""
    loop = engine._worker.loop
    rows = _copied(loop.rows)
    return engine.running, loop.computed_tokens, tuple(rows), sum(row.made for row in rows.values())


def described(engine: Any) -> str:
    """Rows and their phases, what the scheduler thinks of each, the paths of the store, and where the thread is."""
    worker = engine._worker
    loop, scheduler, store = worker.loop, worker.loop.scheduler, worker.loop._store
    lines = [f"  {engine.running} open, {loop.computed_tokens:,} tokens of prompts computed, idle turns {loop._idle}"]
    jobs, blocked = _copied(scheduler._jobs), list(loop._blocked)
    for key, row in _copied(loop.rows).items():
        prefill, seat = row.prefill, row.seat
        done = "" if prefill is None else f", {prefill.done} of {prefill.total} computed beside {prefill.covered}"
        offset = None if seat is None else seat.cache.offset
        lines.append(
            f"  row {key}: {row.phase.value}{done}, cache at {offset}, made {row.made} of {row.request.limit}, handed "
            f"{len(row.handed)}, ready {row.ready}, in a group {row.group is not None}, alone {row.request.steady}, "
            f"session {row.request.session is not None}, waits for a prefix {row in blocked}, "
            f"cancelled {row.request.cancelled()}"
        )
        job = jobs.pop(key, None)
        lines.append(f"    {'no job' if job is None else _job(job)}")
    lines += [f"  job without a row: {_job(job)}" for job in jobs.values()]
    pieces = scheduler._pieces
    lines.append(
        f"  scheduler: admitted {list(_copied(scheduler._rows))}, reserved {scheduler.reserved_bytes:,} of "
        f"{scheduler.cache_bytes}, store in use beyond it {scheduler._pinned:,}, spare {scheduler._spare}, somebody "
        f"decodes {scheduler._beside}; pieces: credit {pieces._credit:.4f} s, pause {pieces.pause:.2f}, step "
        f"{pieces._step.seconds:.4f} s, next {pieces._wanted()} tokens for {pieces._price(pieces._wanted()):.4f} s"
    )
    for path in store._tree:
        session = path.session
        where = "no session" if session is None else f"{len(session.tokens)} tokens, cache at {session.cache.offset}"
        marks = [] if session is None else [mark.offset for mark in session.marks]
        meetings = "" if session is None else f", meetings {session.meetings}, marks {marks}"
        use = "idle" if path.asked is None else f"in use for {len(path.asked.key)} tokens"
        own = ", a caller's own" if path.guest else ""
        lines.append(f"  path: {use}{own}, sound {path.is_sound}, {where}{meetings}")
    frame = sys._current_frames().get(worker.ident)
    lines.append("  the thread is at:")
    lines += [f"  {line}" for line in "".join(traceback.format_stack(frame)).splitlines()] if frame else ["  its end"]
    lines.append(f"  {threading.active_count()} threads")
    return "\n".join(lines)


def _job(job: Any) -> str:
    return (
        f"job {job.key}: computed {job.computed} of {job.need}, answer {job.answer}, reserved {job.reserved}, behind "
        f"{job.behind}, rank {job.rank[0]:.2f}, passed {job.passed}, overtaken {job.overtaken}, put back {job.again}"
    )


def _copied(of: dict) -> dict:
    """A copy of what another thread may be changing."""
    while True:
        try:
            return dict(of)
        except RuntimeError:
            pass


class Memory:
    """Resident memory over time: what this process holds, and of that what it could not give back.

    Free pages that glibc's malloc keeps for the next time, in one arena a thread, are resident and nobody's: they are
    trimmed before each look, and the buffers that MLX keeps are not counted. What is left is held by somebody, or lies
    between what is.
    """

    def __init__(self) -> None:
        self.seen: list[tuple[float, int]] = []  # seconds since the beginning, bytes
        self._begin = time.monotonic()
        self._malloc = _glibc()

    def look(self) -> dict[str, int]:
        """Sizes in bytes, and Python's count of blocks, at this moment."""
        before = resident_memory() or 0
        held, free = self._in_malloc()
        if self._malloc is not None:
            self._malloc.malloc_trim(0)
        kept, after = mx.get_cache_memory(), resident_memory() or 0
        self.seen.append((time.monotonic() - self._begin, after - kept))
        return {
            "resident": before,
            "trimmed": after,
            "malloc in use": held,
            "malloc free": free,
            "MLX in use": mx.get_active_memory(),
            "MLX kept": kept,
            "blocks of Python": sys.getallocatedblocks(),
        }

    def between(self, start: float, end: float) -> float | None:
        """The median of what was seen from one second to another; None: nothing was."""
        found = [size for at, size in self.seen if start <= at <= end]
        return statistics.median(found) if found else None

    def _in_malloc(self) -> tuple[int, int]:
        if self._malloc is None:
            return 0, 0
        told = self._malloc.mallinfo2()
        return told.uordblks + told.hblkhd, told.fordblks


class _MallInfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


def _glibc() -> Any:
    """The C library, if it is one that can be asked and trimmed."""
    found = ctypes.CDLL(None)
    if not (hasattr(found, "mallinfo2") and hasattr(found, "malloc_trim")):
        return None
    found.mallinfo2.restype = _MallInfo
    return found
