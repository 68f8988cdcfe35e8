"""An answer that another thread makes: its parts as they come, to a thread or to a coroutine.

Knows parts, and who waits for them. Knows nothing of rows.
"""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import suppress

from mlx_qwen35 import checks
from mlx_qwen35.engine.collecting import Collected
from mlx_qwen35.errors import ArgumentError
from mlx_qwen35.text.parts import Completion, Part

_LONGEST = threading.TIMEOUT_MAX / 2  # seconds that a thread can wait for


Waiting = tuple[asyncio.AbstractEventLoop, "asyncio.Future[None]"]


class Wish:
    """Whether an answer is to end. Knows nothing that could know the answer, and takes no lock: a garbage collection
    may come here in the middle of anything."""

    def __init__(self) -> None:
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class Bell:
    """Coroutines that have something to read, woken together: waking a loop costs more than what is read there."""

    def __init__(self) -> None:
        self._waiting: list[Waiting] = []

    def add(self, waiting: Iterable[Waiting]) -> None:
        self._waiting += waiting

    def ring(self) -> None:
        """Wakes them, each loop once."""
        by_loop: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}
        for loop, future in self._waiting:
            by_loop.setdefault(loop, []).append(future)
        self._waiting.clear()
        for loop, futures in by_loop.items():
            with suppress(RuntimeError):  # a loop that was closed waits for nothing
                loop.call_soon_threadsafe(_wake, futures)


