"""What is asked for one prompt, in groups: its form, who drafts, what was computed, how it goes.

Knows the options of `stream_generate` by these names, and which exclude one another. Their values were checked.
PromptOptions (allowed.py) and Sampling are two more such groups. Computes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, TypeVar

from mlx_qwen35.errors import ArgumentError

if TYPE_CHECKING:
    import mlx.core as mx

    from mlx_qwen35.blocks.drafter import BlockDraftModel
    from mlx_qwen35.cache import Cache
    from mlx_qwen35.engine.options import Cancel
    from mlx_qwen35.grammar import Grammar
    from mlx_qwen35.model import Model
    from mlx_qwen35.model.mtp import MTPHead
    from mlx_qwen35.processor import Processor
    from mlx_qwen35.session import Session
    from mlx_qwen35.session.store import Store

_Self = TypeVar("_Self", bound="_Group")


@dataclass(frozen=True)
class _Group:
    """Options that belong together."""

    @classmethod
    def of(cls: type[_Self], given: Mapping[str, Any]) -> _Self:
        """Those among options by name; None, and what is not among them, is as here."""
        names = [spec.name for spec in fields(cls)]
        return cls(**{name: given[name] for name in names if given.get(name) is not None})


@dataclass(frozen=True)
class Form(_Group):
    """What form the answer is to have."""

    response_format: Any = None
    tool_choice: str | Mapping[str, Any] | None = None
    strict: bool | None = None

    def grammar(self, processor: Processor, tools: Sequence[Mapping[str, Any]]) -> Grammar | None:
        """None: it may have any."""
        asked = {spec.name: value for spec in fields(self) if (value := getattr(self, spec.name)) is not None}
        if not asked:
            return None
        from mlx_qwen35.grammar import Grammar  # which takes a moment to load

        return Grammar.of(processor, tools=tools, **asked)


@dataclass(frozen=True)
class Drafters(_Group):
    """Who drafts tokens, and how many at a time."""

    mtp: bool | None = None
    draft_model: BlockDraftModel | MTPHead | Model | None = None
    num_draft_tokens: int | None = None
    lookup: bool | None = None


@dataclass(frozen=True)
class Computed(_Group):
    """What was computed before, and is gone on with."""

    session: Session | None = None
    store: Store | None = None
    cache: Cache | None = None
    covered: int = 0
    features: MutableMapping[str, mx.array] | None = None

    @property
    def offset(self) -> int:
        return 0 if self.cache is None else self.cache.offset

    def check(self, model: Model, answers: int) -> None:
        """Raises ArgumentError where one excludes another, so many answers, or the model."""
        if self.cache is not None and self.store is not None:
            raise ArgumentError("a given cache is continued as it is: give it or a store, not both")
        if self.store is not None and self.store.model is not model:
            raise ArgumentError("the store is another model's: give the model that it was made with")
        if self.session is not None and (self.cache is not None or self.covered):
            raise ArgumentError("a session has a cache of its own, and knows what it covers: give it alone")
        if self.session is not None and self.session.model is not model:
            raise ArgumentError(
                "the session is another model's: give the model that it was made with (session.model)"
            )
        if answers > 1 and (self.session is not None or self.cache is not None):
            raise ArgumentError(
                f"n is {answers}, and a session or cache goes on with one answer: leave one of them out"
            )


@dataclass(frozen=True)
class Course(_Group):
    """How the prompt is read and the answer written: how far, in what pieces, and what is told of it."""

    max_tokens: int | None = None
    thinking_budget: int | None = None
    context_length: int | None = None
    stop: str | Iterable[str] = ()
    n: int = 1
    logprobs: bool = False
    top_logprobs: int = 0
    call_pieces: bool = False
    chunk_size: int | None = None
    boundaries: Iterable[int] = ()
    on_progress: Callable[[int, int], None] | None = None
    cancel: Cancel = None
    deadline: float | None = None
    priority: int = 0

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def context(self, processor: Processor) -> int:
        """Tokens that prompt and answer may have together."""
        most = processor.context_length
        if self.context_length is not None and self.context_length > most:
            raise ArgumentError(
                f"context_length is {self.context_length}, and the model was loaded for {most}: give as much or less, "
                "or load it with a larger one"
            )
        return self.context_length or most
