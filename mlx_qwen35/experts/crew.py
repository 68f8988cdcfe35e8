"""The threads that read experts, what waits for them and what they are at.

Knows queues, jobs and memory to be filled. Knows neither layers nor why an expert is wanted.

    a Read    queued ── a thread takes its first job ──▶ reading ── its last job ends ──▶ done, or failed
                └── cancel ──▶ cancelled: its memory will not be touched
    queues    urgent ones first, then the others; in each, first come first served
    threads   as many as there are processors copy what lies in memory; who has to wait for a disk calls another first.
              Who waits for reads copies too: an expert of a small model is there before a thread would be awake

Nothing here waits on a Condition or an Event: an interrupt (Ctrl-C) inside of those can leave their lock taken for
good. What an interrupt may hit takes plain locks for a few lines, publishes in one step, and what it leaves behind is
found by asking what is there, not by counting. The same holds for the threads, which a debugger or a notebook may try
to kill: a read is in the queue or in the hands of a thread at every moment, and what ends it can be done twice.
"""

from __future__ import annotations

import itertools
import mmap
import os
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from time import monotonic, perf_counter, thread_time

import numpy as np

from ..errors import ExpertReadError
from ..machine.system import processors
from .handles import Handle
from .layout import Chunk, Job

_QUEUED, _READING, _DONE, _FAILED, _CANCELLED = range(5)
_LOOK_SECONDS = 0.5  # who waits longer looks whether anybody is left who reads
_CLOSED = "its reader was closed. Load the model again", None
_ALONE = 1 << 20  # bytes of an expert that who waits for it copies sooner than a thread is awake
_CLOSE_SECONDS = 10.0  # how long closing waits for a disk that does not answer


@dataclass(frozen=True)
class Target:
    """Where one tensor of an expert goes. view: bytes, writable, contiguous.

    convert(file's bytes, view) is given where the memory's dtype is not the file's; it may be called for any stretch of
    whole items, on any thread. None: view is as large as the tensor.
    """

    view: memoryview
    convert: Callable[[memoryview, memoryview], None] | None = None


@dataclass(frozen=True)
class ReadStats:
    """What was read since the reader was opened.

    records: experts that are there. read_seconds: added up over threads; busy_seconds: at least one was reading.
    processor_seconds: of the threads, in what has ended; a disk that writes to memory by itself takes few.
    mean_depth, max_depth: threads that were reading at once, while any was.
    """

    bytes_read: int = 0
    records: int = 0
    read_seconds: float = 0.0
    busy_seconds: float = 0.0
    processor_seconds: float = 0.0
    max_depth: int = 0

    @property
    def mean_depth(self) -> float:
        return self.read_seconds / self.busy_seconds if self.busy_seconds > 0 else 0.0


class Read:
    """One expert on its way into memory."""

    def __init__(
        self,
        crew: Crew,
        layer: int,
        expert: int,
        targets: Sequence[Target],
        sizes: Sequence[int],
        jobs: Sequence[Job],
    ):
        """sizes: bytes of each tensor in the file."""
        self.layer, self.expert, self.sizes = layer, expert, sizes
        self.targets = targets  # let go of when they will not be touched any more
        self.state = _QUEUED
        self.pending = deque(jobs)
        self.problem: tuple[str, BaseException | None] | None = None
        self.ended = threading.Lock()  # held until the end
        self.ended.acquire()
        self._crew = crew

    @property
    def what(self) -> str:
        """Its name in errors."""
        return f"layer {self.layer}, expert {self.expert}"

    @property
    def done(self) -> bool:
        """Whether it has ended, in whatever way: its memory will not be touched any more."""
        return self.state >= _DONE

    @property
    def good(self) -> bool:
        """Whether the expert is there."""
        return self.state == _DONE

    def cancel(self) -> bool:
        """Give up what has not begun. True: the memory was not touched, and never will be."""
        return self._crew.cancel(self)

    def promote(self) -> None:
        """Make it urgent, where it still waits for its turn."""
        if not self.done:
            self._crew.queue(self, urgent=True)

    def settle(self) -> None:
        """Return when it has ended, in whatever way. KeyboardInterrupt ends the waiting and nothing else."""
        self._crew.settle(self)

    def wait(self) -> None:
        """Return when the expert is there; raises ExpertReadError if it cannot be read, or was cancelled.

        KeyboardInterrupt ends the waiting and nothing else: the read goes on.
        """
        self.settle()
        if self.state != _DONE:
            problem, cause = self.problem or ("was cancelled", None)
            raise ExpertReadError(f"{self.what}: {problem}") from cause


