"""The engine: requests from any thread, which a thread of its own answers.

Knows the arguments, and what is refused at once. Knows nothing of how answers are made.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlx_qwen35 import checks
from mlx_qwen35.engine import request as requests
from mlx_qwen35.engine.allowed import check_options
from mlx_qwen35.engine.answer import Answer, Channel
from mlx_qwen35.engine.options import SubmitOptions, names_of
from mlx_qwen35.engine.room import bytes_of_rows, room
from mlx_qwen35.engine.scheduler import Load, Scheduler
from mlx_qwen35.engine.worker import Worker
from mlx_qwen35.errors import ArgumentError
from mlx_qwen35.session.store import DISK_BYTES, Store
from mlx_qwen35.vision.features import MOST_BYTES, FeatureStore

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from mlx_qwen35.model import Model
    from mlx_qwen35.processor import Processor, Prompt

OPTIONS = names_of(SubmitOptions)  # of `generation.stream_generate`, but for those of one caller's thread
_PICTURES = 8  # one part in so many of the bytes for caches may be features of pictures


class Engine:
    """Answers many requests at once, each as if it were alone. A context manager: its end closes it.

    While it is open the model is its own: nothing else computes with it. What prompts have in common is computed once.
    One that is lost without being closed, with all its answers, ends by itself, and so do all when the process does.
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
        pause: float = 0.45,
    ) -> None:
        """most_rows: requests that are computed at once; most_waiting: that may wait beside them (None: any number).

        memory: all that this process may take, as `load` has it; None: half of what is left for caches. cache_bytes:
        of caches and what is kept of them, in its place. cache_dir: a folder in which what was computed outlasts the
        process, up to most_disk_bytes. pause: seconds of prompts for each second of others' steps: how much slower a
        running answer may become while a prompt comes in (more where more prompts wait than answers run).
        """
        checks.model_and_processor("Engine", model, processor)
        checks.whole("most_rows", most_rows, 1)
        checks.whole("most_waiting", most_waiting, 0, otherwise="for any number")
        checks.whole("cache_bytes", cache_bytes, 0, otherwise="for what memory= leaves")
        checks.path("cache_dir", cache_dir, optional=True)
        checks.number("pause", pause)
        if cache_bytes is not None and memory is not None:
            raise ArgumentError("cache_bytes and memory both say how much caches may take: give one of them")
        self._model, self._processor = model, processor
        per_token, per_row = bytes_of_rows(model)
        self._scheduler = Scheduler(
            most_rows=most_rows,
            cache_bytes=room(model, memory) if cache_bytes is None else cache_bytes,
            bytes_per_token=per_token,
            bytes_per_row=per_row,
            pause=pause,
            chunk=model.prefill_chunk,
            together_chunk=model.together_chunk,
        )
        mx.eval(model.parameters())  # here, if they are not: another thread has other streams
        self._features = FeatureStore(most_bytes=min(MOST_BYTES, self._scheduler.cache_bytes // _PICTURES))
        store = Store(
            model,
            processor,
            most_bytes=self._scheduler.cache_bytes,
            directory=cache_dir,
            most_disk_bytes=most_disk_bytes,
        )
        self._worker = Worker(model, store, self._scheduler, self._features, most_waiting)
        weakref.finalize(self, self._worker.stop).atexit = False

    def submit(
        self,
        prompt: str | Sequence[Mapping[str, Any]] | Sequence[int] | Prompt,
        **options: Unpack[SubmitOptions],
    ) -> Answer:
        """A prompt to answer; from any thread. options: those of `stream_generate`, but cache, covered, features,
        chunk_size, boundaries and cancel; and priority, a whole number: higher goes first (0).

        Returns at once; the prompt is read here (pictures too), which takes its time on this thread. Raises PromptError
        and ArgumentError as there, BusyError where too many are waiting, BudgetError where its cache would never fit,
        EngineClosedError after `close`.
        """
        check_options(options, "submit", names=OPTIONS)
        with self.expecting():
            return self._submit(prompt, options)

    def expecting(self) -> AbstractContextManager[None]:
        """Inside, something is about to be submitted: where nobody runs, who came before waits some milliseconds for
        it, so that their prompts are read together. `submit` says so by itself; who reads a request first may, too."""
        return self._worker.expecting()

    def _submit(self, prompt: Any, options: Mapping[str, Any]) -> Answer:
        given = {"features": self._features} | options
        first = requests.read(self._model, self._processor, prompt, given)
        wanted = requests.flattened(first)
        length = len(first.prompt.tokens)
        self._scheduler.check(Load(prompt_tokens=length, most_tokens=length + first.limit))
        channel = Channel(length, len(wanted), self._worker.ident)
        worker = self._worker
        for each in wanted:
            each.cancelled = lambda: channel.wish.cancelled or worker.closing
            each.on_progress = each.on_progress and _guarded(each.on_progress)
        self._worker.put(wanted, channel)
        return Answer(channel, self)

    @property
    def computed_tokens(self) -> int:
        """Tokens of prompts that were computed so far, of all requests."""
        return self._worker.loop.computed_tokens

    @property
    def running(self) -> int:
        """Requests that have not ended, those that wait included."""
        return self._worker.open

    @property
    def cache_bytes(self) -> int | None:
        """What caches, what is kept of them and features of pictures may take together."""
        return self._scheduler.cache_bytes

    @property
    def held_bytes(self) -> int:
        """What caches, what is kept of them and features of pictures took after the last turn."""
        return self._worker.loop.held_bytes

    def close(self) -> None:
        """Ends what runs, each with a part whose finish_reason is "cancelled", and gives all memory back. Waits until
        what was to be written is."""
        self._worker.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


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