class Alarm:
    """Wakes a reader that has waited for so many seconds. One timer serves many waits that end before.

    Knows no answer: what a loop's timer holds would not be lost.
    """

    def __init__(self) -> None:
        self._timer: asyncio.TimerHandle | None = None
        self._future: asyncio.Future[None] | None = None
        self._until = 0.0

    def set(self, loop: asyncio.AbstractEventLoop, future: asyncio.Future[None], seconds: float) -> None:
        """For the next wait; `clear` at its end."""
        self._future, self._until = future, loop.time() + seconds
        if self._timer is None or self._timer.when() > self._until:
            self.stop()
            self._timer = loop.call_at(self._until, self._rang, loop)

    def clear(self) -> None:
        self._future = None

    def stop(self) -> None:
        """No more waits."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _rang(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        if self._future is None:
            return
        if loop.time() < self._until:
            self._timer = loop.call_at(self._until, self._rang, loop)
        else:
            _wake([self._future])


class Channel:
    """What the engine's thread puts parts into. open: answers that have not ended. maker: the id of that thread, which
    cannot wait for what it makes itself."""

    def __init__(self, prompt_tokens: int, answers: int, maker: int | None = None) -> None:
        self.open, self.prompt_tokens = answers, prompt_tokens
        self.wish = Wish()
        self._maker = maker
        self.answers = [Collected(prompt_tokens) for _ in range(answers)]
        self.error: BaseException | None = None
        self._parts: deque[Part] = deque()
        self._condition = threading.Condition()
        self._waiting: list[Waiting] = []

    def put(self, part: Part, bell: Bell | None = None) -> None:
        """A part; whoever waits is told, coroutines when the bell rings."""
        with self._condition:
            if self.error is not None:
                return
            self._parts.append(part)
            self.answers[part.index].add(part)
            if part.finish_reason:
                self.open -= 1
            self._tell(bell)

    def fail(self, error: BaseException) -> None:
        """An answer ended with an error; the others to the prompt, too."""
        with self._condition:
            self.error, self.open = self.error or error, 0
            self.wish.cancelled = True
            self._tell()

    @property
    def done(self) -> bool:
        return self.open == 0

    def take_all(self) -> tuple[list[Part], bool]:
        """-> the parts that are there, and whether there will be none any more. Raises the error, after all parts."""
        with self._condition:
            parts = list(self._parts)
            self._parts.clear()
            if not parts and self.done and self.error is not None:
                raise self.error
            return parts, self.done

    def take(self) -> tuple[Part | None, bool]:
        """-> the next part, None if there is none yet; and whether there will be none any more. Raises the error, after
        all parts."""
        with self._condition:
            if self._parts:
                return self._parts.popleft(), False
            if self.done and self.error is not None:
                raise self.error
            return None, self.done

    def wait(self, until: float | None = None) -> bool:
        """Blocks while there is neither a part nor an end; False if it is past `until` (of time.monotonic)."""
        return self._wait_for(lambda: bool(self._parts) or self.done, until)

    def wait_for_end(self, until: float | None = None) -> bool:
        """As `wait`, for the end."""
        return self._wait_for(lambda: self.done, until)

    def _wait_for(self, ready: Callable[[], bool], until: float | None) -> bool:
        if self._maker == threading.get_ident() and not ready():
            raise RuntimeError(
                "the engine's own thread (on_progress is called there) cannot wait for an answer that it has to make: "
                "read it on another"
            )
        with self._condition:
            return self._condition.wait_for(ready, None if until is None else max(0.0, until - time.monotonic()))

    async def wait_here(self, seconds: float | None = None, alarm: Alarm | None = None) -> None:
        """As `wait`, in a coroutine; at most so many seconds, which the alarm counts."""
        loop = asyncio.get_running_loop()
        with self._condition:
            if self._parts or self.done:
                return
            future = loop.create_future()
            self._waiting.append((loop, future))
        if seconds is not None:
            alarm.set(loop, future, seconds)
        try:
            await future
        finally:
            if alarm is not None:
                alarm.clear()
            if self._waiting:  # it was not this channel that woke it
                with self._condition:
                    self._waiting = [each for each in self._waiting if each[1] is not future]

    def _tell(self, bell: Bell | None = None) -> None:
        self._condition.notify_all()
        if self._waiting:
            waiting, self._waiting = self._waiting, []
            own = bell or Bell()
            own.add(waiting)
            if bell is None:
                own.ring()


def _wake(futures: Iterable[asyncio.Future[None]]) -> None:
    for future in futures:
        if not future.done():
            future.set_result(None)


class Answer:
    """What `Engine.submit` gives: an iterator and an async iterator of Parts, for one reader. One that nobody holds any
    more is cancelled.

    Of several answers to one prompt the parts come as they are made; `part.index` says of which each is. The last part
    of each, and only it, has a finish_reason. What went wrong is raised after the parts that came before.
    """

    def __init__(self, channel: Channel, maker: object) -> None:
        """maker: what makes it, which is not to be lost before its end is read."""
        self._channel, self._maker = channel, maker
        self._alarm = Alarm()
        weakref.finalize(self, channel.wish.cancel)  # not the channel's, whose error may know who read it: this answer

    def cancel(self) -> None:
        """Ends it, from any thread, with a part whose finish_reason is "cancelled"."""
        self._channel.wish.cancel()

    @property
    def done(self) -> bool:
        """Whether it has ended, read or not."""
        return self._channel.done

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the whole prompt."""
        return self._channel.prompt_tokens

    async def some(self, seconds: float | None = None) -> list[Part] | None:
        """The parts that are there, or are first, in at most so many seconds (then []); None at the end."""
        await self._channel.wait_here(seconds, self._alarm)
        parts, ended = self._channel.take_all()
        if parts or not ended:
            return parts
        self._maker = None
        self._alarm.stop()
        return None

    def result(self, timeout: float | None = None) -> Completion | list[Completion]:
        """Waits for the end, at most `timeout` seconds (then TimeoutError) -> the answer, or the list of several."""
        if timeout is not None:
            checks.number("timeout", timeout)
            if timeout < 0:
                raise ArgumentError(f"timeout is {timeout}; give seconds, 0 or more, or None to wait for the end")
        until = None if timeout is None else time.monotonic() + min(timeout, _LONGEST)
        if not self._channel.wait_for_end(until):
            raise TimeoutError(f"the answer had not ended after {timeout} seconds; wait again, or cancel it")
        self._maker = None
        if self._channel.error is not None:
            raise self._channel.error
        found = [answer.completion() for answer in self._channel.answers]
        return found[0] if len(found) == 1 else found

    def __iter__(self) -> Iterator[Part]:
        return self

    def __next__(self) -> Part:
        while True:
            part, ended = self._channel.take()
            if part is not None:
                return part
            if ended:
                self._maker = None
                raise StopIteration
            self._channel.wait()

    def __aiter__(self) -> AsyncIterator[Part]:
        return self

    async def __anext__(self) -> Part:
        while True:
            part, ended = self._channel.take()
            if part is not None:
                return part
            if ended:
                self._maker = None
                raise StopAsyncIteration
            await self._channel.wait_here()