class Crew:
    """Threads, and the open files that they read; they live on until end()."""

    def __init__(self, handles: Mapping[Path, Handle], threads: int, bounce: bool):
        """bounce: whether all is read into memory of the thread's own first."""
        self._handles, self._bounce = handles, bounce
        self._process = os.getpid()
        self._lock = threading.Lock()  # of what follows, but for the two queues
        self._numbers = itertools.count()
        self._threads: dict[int, threading.Thread] = {}  # that have not ended
        self._at: dict[int, tuple[Read, float]] = {}  # what each of them reads, and since when
        self._helping: dict[int, int] = {}  # numbers of those who help, and their threads
        self._spare: list[_Scratch] = []  # that they have used
        self._at_disk: set[int] = set()  # those of them that wait for a disk, and take no processor
        self._copying = min(threads, processors())  # how many of the others are of use at once
        self._bytes_read = self._records = self._max_depth = 0
        self._read_seconds = self._busy_seconds = self._processor_seconds = 0.0
        self._busy_since = 0.0
        self._ending = False
        self._urgent: deque[Read] = deque()  # a Read is in there once for each of its jobs, or more often
        self._later: deque[Read] = deque()
        self._calls: SimpleQueue[None] = SimpleQueue()  # each wakes a thread, which works until the queues are empty
        try:
            for _ in range(threads):
                self._start()
        except BaseException:
            self.end()
            self.join()
            raise

    def queue(self, read: Read, *, urgent: bool, helped: bool = False) -> None:
        """Have the pending jobs of a read done; raises ExpertReadError if the threads were ended.

        helped: the caller will `help` before it waits for the read.
        """
        if self._ending:
            raise ExpertReadError(f"{read.what}: {_CLOSED[0]}")
        if os.getpid() != self._process:
            raise ExpertReadError(f"{read.what}: a fork of the process has no threads that read. Load the model again")
        (self._urgent if urgent else self._later).extend([read] * len(read.pending))
        if not helped:
            self._call()
        elif sum(read.sizes) > _ALONE:
            self._call(besides=1)
        self._tidy()  # the threads may have ended meanwhile

    def cancel(self, read: Read) -> bool:
        with self._lock:
            if read.state == _QUEUED:
                self._end(read, _CANCELLED)
            return read.state == _CANCELLED

    def settle(self, read: Read) -> None:
        while not read.done:
            if read.ended.acquire(timeout=_LOOK_SECONDS):
                read.ended.release()
            else:
                self._look_after()

    def alive(self) -> list[Read]:
        """All that has not ended, also what nobody has in hand because an interrupt hit while it was handed over."""
        with self._lock:
            found = {*self._urgent.copy(), *self._later.copy(), *(read for read, _ in self._at.values())}
        return [read for read in found if not read.done]

    def stats(self) -> ReadStats:
        with self._lock:
            now = perf_counter()
            running = self._read_seconds + sum(now - since for _, since in self._at.values())
            busy = self._busy_seconds + (now - self._busy_since if self._at else 0.0)
            return ReadStats(self._bytes_read, self._records, running, busy, self._processor_seconds, self._max_depth)

    def end(self) -> None:
        """Let threads end when they have done the job they are at. Takes no lock: a garbage collection may call it."""
        self._ending = True
        self._calls.put(None)  # who is woken by it wakes the next

    def join(self) -> None:
        """Wait until threads have ended, unless a disk does not answer; every read has ended then, files are closed."""
        last = monotonic() + _CLOSE_SECONDS
        with self._lock:
            threads = [*self._threads.values()]
        for _ in threads:  # one that was killed has not woken the next
            self._calls.put(None)
        for thread in threads:
            if thread.is_alive() and thread is not threading.current_thread():
                thread.join(max(0.0, last - monotonic()))
        self._look_after()

    # Threads

    def help(self) -> None:
        """Do what is urgent on this thread, until nothing of it is left to be begun. What goes wrong is the read's."""
        number, scratch = next(self._numbers), self._spare.pop() if self._spare else _Scratch()
        self._helping[number] = threading.get_ident()
        try:
            while work := None if self._ending else self._take(number):
                read, job = work
                began = thread_time()
                try:
                    count, problem = self._do(number, read, job, scratch), None
                except Exception as error:
                    count, problem = 0, _problem(error)
                self._finish(number, count, problem, thread_time() - began)
                del work, read, job, problem
        except BaseException as error:  # an interrupt: it fails what it was at
            self._finish(number, 0, _problem(error))
            raise
        finally:
            self._helping.pop(number, None)
        self._spare.append(scratch)

    def _call(self, besides: int = 0) -> None:
        """Wake threads for what is queued, but no more than can copy at once besides those that wait for a disk, and
        besides so many others.

        Takes no lock: who ends a job looks into the queues after it counts no more, so that one of the two is seen.
        """
        busy = len(self._at) - len(self._at_disk) + self._calls.qsize()
        for _ in range(min(len(self._urgent) + len(self._later), self._copying - busy - besides)):
            self._calls.put(None)

    def _wait_for_disk(self, number: int) -> None:
        """Thread `number` is about to; somebody else may use the processor."""
        self._at_disk.add(number)
        self._call()

    def _start(self) -> None:
        number = next(self._numbers)  # of nobody else, ever: what a thread that is gone had in hand is found by it
        # A daemon: a program that ends without close() must not wait for it.
        thread = threading.Thread(target=self._run, args=(number,), name=f"expert-reader-{number}", daemon=True)
        self._threads[number] = thread
        thread.start()

    def _run(self, number: int) -> None:
        scratch = _Scratch()
        while not self._ending and number in self._threads:
            try:
                self._calls.get()
                while work := None if self._ending else self._take(number):
                    read, job = work
                    began = thread_time()
                    try:
                        count, problem = self._do(number, read, job, scratch), None
                    except BaseException as error:
                        count, problem = 0, _problem(error)
                    self._finish(number, count, problem, thread_time() - began)
                    del work, read, job, problem  # memory that was read into is no business of who waits for work
            except BaseException as error:  # somebody wanted to kill this thread; it fails what it was at, and goes on
                self._finish(number, 0, _problem(error))
                self._calls.put(None)  # the one that it may have taken
        self._calls.put(None)
        with self._lock:
            self._threads.pop(number, None)
        self._tidy()

    def _take(self, number: int) -> tuple[Read, Job] | None:
        """The next job there is."""
        helps = number in self._helping
        with self._lock:
            for queue in (self._urgent,) if helps else (self._urgent, self._later):
                while queue and (helps or number in self._threads):
                    read = queue[0]
                    if read.done or not read.pending:
                        queue.popleft()
                        continue
                    now = perf_counter()
                    if not self._at:
                        self._busy_since = now
                    self._at[number] = read, now
                    read.state = _READING
                    self._max_depth = max(self._max_depth, len(self._at))
                    queue.popleft()
                    return read, read.pending.popleft()
        return None

    def _do(self, number: int, read: Read, job: Job, scratch: _Scratch) -> int:
        """Read what a job says, to where it belongs; -> bytes."""
        waits = partial(self._wait_for_disk, number)
        count, targets, expert = 0, read.targets, read.expert
        straight = not self._bounce and not any([target.convert for target in targets])
        file, handle, handles = None, None, []
        for chunk in job:
            if chunk.file is not file:
                file = chunk.file
                handle = self._handles[file]
                handles.append(handle)
            offset = chunk.offset + expert * chunk.step
            if straight and chunk.slices is not None:
                buffers, copies = [targets[at].view[part] for at, part in chunk.slices], ()
            else:
                buffers, copies = self._buffers(read, chunk, scratch)
            count += handle.read(buffers, offset, None if number in self._at_disk else waits)
            for raw, target, out in copies:
                if target.convert is None:  # a copy of memoryviews would stop all other threads
                    np.copyto(np.asarray(out), np.asarray(raw))
                else:
                    target.convert(raw, out)
        for handle in handles:
            handle.check()
        return count

    def _buffers(
        self, read: Read, chunk: Chunk, scratch: _Scratch
    ) -> tuple[list[memoryview], list[tuple[memoryview, Target, memoryview]]]:
        """What the bytes of a chunk are read into, piece by piece; what is to be copied or converted afterwards:
        (bytes of the file, target, the memory for them)."""
        buffers, copies, used = [], [], 0
        memory = scratch.of(chunk.nbytes)
        for piece in chunk.pieces:
            size = piece.stop - piece.start
            target = None if piece.tensor is None else read.targets[piece.tensor]
            if target is not None and target.convert is None and not self._bounce:
                buffers.append(target.view[piece.start : piece.stop])
                continue
            buffers.append(memory[used : used + size])
            used += size
            if target is not None:
                whole = read.sizes[piece.tensor]
                start, stop = (at * target.view.nbytes // whole for at in (piece.start, piece.stop))
                copies.append((buffers[-1], target, target.view[start:stop]))
        return buffers, copies

    def _finish(
        self, number: int, count: int, problem: tuple[str, BaseException | None] | None, processor_seconds: float = 0.0
    ) -> None:
        """What thread `number` was at has ended, after `count` bytes. Nothing happens if it was at nothing."""
        with self._lock:
            if number not in self._at:
                return
            read, since = self._at[number]
            if self._ending and read.pending:
                problem = problem or _CLOSED
            if problem is not None:
                read.problem = read.problem or problem
                read.pending.clear()
            now = perf_counter()
            self._bytes_read += count
            self._processor_seconds += processor_seconds
            self._read_seconds += now - since
            if len(self._at) == 1:
                self._busy_seconds += now - self._busy_since
            if not read.pending and sum([other is read for other, _ in self._at.values()]) == 1:
                good = read.problem is None
                self._records += good and not read.done
                self._end(read, _DONE if good else _FAILED)
            self._at_disk.discard(number)
            del self._at[number]  # at last: killed before, this is done again

    def _end(self, read: Read, state: int) -> None:
        """The last word on a read, if none was said; with the lock."""
        if read.done:
            return
        read.targets = ()
        read.state = state
        read.ended.release()

    def _look_after(self) -> None:
        """Replace threads that are gone, fail what they were at, and wake the others: a call may have been lost."""
        with self._lock:
            for number in [number for number, thread in self._threads.items() if not thread.is_alive()]:
                del self._threads[number]
                if not self._ending:
                    self._start()
            for number, thread in [*self._helping.items()]:  # who looks does not help, whatever an interrupt left
                if thread == threading.get_ident():
                    self._helping.pop(number, None)
            left = self._at.keys() - self._threads.keys() - self._helping.keys()
        for number in left:
            self._finish(number, 0, ("the thread that read it is gone: ask again", None))
        for _ in range(len(self._urgent) + len(self._later) or 1):
            self._calls.put(None)
        self._tidy()

    def _tidy(self) -> None:
        """While ending: fail what no thread will take any more, and close the files when no thread is left."""
        if not self._ending:
            return
        with self._lock:
            reading = {read for read, _ in self._at.values()}
            for queue in (self._urgent, self._later):
                while queue:
                    read = queue.popleft()
                    if read not in reading:
                        read.problem = read.problem or _CLOSED
                        self._end(read, _FAILED)
            if not self._threads and not self._at:
                for handle in self._handles.values():
                    handle.close()


class _Scratch:
    """Memory of one thread, from the start of a page on; it grows to the largest chunk."""

    def __init__(self) -> None:
        self._memory = memoryview(b"")

    def of(self, size: int) -> memoryview:
        if size > self._memory.nbytes:
            self._memory = memoryview(mmap.mmap(-1, size))
        return self._memory


def _problem(error: BaseException) -> tuple[str, BaseException | None]:
    """What to say of an error, and what caused it: without frames, in which the memory that was read into lives on."""
    if isinstance(error, ExpertReadError):
        return str(error), error.__cause__ and error.__cause__.with_traceback(None)
    return f"{type(error).__name__} while it was read ({error}): ask again", error.with_traceback(None)
