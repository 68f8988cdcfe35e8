"""One model in memory, with the engine that answers from it.

Knows how a model is loaded and given back, and how prompts of an Ask are read. Knows nothing of others beside it, of
requests or of HTTP. What takes time is to be called on a thread of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from mlx_qwen35 import library
from mlx_qwen35.engine.allowed import PromptOptions, read_prompt
from mlx_qwen35.engine.engine import Engine
from mlx_qwen35.errors import LengthError
from mlx_qwen35.library.plan import shown_size
from mlx_qwen35.sampling import Sampling

if TYPE_CHECKING:
    from mlx_qwen35.engine.answer import Answer
    from mlx_qwen35.model import Model
    from mlx_qwen35.processor import Processor
    from mlx_qwen35.serving.exchange import Ask


class LoadingOptions(TypedDict, total=False):
    """Of `serve`, for type checkers: those of Loading that it has no argument of its own for."""

    kv_bits: int | None
    kv_group_size: int
    quantized_kv_start: int
    context_length: int | None
    yarn: bool
    dtype: str | None
    exact: bool
    kernels: bool
    warm_start: bool
    fetch: bool
    lookup: bool
    ranks: int | None
    plan: str | None


@dataclass(frozen=True)
class Loading:
    """How models are loaded, all alike. memory: the most that the process may take, all models together, as `load`
    has it. parallel: answers of a model that are computed at once; most_waiting: that may wait beside them. fetch:
    pictures may be read from http(s). lookup: as `stream_generate` has it. The others are arguments of `load` and of
    `Engine`."""

    memory: int | str | None = None
    parallel: int = 4
    most_waiting: int = 64
    cache_dir: str | Path | None = None
    mtp: bool = False
    lookup: bool = True
    kv_bits: int | None = None
    kv_group_size: int = 64
    quantized_kv_start: int = 0
    context_length: int | None = None
    yarn: bool = False
    dtype: str | None = None
    exact: bool = False
    kernels: bool = True
    warm_start: bool = True
    fetch: bool = False
    ranks: int | None = None
    plan: str | None = None

    @property
    def of_load(self) -> dict[str, Any]:
        """Arguments of `load`, but memory."""
        names = ("mtp", "kv_bits", "kv_group_size", "quantized_kv_start", "context_length", "yarn", "dtype", "exact")
        return {name: getattr(self, name) for name in (*names, "kernels", "warm_start", "ranks", "plan")}


class Loaded:
    """A model that answers. seconds: that loading took; since: when it was loaded, seconds since 1970; nbytes: of its
    weights in memory; reserved: bytes that it may take, caches included."""

    def __init__(
        self,
        folder: Path,
        how: Loading,
        memory: int | str | None,
        *,
        shares: bool = False,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """folder: of the checkpoint. memory: the most that the process may take with this model. shares: others may
        come beside it, and are left half of what caches could take. Raises what `load` and `Engine` raise."""
        import mlx.core as mx
        from mlx.utils import tree_flatten

        from mlx_qwen35.engine.room import room

        begun = time.monotonic()
        self.model: Model
        self.processor: Processor
        self.model, self.processor = library.load(folder, memory=memory, **how.of_load, on_progress=on_progress)
        try:
            mx.eval(self.model.parameters())
            self.nbytes = sum(array.nbytes for _, array in tree_flatten(self.model.parameters()))
            cache = room(self.model, memory)
            cache = cache // 2 if shares and memory is not None else cache
            self.engine = Engine(
                self.model,
                self.processor,
                most_rows=how.parallel,
                most_waiting=how.most_waiting,
                cache_bytes=cache,
                cache_dir=how.cache_dir,
            )
        except BaseException:
            self.model.unload()
            raise
        self.reserved = self.nbytes + cache
        self.since, self.seconds = time.time(), time.monotonic() - begun
        self._given = {"fetch": how.fetch, "lookup": how.lookup}

    @property
    def context_length(self) -> int:
        """Tokens of the longest conversation."""
        return self.processor.context_length

    def submit(self, ask: Ask, on_progress: Callable[[int, int], None] | None = None) -> Answer:
        """The prompt is read here, pictures too. on_progress: called on the engine's thread. Raises as
        `Engine.submit`."""
        options = dict(ask.options)
        sampling = Sampling.from_generation_config(self.processor.generation_config, **ask.sampling)
        return self.engine.submit(
            as_given(self.processor, ask), **options, **self._given, sampling=sampling, on_progress=on_progress
        )

    def close(self) -> None:
        """Ends what it answers, and gives its memory back."""
        self.engine.close()
        self.model.unload()

    def __str__(self) -> str:
        return f"{shown_size(self.nbytes)} in memory, {self.context_length:,} tokens of context"


def as_given(processor: Processor, ask: Ask) -> Any:
    """The prompt of an Ask as `Engine.submit` takes it: a plain text as ids, where control tokens count."""
    if ask.plain and isinstance(ask.prompt, str):
        return processor.tokenizer.encode(ask.prompt)
    return ask.prompt


def count(processor: Processor, ask: Ask, *, fetch: bool = False) -> int:
    """Tokens of the prompt of an Ask, also of one that is longer than the context. Raises PromptError."""
    options = PromptOptions.of({**ask.options, "fetch": fetch})
    images, videos = (ask.options.get(name) or () for name in ("images", "videos"))
    try:
        return len(read_prompt(processor, as_given(processor, ask), images, videos, options).tokens)
    except LengthError as error:
        return error.tokens
