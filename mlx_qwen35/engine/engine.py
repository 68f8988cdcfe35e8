"""The engine: one thread that computes, and requests from any other.

Knows who submitted what, and that MLX's streams belong to one thread. Knows nothing of how answers are made: it drives
a Loop.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlx_qwen35 import checks
from mlx_qwen35.engine import request as requests
from mlx_qwen35.engine.answer import Answer, Channel
from mlx_qwen35.engine.loop import Loop
from mlx_qwen35.engine.room import bytes_of_rows, room
from mlx_qwen35.engine.scheduler import Load, Scheduler
from mlx_qwen35.errors import ArgumentError, BusyError, EngineClosedError
from mlx_qwen35.machine.gpu import wired
from mlx_qwen35.request import check_options
from mlx_qwen35.session.store import DISK_BYTES, Store
from mlx_qwen35.vision.features import FeatureStore

if TYPE_CHECKING:
    from mlx_qwen35.engine.request import Request
    from mlx_qwen35.engine.row import Row
    from mlx_qwen35.model import Model
    from mlx_qwen35.processor import Processor, Prompt

# What `submit` takes: options of `generation.stream_generate`, but for those that belong to one caller's thread.
OPTIONS = (
    "images", "videos", "fps", "max_pixels", "fetch", "system", "tools", "enable_thinking", "reasoning_effort",
    "preserve_thinking", "chat_template_kwargs", "allow_control_tokens", "continue_final_message", "max_tokens",
    "thinking_budget", "response_format", "tool_choice", "strict", "n", "logprobs", "top_logprobs", "sampling", "stop",
    "session", "context_length", "mtp", "draft_model", "num_draft_tokens", "on_progress", "deadline", "priority",
)  # fmt: skip


class Engine:
    """Answers many requests at once, each as if it were alone. A context manager: its end closes it.

    While it is open the model is its own: nothing else computes with it. What prompts have in common is computed once.
    """

    def __init__(
        self,
        model: Model,
        processor: Processor,
        *,
        most_rows: int = 8,
        most_waiting: int | None = None,
        memory: int | str | None = None,
        cache_bytes: int | None = None,
        cache_dir: str | Path | None = None,
        most_disk_bytes: int = DISK_BYTES,
        pause: float = 0.5,
    ) -> None:
        """most_rows: requests that are computed at once; most_waiting: that may wait beside them (None: any number).

        memory: all that this process may take, as `load` has it; None: half of what is left for caches. cache_bytes:
        of caches and what is kept of them, in its place. cache_dir: a folder in which what was computed outlasts the
        process, up to most_disk_bytes. pause: seconds of prompts for each second of others' steps: how much slower a
        running answer may become while a prompt comes in.
        """
        checks.model_and_processor("Engine", model, processor)
        checks.whole("most_rows", most_rows, 1)
        checks.whole("most_waiting", most_waiting, 0, otherwise="for any number")
        checks.whole("cache_bytes", cache_bytes, 0, otherwise="for what memory= leaves")
        checks.number("pause", pause)
        if cache_bytes is not None and memory is not None:
            raise ArgumentError("cache_bytes and memory both say how much caches may take: give one of them")
        self._model, self._processor = model, processor
        self._most_rows, self._most_waiting = most_rows, most_waiting
        per_token, per_row = bytes_of_rows(model)
        self._scheduler = Scheduler(
            most_rows=most_rows,
            cache_bytes=room(model, memory) if cache_bytes is None else cache_bytes,
            bytes_per_token=per_token,
            bytes_per_row=per_row,
            pause=pause,
            chunk=model.prefill_chunk,
        )
        mx.eval(model.parameters())  # here, if they are not: another thread has other streams
        self._features = FeatureStore()
        self._incoming: deque[tuple[Request, Channel]] = deque()
        self._rows: dict[Row, Channel] = {}  # the thread's own
        self._open = 0  # answers that have not ended
        self._closing = False
        self._failed: BaseException | None = None
        self._changed = threading.Condition()
        self._store_options = {
            "most_bytes": self._scheduler.cache_bytes,
            "directory": cache_dir,
            "most_disk_bytes": most_disk_bytes,
        }
        self._store = Store(model, processor, **self._store_options)
        self._loop = Loop(model, store=self._store, scheduler=self._scheduler)
        self._thread = threading.Thread(target=self._work, name="mlx-qwen35 engine", daemon=True)
        self._thread.start()

    def submit(
        self,
        prompt: str | Sequence[Mapping[str, Any]] | Sequence[int] | Prompt,
        **options: Any,
    ) -> Answer:
        """A prompt to answer; from any thread. options: those of `stream_generate`, but cache, covered, features,
        chunk_size, boundaries and cancel; and priority, a whole number: higher goes first (0).

        Returns at once; the prompt is read here (pictures too), which takes its time on this thread. Raises PromptError
        and ArgumentError as there, BusyError where too many are waiting, BudgetError where its cache would never fit,
        EngineClosedError after `close`.
        """
        check_options(options, "submit", names=OPTIONS)
        given = {"features": self._features} | options
        first = requests.read(self._model, self._processor, prompt, given)
        wanted = requests.flattened(first)
        length = len(first.prompt.tokens)
        self._scheduler.check(Load(prompt_tokens=length, most_tokens=length + first.limit))
        channel = Channel(length, len(wanted), self._thread.ident)
        for each in wanted:
            each.cancelled = lambda: channel.cancelled
            each.on_progress = each.on_progress and _guarded(each.on_progress)
        with self._changed:
            if self._closing:
                raise EngineClosedError("the engine is closed; make a new one") from self._failed
            self._check_waiting(len(wanted))
            self._open += len(wanted)
            self._incoming.extend((each, channel) for each in wanted)
            self._changed.notify_all()
        return Answer(channel)

    def _check_waiting(self, more: int) -> None:
        if self._most_waiting is None:
            return
        most = self._most_rows + self._most_waiting
        if self._open + more > most:
            waiting = max(0, self._open - self._most_rows)
            raise BusyError(
                f"{min(self._open, self._most_rows)} requests are running and {waiting} are waiting; at most "
                f"{self._most_waiting} may wait: try again when one has ended, or allow more to wait"
            )

    @property
    def computed_tokens(self) -> int:
        """Tokens of prompts that were computed so far, of all requests."""
        return self._loop.computed_tokens

    @property
    def running(self) -> int:
        """Requests that have not ended, those that wait included."""
        return self._open

    @property
    def cache_bytes(self) -> int | None:
        """What caches and what is kept of them may take together."""
        return self._scheduler.cache_bytes

    def close(self) -> None:
        """Ends what runs, each with a part whose finish_reason is "cancelled", and gives all memory back. Waits until
        what was to be written is."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _work(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._incoming or self._closing)
                    if self._closing:
                        break
                with self._in_place():
                    self._answer()
        except BaseException as error:  # nobody else would see it
            self._failed = error
        finally:
            self._finish()

    def _answer(self) -> None:
        """Until all that was submitted has ended."""
        while not self._closing:
            self._take_in()
            if not self._rows:
                return
            try:
                self._loop.turn()
            except Exception as error:  # of no row alone
                for row in list(self._rows):
                    row.fail(error)
            self._hand_out()

    def _take_in(self) -> None:
        with self._changed:
            incoming, self._incoming = list(self._incoming), deque()
        for request, channel in incoming:
            try:
                self._rows[self._loop.add(request)] = channel
            except Exception as error:
                self._end(channel, error)

    def _hand_out(self) -> None:
        for row, channel in list(self._rows.items()):
            try:
                while row.ready:
                    part = row.take()
                    if part.finish_reason:  # first: who reads of the end may submit the next at once
                        del self._rows[row]
                        self._end()
                    channel.put(replace(part, logprobs=None))  # which only this thread could read
            except BaseException as error:  # another interrupt than an error, too: the reader waits for it
                self._lose(row, error)

    def _lose(self, row: Row, error: BaseException) -> None:
        channel = self._rows.pop(row, None)
        try:
            self._loop.leave(row)
        finally:
            if channel is not None:
                self._end(channel, error)

    def _end(self, channel: Channel | None = None, error: BaseException | None = None) -> None:
        with self._changed:
            self._open -= 1
        if channel is not None:
            channel.fail(error)

    def _finish(self) -> None:
        with self._changed:
            self._closing = True
        self._take_in()
        for row in list(self._rows):
            if self._failed is not None:
                row.fail(self._failed)
            elif not row.ready:
                row.end("cancelled")
        self._hand_out()
        for row in list(self._rows):
            self._lose(row, EngineClosedError("the engine was closed before the answer had ended"))
        self._loop.close()
        self._store.clear()
        self._store.close()

    def _in_place(self) -> Any:
        return wired() if self._model.expert_stats is None else nullcontext()  # streamed experts have their own limit


def _guarded(on_progress: Callable[[int, int], None]) -> Callable[[int, int], None]:
    """What a caller's function raises ends its own answer, and neither the thread nor, unseen, an iteration."""

    def told(done: int, total: int) -> None:
        try:
            on_progress(done, total)
        except BaseException as error:
            if isinstance(error, Exception) and not isinstance(error, (StopIteration, StopAsyncIteration)):
                raise
            raise RuntimeError(f"on_progress raised {type(error).__name__}") from error

    return told
