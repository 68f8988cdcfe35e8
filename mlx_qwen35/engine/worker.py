"""The thread of an engine: it takes requests in, drives a Loop, and hands parts out.

Knows that MLX's streams belong to one thread, and that a process may end while it computes. Knows nothing of prompts
or arguments, and nothing of the Engine, which may be lost without being closed.
"""

from __future__ import annotations

import atexit
import inspect
import os
import queue
import threading
import time
import traceback
import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from types import FrameType
from typing import TYPE_CHECKING

from mlx_qwen35.engine.answer import Bell
from mlx_qwen35.engine.loop import Loop
from mlx_qwen35.errors import ArgumentError, BusyError, EngineClosedError
from mlx_qwen35.machine.gpu import wired

if TYPE_CHECKING:
    from mlx_qwen35.engine.answer import Channel
    from mlx_qwen35.engine.request import Request
    from mlx_qwen35.engine.row import Row
    from mlx_qwen35.engine.scheduler import Scheduler
    from mlx_qwen35.model import Model
    from mlx_qwen35.session.store import Store
    from mlx_qwen35.vision.features import FeatureStore

_RUNNING: weakref.WeakSet[Worker] = weakref.WeakSet()
# Seconds before the interpreter goes. A thread that is joined may still give back what MLX keeps for it, for which it
# takes the interpreter's lock: where that is gone, the process is aborted.
_PARTING = 0.2
_GATHER = 0.03  # seconds that the first may wait while others are being submitted
_NEXT = 0.001  # seconds in which the next of a loop of submits begins
_ANOTHER = 0.006  # the same where two came already: a thread may have to wait for Python's lock, 5 ms at a time
_made: list[int] = []  # processes in which there was one
_PACKAGES = (__name__.partition(".")[0], "mlx")  # whose functions hold caches and what is computed
_WAITING = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR


