"""The options of an answer by name, for functions that hand them on: `**options: Unpack[StreamOptions]`.

Knows names and types, so that `max_token=5` fails in a type checker. What they mean is said in
`generation.stream_generate`; their values are checked in request.py.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypedDict, TypeVar

if TYPE_CHECKING:
    import mlx.core as mx

    from mlx_qwen35.blocks.drafter import BlockDraftModel
    from mlx_qwen35.cache import Cache
    from mlx_qwen35.model import Model
    from mlx_qwen35.model.mtp import MTPHead
    from mlx_qwen35.sampling import Sampling
    from mlx_qwen35.session import Session
    from mlx_qwen35.session.store import Store


_Function = TypeVar("_Function", bound=Callable[..., Any])


class Flag(Protocol):
    """threading.Event and its like."""

    def is_set(self) -> bool: ...


Cancel = Callable[[], bool] | Flag | None


class _Shared(TypedDict, total=False):
    """Of every way to ask."""

    system: str | None
    tools: Sequence[Mapping[str, Any]] | None
    enable_thinking: bool | None
    reasoning_effort: str | None
    preserve_thinking: bool | None
    chat_template_kwargs: Mapping[str, Any] | None
    allow_control_tokens: bool
    fps: float | None
    max_pixels: int | None
    fetch: bool
    max_tokens: int | None
    thinking_budget: int | None
    response_format: Any
    tool_choice: str | Mapping[str, Any] | None
    strict: bool | None
    n: int
    logprobs: bool
    top_logprobs: int
    call_pieces: bool
    deadline: float | None
    sampling: Sampling | None
    stop: str | Iterable[str]
    context_length: int | None
    mtp: bool | None
    draft_model: BlockDraftModel | MTPHead | Model | None
    num_draft_tokens: int | None
    lookup: bool | None
    on_progress: Callable[[int, int], None] | None


class _OnePrompt(TypedDict, total=False):
    """Of what is asked once, and not of a conversation."""

    images: Sequence[Any]
    videos: Sequence[Any]
    continue_final_message: bool
    session: Session | None


class _OwnThread(TypedDict, total=False):
    """Of answers that are computed in the caller's thread."""

    store: Store | None
    chunk_size: int | None
    boundaries: Iterable[int]


class ChatOptions(_Shared, _OwnThread, total=False):
    """Of `Chat` and its answers: what a conversation does not give itself."""


class StreamOptions(_Shared, _OnePrompt, _OwnThread, total=False):
    """Of `stream_generate` and `generate`."""

    cache: Cache | None
    covered: int
    features: MutableMapping[str, mx.array] | None
    cancel: Cancel


class SubmitOptions(_Shared, _OnePrompt, total=False):
    """Of `Engine.submit`."""

    priority: int


def names_of(options: type[Any]) -> tuple[str, ...]:
    """The names of a TypedDict's options, in their order."""
    return tuple(options.__annotations__)


def spelled(like: Callable[..., Any], options: type[Any]) -> Callable[[_Function], _Function]:
    """A function whose `**options` are seen by name, with the defaults that they have in `like`, by whoever asks for
    its signature: `help`, and notebooks."""

    def decorate(function: _Function) -> _Function:
        own, theirs = inspect.signature(function), inspect.signature(like).parameters
        kept = [parameter for parameter in own.parameters.values() if parameter.kind is not parameter.VAR_KEYWORD]
        function.__signature__ = own.replace(parameters=[*kept, *(theirs[name] for name in names_of(options))])
        return function

    return decorate
