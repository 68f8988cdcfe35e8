"""An answer that another thread makes: its parts as they come, to a thread or to a coroutine.

Knows parts, and who waits for them. Knows nothing of rows.
"""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress

from mlx_qwen35 import checks
from mlx_qwen35.engine.collecting import Collected
from mlx_qwen35.errors import ArgumentError
from mlx_qwen35.parts import Completion, Part

_LONGEST = threading.TIMEOUT_MAX / 2  # seconds that a thread can wait for


class Wish:
    """Whether an answer is to end. Knows nothing that could know the answer, and takes no lock: a garbage collection
    may come here in the middle of anything."""

    def __init__(self) -> None:
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


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
        self._waiting: list[tuple[asyncio.AbstractEventLoop, asyncio.Future]] = []

    def put(self, part: Part) -> None:
        """A part; whoever waits is told."""
        with self._condition:
            if self.error is not None:
                return
            self._parts.append(part)
            self.answers[part.index].add(part)
            if part.finish_reason:
                self.open -= 1
            self._tell()

    def fail(self, error: BaseException) -> None:
        """An answer ended with an error; the others to the prompt, too."""
        with self._condition:
            self.error, self.open = self.error or error, 0
            self.wish.cancelled = True
            self._tell()

    @property
    def done(self) -> bool:
        return self.open == 0

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

    async def wait_here(self, seconds: float | None = None) -> None:
        """As `wait`, in a coroutine; at most so many seconds."""
        loop = asyncio.get_running_loop()
        with self._condition:
            if self._parts or self.done:
                return
            future = loop.create_future()
            self._waiting.append((loop, future))
        end = None if seconds is None else loop.call_later(seconds, lambda: future.done() or future.set_result(None))
        try:
            await future
        finally:
            if end is not None:
                end.cancel()
            with self._condition:
                self._waiting = [each for each in self._waiting if each[1] is not future]

    def _tell(self) -> None:
        self._condition.notify_all()
        waiting, self._waiting = self._waiting, []
        for loop, future in waiting:
            with suppress(RuntimeError):  # a loop that was closed waits for nothing
                loop.call_soon_threadsafe(lambda future=future: future.done() or future.set_result(None))


class Answer:
    """What `Engine.submit` gives: an iterator and an async iterator of Parts, for one reader. One that nobody holds any
    more is cancelled.

    Of several answers to one prompt the parts come as they are made; `part.index` says of which each is. The last part
    of each, and only it, has a finish_reason. What went wrong is raised after the parts that came before.
    """

    def __init__(self, channel: Channel, maker: object) -> None:
        """maker: what makes it, which is not to be lost before its end is read."""
        self._channel, self._maker = channel, maker
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
        parts: list[Part] = []
        await self._channel.wait_here(seconds)
        while True:
            try:
                part, ended = self._channel.take()
            except BaseException:
                if parts:  # which came before it; it is raised next time
                    return parts
                raise
            if part is None:
                if ended and not parts:
                    self._maker = None
                    return None
                return parts
            parts.append(part)

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