class Worker:
    """most_waiting: as in Scheduler. features: of pictures, given back at the end. open: answers that have not ended.
    failed: what ended the thread, if it was an error."""

    def __init__(
        self,
        model: Model,
        store: Store,
        scheduler: Scheduler,
        features: FeatureStore,
        most_waiting: int | None,
    ) -> None:
        self.open, self.closing = 0, False
        self._coming = 0  # that are about to be put
        self.failed: BaseException | None = None
        self.loop = Loop(model, store=store, features=features, scheduler=scheduler, behind=True)
        self._model, self._store, self._features = model, store, features
        self._most_rows, self._most_waiting = scheduler.most_rows, most_waiting
        self._incoming: queue.SimpleQueue[tuple[Request, Channel] | None] = queue.SimpleQueue()  # None: look up
        self._rows: dict[Row, Channel] = {}  # the thread's own
        self._spent: list[FrameType] = []  # of errors that were handed out
        self._bell = Bell()
        self._counting = threading.RLock()
        self._process = os.getpid()
        self._thread = threading.Thread(target=self._work, name="mlx-qwen35 engine", daemon=True)
        self._thread.start()
        _RUNNING.add(self)
        _made[:] = [self._process]

    @property
    def ident(self) -> int | None:
        """Of the thread."""
        return self._thread.ident

    def put(self, wanted: Sequence[Request], channel: Channel) -> None:
        """Answers that are wanted; from any thread. Raises EngineClosedError, BusyError, or ArgumentError for
        more than there is room for."""
        if not self.is_here:
            raise EngineClosedError("the engine is in the process that this one was forked from: make one here")
        with self._counting:
            if self.closing:
                raise EngineClosedError("the engine is closed; make a new one") from self.failed
            self._check_waiting(len(wanted))
            self.open += len(wanted)
            for each in wanted:
                self._incoming.put((each, channel))

    @contextmanager
    def expecting(self) -> Iterator[None]:
        """Inside, something is about to be put."""
        with self._counting:
            self._coming += 1
        try:
            yield
        finally:
            with self._counting:
                self._coming -= 1
                if not self._coming:
                    self._incoming.put(None)  # whoever waits for it waits no more

    def stop(self) -> None:
        """All ends soon. Takes no lock: a garbage collection may come here in the middle of anything."""
        self.closing = True
        self._incoming.put(None)

    def close(self) -> None:
        """All ends, and is waited for, but on the thread itself and in a fork, which has no such thread."""
        if not self.is_here:
            return
        with self._counting:  # what was put is in
            self.stop()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    @property
    def is_here(self) -> bool:
        """Whether this is the process that it runs in, and no fork of it."""
        return os.getpid() == self._process

    def _check_waiting(self, more: int) -> None:
        if self._most_waiting is None:
            return
        most = self._most_rows + self._most_waiting
        if more > most:
            raise ArgumentError(
                f"n is {more}, and no more than {most} answers may be here at once: {self._most_rows} computed "
                f"and {self._most_waiting} waiting (most_rows, most_waiting); ask for fewer"
            )
        if self.open + more > most:
            waiting = max(0, self.open - self._most_rows)
            raise BusyError(
                f"{min(self.open, self._most_rows)} requests are running and {waiting} are waiting; at most "
                f"{self._most_waiting} may wait: try again when one has ended, or allow more to wait"
            )

    def _work(self) -> None:
        try:
            while not self.closing:
                self._add(self._incoming.get())
                self._gather()
                with self._in_place():
                    self._answer()
        except BaseException as error:  # nobody else would see it
            self.failed = error
        finally:
            self._finish()

    def _answer(self) -> None:
        """Until all that was submitted has ended."""
        while not self.closing:
            self._take_in()
            if not self._rows:
                return
            try:
                self.loop.turn()
            except Exception as error:  # of no row alone
                for row in list(self._rows):
                    row.fail(error)
            self._hand_out()
            self._forget()

    def _take_in(self) -> None:
        with suppress(queue.Empty):
            while True:
                self._add(self._incoming.get_nowait())

    def _gather(self) -> None:
        """Who comes together with the first, where nobody ran before: their prompts are read in one call."""
        until = time.perf_counter() + _GATHER
        while self._rows and len(self._rows) < self._most_rows and not self.closing:
            left = max(0.0, until - time.perf_counter())
            wait = left if self._coming else min(left, _NEXT if len(self._rows) == 1 else _ANOTHER)
            try:
                self._add(self._incoming.get(timeout=wait))
            except queue.Empty:
                return

    def _add(self, asked: tuple[Request, Channel] | None) -> None:
        if asked is None:
            return
        request, channel = asked
        try:
            self._rows[self.loop.add(request)] = channel
        except Exception as error:
            self._end(channel, error)

    def _hand_out(self) -> None:
        for row in list(self._rows):
            error = self._hand_out_of(row)
            if error is not None:
                self._spent += _frames_of(error)
                self._lose(row, error)
        self._bell.ring()

    def _forget(self) -> None:
        """Whoever keeps an error keeps its place in the code, and not the caches of those who ran there."""
        while self._spent:
            with suppress(RuntimeError):  # it runs
                self._spent.pop().clear()

    def _hand_out_of(self, row: Row) -> BaseException | None:
        """-> what went wrong; another interrupt than an error, too: the reader waits for it."""
        channel = self._rows[row]
        try:
            while row.ready:
                part = row.take(distribution=False)  # which only this thread could read
                if part.finish_reason:  # first: who reads of the end may submit the next at once
                    del self._rows[row]
                    self.loop.leave(row)  # while nothing runs nothing of it is held either
                    self._end()
                channel.put(part, self._bell)
        except BaseException as error:
            return error
        return None

    def _lose(self, row: Row, error: BaseException) -> None:
        channel = self._rows.pop(row, None)
        try:
            self.loop.leave(row)
        finally:
            if channel is not None:
                self._end(channel, error)

    def _end(self, channel: Channel | None = None, error: BaseException | None = None) -> None:
        with self._counting:
            self.open -= 1
        if channel is not None:
            channel.fail(error)

    def _finish(self) -> None:
        with self._counting:
            self.closing = True
        self._take_in()
        for row in list(self._rows):
            if self.failed is not None:
                row.fail(self.failed)
            elif not row.ready:
                row.end("cancelled")
        self._hand_out()
        for row in list(self._rows):
            self._lose(row, EngineClosedError("the engine was closed before the answer had ended"))
        self.loop.close()
        self._store.clear()
        self._store.close()
        self._features.clear()

    def _in_place(self) -> AbstractContextManager[None]:
        return wired() if self._model.expert_stats is None else nullcontext()  # streamed experts have their own limit


def _frames_of(error: BaseException | None) -> list[FrameType]:
    """What an error was raised through, and what had called that, but for what is not ours: the same error may end
    several answers, and who read one of them may have raised it again, and go on."""
    found, seen = [], set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        for frame, _ in traceback.walk_tb(error.__traceback__):
            found += [inner for inner, _ in traceback.walk_stack(frame) if _is_ours(inner)]
        error = error.__cause__ or error.__context__
    return found


def _is_ours(frame: FrameType) -> bool:
    """Whether a frame is a function's of this package or of MLX. A generator's may be waiting to go on, and clearing it
    would end it."""
    package = str(frame.f_globals.get("__name__")).partition(".")[0]
    return package in _PACKAGES and not frame.f_code.co_flags & _WAITING


@atexit.register
def _close_all() -> None:
    """Before the interpreter goes: a thread that is in the middle of MLX then would abort the process."""
    for worker in list(_RUNNING):
        worker.close()
    if os.getpid() in _made:
        time.sleep(_PARTING)
