"""Ctrl-C while an answer runs, and the signals that end a program. Knows signals, nothing of answers."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

# What a closed terminal, and whoever ends a program in good order, send.
ENDING = tuple(getattr(signal, name) for name in ("SIGHUP", "SIGTERM") if hasattr(signal, name))


class Terminated(BaseException):
    """A signal asks the program to end. status: with which it then exits, as shells count it."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number


class Ending:
    """What the first of such signals does: raise Terminated at once, or, where something must not be cut in the middle,
    wake who waits and let `check` raise it afterwards. Those that follow change nothing."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._wakers: list[Callable[[], object]] = []

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None:
            return
        self.number = number
        if not self._wakers:
            raise Terminated(number)
        self._wakers[-1]()

    @contextmanager
    def deferred(self, wake: Callable[[], object] = lambda: None) -> Iterator[None]:
        """Inside, a signal raises nothing, but calls `wake`."""
        self._wakers.append(wake)
        try:
            yield
        finally:
            self._wakers.pop()

    def check(self) -> None:
        """Raises Terminated if a signal has come."""
        if self.number is not None:
            raise Terminated(self.number)


_current: Ending | None = None


@contextmanager
def ending_on_signals() -> Iterator[Ending]:
    """Inside, SIGTERM and SIGHUP end the program through Terminated, so that what it has can be put away.

    One that is ignored, as by nohup, stays so; Python gives signals to the main thread only.
    """
    global _current
    ending = Ending()
    handled = {}
    if threading.current_thread() is threading.main_thread():
        handled = {number: signal.getsignal(number) for number in ENDING}
        handled = {number: before for number, before in handled.items() if before == signal.SIG_DFL}
    outer, _current = _current, ending
    for number in handled:
        signal.signal(number, ending)
    try:
        yield ending
    finally:
        for number, before in handled.items():
            signal.signal(number, before)
        _current = outer


@contextmanager
def stop_on_ctrl_c() -> Iterator[threading.Event]:
    """The first Ctrl-C sets the event, so that the work can end in good order; the second interrupts it. A signal that
    ends the program sets it too.

    Python gives signals to the main thread only: on another one the event is never set.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def on_signal(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    previous = signal.signal(signal.SIGINT, on_signal)
    try:
        if _current is None:
            yield asked
        else:
            with _current.deferred(asked.set):
                yield asked
    finally:
        signal.signal(signal.SIGINT, previous)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Inside, Ctrl-C and the signals that end a program are noted, and do at the end what they would have done. On
    another thread than the main one, which gets no signals, nothing is changed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[tuple[int, FrameType | None]] = []
    numbers = [number for number in (signal.SIGINT, *ENDING) if callable(signal.getsignal(number))]
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        signal.signal(number, lambda number, frame: came.append((number, frame)))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number, frame in came:
            before[number](number, frame)
