"""Prompts answered in the caller's thread: thin over the engine's loop.

Knows the arguments of each function, and which requests they make. Knows nothing of how tokens are computed.

Whenever an answer ends (end of turn, stop string, length, deadline, cancelled, closed, interrupted, an error), the
cache covers the prompt and exactly the tokens that were handed out.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlx_qwen35.engine import request as requests
from mlx_qwen35.engine.allowed import checked, limits_each, one_each
from mlx_qwen35.engine.collecting import Collected
from mlx_qwen35.engine.group import Group, Seat
from mlx_qwen35.engine.loop import Loop
from mlx_qwen35.engine.options import StreamOptions, spelled
from mlx_qwen35.engine.prefill import Prefill
from mlx_qwen35.engine.scheduler import Scheduler
from mlx_qwen35.machine.gpu import wired
from mlx_qwen35.session.store import Store, worth_sharing
from mlx_qwen35.speculative.step import Step
from mlx_qwen35.text.parts import Completion, Part, statistics

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from mlx_qwen35.blocks.drafter import BlockDraftModel
    from mlx_qwen35.cache import Cache
    from mlx_qwen35.engine.options import Cancel
    from mlx_qwen35.engine.request import Request
    from mlx_qwen35.model import Model
    from mlx_qwen35.model.mtp import MTPHead
    from mlx_qwen35.processor import Processor, Prompt
    from mlx_qwen35.sampling import History, Sampler, Sampling
    from mlx_qwen35.session import Session
    from mlx_qwen35.vision.media import Media
    from mlx_qwen35.vision.sight import Sight

__all__ = ["Completion", "Part", "decode", "generate", "generate_batch", "prefill", "statistics", "stream_generate"]


def prefill(
    model: Model,
    tokens: mx.array | Sequence[int],
    cache: Cache,
    *,
    media: Sequence[Media] | Sequence[Sequence[Media]] | Sight = (),
    features: MutableMapping[str, mx.array] | None = None,
    covered: int = 0,
    chunk_size: int | None = None,
    boundaries: Iterable[int] = (),
    on_progress: Callable[[int, int], None] | None = None,
    cancel: Cancel = None,
) -> mx.array | None:
    """Feeds a prompt to the cache, chunk by chunk. tokens: [T] or [B, T] -> logits of the last position [B, V].

    media: the images and videos whose placeholders are among the tokens, encoded before the first chunk. features: what
    was encoded before, by Media.key (a FeatureStore); what is encoded now is added.
    covered: the tokens are a whole prompt of which the cache holds the first `covered`; only the rest is fed. It may
    begin inside an image. A Sight, and all counts below, are of what is fed.
    chunk_size: tokens of a chunk; None is what the model says.
    boundaries: a chunk also ends after so many tokens (where `on_progress` may take a snapshot of the cache).
    on_progress(done, total) is called before the first chunk and after each, when the cache covers `done` more tokens.
    Cancelled between two chunks: None, and the cache keeps the chunks that are done. An error or interrupt inside a
    chunk leaves the cache as it was before that chunk. What follows the cache (`cache.draft`) is primed with every
    position.
    """
    cancelled, stops = requests.cancel_check(cancel), tuple(boundaries)
    reading = Prefill(
        model,
        tokens,
        cache,
        media=media,
        features=features,
        covered=covered,
        chunk_size=chunk_size,
        stops=lambda: stops,
        on_progress=on_progress,
    )
    reading.begin()
    while not cancelled():
        logits = reading.piece()
        if logits is not None:
            return logits
    return None


def decode(
    model: Model, cache: Cache, logits: mx.array, sampler: Sampler, history: History, *, max_tokens: int
) -> Generator[Step, None, None]:
    """Draws tokens from `logits` [1, V] on, at most `max_tokens`; each is computed while the one before is read.

    When a step is yielded, the cache covers its token (`step.before` is the state without it).
    """
    if max_tokens < 1:
        return
    group, seat = Group(model), Seat(cache, sampler, history)
    seat.draw_first(logits)
    group.change(joining=[seat])
    for number in range(1, max_tokens + 1):
        yield from group.step(drawing=number < max_tokens)


@checked()
def stream_generate(
    model: Model,
    processor: Processor,
    prompt: str | Sequence[Mapping[str, Any]] | Sequence[int] | Prompt,
    *,
    images: Sequence[Any] = (),
    videos: Sequence[Any] = (),
    fps: float | None = None,
    max_pixels: int | None = None,
    fetch: bool = False,
    system: str | None = None,
    tools: Sequence[Mapping[str, Any]] | None = (),
    enable_thinking: bool | None = None,
    reasoning_effort: str | None = None,
    preserve_thinking: bool | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    allow_control_tokens: bool = False,
    continue_final_message: bool = False,
    max_tokens: int | None = None,
    thinking_budget: int | None = None,
    response_format: Any = None,
    tool_choice: str | Mapping[str, Any] | None = None,
    strict: bool | None = None,
    n: int = 1,
    logprobs: bool = False,
    top_logprobs: int = 0,
    call_pieces: bool = False,
    deadline: float | None = None,
    sampling: Sampling | None = None,
    stop: str | Iterable[str] = (),
    session: Session | None = None,
    store: Store | None = None,
    cache: Cache | None = None,
    covered: int = 0,
    features: MutableMapping[str, mx.array] | None = None,
    context_length: int | None = None,
    mtp: bool | None = None,
    draft_model: BlockDraftModel | MTPHead | Model | None = None,
    num_draft_tokens: int | None = None,
    lookup: bool | None = None,
    chunk_size: int | None = None,
    boundaries: Iterable[int] = (),
    on_progress: Callable[[int, int], None] | None = None,
    cancel: Cancel = None,
) -> Generator[Part, None, None]:
    """The answer to `prompt`, one Part a token, while it is generated.

    prompt: a text (one user message), a list of messages, token ids, or a Prompt.
    images, videos, fps, max_pixels, fetch: what it shows, and how that is read; see `Processor.prompt`.
    system, tools, enable_thinking, reasoning_effort, preserve_thinking, chat_template_kwargs, allow_control_tokens:
    what the template is told; see there, too. continue_final_message: the last message is an assistant's, and the
    answer goes on with it; parts have what is new.
    max_tokens: None goes on until the context is full. sampling: None takes what generation_config.json says.
    thinking_budget: after so many tokens of reasoning it is closed: a sentence that says so, </think> and a blank line
    come as tokens of the answer, and the answer proper follows. 0: it is closed before it begins. None: no budget.
    response_format: the form of the answer: a JSON schema or pydantic model, "json", a compiled regular expression, or
    what OpenAI's API takes there; reasoning before it stays free. tool_choice: "auto", "none", "required" or the name
    of a tool; calls then fit the tools' schemas, as strict=True asks of those that the model makes by itself. See
    docs/FORMS.md.
    n: so many answers, one part of one or another at a time (`part.index` says of which); the prompt is computed once.
    An answer's seed is that of the sampling plus its index.
    logprobs, top_logprobs: parts have `logprob`, and so many of the likeliest tokens in `top_logprobs` (20, say).
    call_pieces: the arguments of calls are told while they are written, as far as they are certain (CallDelta).
    deadline: seconds, after which the answer ends where it is, with the finish_reason "deadline".
    session: what was computed before. The prompt is all of it; the part that begins as an earlier one is not computed
    again. cache and covered are its own then. It makes one answer at a time: SessionError while another stream of it is
    neither read to its end nor closed.
    store: what was computed for earlier prompts, in this process or in another (its directory=), is not computed again,
    and what is computed now joins it.
    cache: continued; the prompt is what comes after the tokens it holds, and afterwards it covers prompt and answer.
    covered: not 0: the prompt is all of it instead, and the cache holds its first `covered` tokens, which need not be
    computed again; a repetition penalty knows them then.
    features: a FeatureStore, or any other mapping by Media.key, of pictures and videos that were encoded before.
    context_length: the most tokens that cache, prompt and answer may have together; None: what was said at loading.
    mtp: whether the model's own MTP head drafts (`load(..., mtp=True)`); None: if it was loaded. draft_model: another
    head, a block drafter, or a small model with the same vocabulary, that drafts in its place. num_draft_tokens: at
    most so many tokens are drafted at a time, 1 to 4 (None: 3), or of a block drafter as many as a block has masks
    (None: as its config.json says, or 7); fewer, or none, where that is faster by what was measured so far, unless the
    sampling has a seed. lookup: copy what followed when the same words stood in prompt, answer or earlier answers,
    and what a form leaves no choice about, where that is faster (None: yes). Drafts change how fast tokens come, not
    which (greedy) or how they are distributed.
    on_progress(done, total), boundaries: see `prefill`. cancel: a callable or threading.Event, looked at between chunks
    and tokens; a cancelled answer ends with a Part whose finish_reason is "cancelled".

    Raises PromptError, before anything is computed, for a prompt that is empty, shows what cannot be read or seen, or
    leaves no room in the context.
    """
    request = requests.read(model, processor, prompt, locals())
    return _in_place(model, _stream(model, processor, request, store))


def _stream(
    model: Model, processor: Processor, request: Request, store: Store | None
) -> Generator[Part, None, None]:
    wanted = requests.flattened(request)
    with _loop(model, processor, wanted, store, most_rows=len(wanted)) as loop:
        rows = [loop.add(each) for each in wanted]
        while rows:
            for row in [row for row in rows if row.ready]:
                part = row.take()
                if part.finish_reason:
                    rows.remove(row)
                yield part
            if rows and not any(row.ready for row in rows):
                loop.turn()


@contextmanager
def _loop(
    model: Model, processor: Processor, wanted: Sequence[Request], store: Store | None, *, most_rows: int
) -> Generator[Loop]:
    """A loop for these requests alone: what their prompts share is computed once."""
    own = None
    if store is None and worth_sharing([each.prompt for each in wanted if each.cache is None]):
        store = own = Store(model, processor, most_bytes=model.snapshot_bytes)
    sizes = {"chunk": model.prefill_chunk, "together_chunk": model.together_chunk}
    scheduler = Scheduler(most_rows=most_rows, rows_first=True, **sizes)
    loop = Loop(model, store=store, scheduler=scheduler)
    try:
        yield loop
    finally:
        loop.close()
        if own is not None:
            own.close()


def _in_place(model: Model, parts: Generator[Part, None, None]) -> Generator[Part, None, None]:
    """The same parts; while they come macOS keeps a resident model's weights where they are."""
    with _kept_in_place(model):
        yield from parts


def _kept_in_place(model: Model) -> AbstractContextManager[None]:
    return wired() if model.expert_stats is None else nullcontext()  # streamed experts have a limit of their own


@spelled(stream_generate, StreamOptions)
@checked(options_of=stream_generate)
def generate(
    model: Model,
    processor: Processor,
    prompt: str | Sequence[Mapping[str, Any]] | Sequence[int] | Prompt,
    *,
    content_only: bool = False,
    verbose: bool = False,
    **options: Unpack[StreamOptions],
) -> str:
    """The whole answer as the model wrote it, reasoning and tool calls included, as mlx-lm returns it.

    content_only: without reasoning and tool calls. verbose: show the answer as it comes, and the statistics.
    options: those of `stream_generate`.
    """
    pieces, part, screen = [], None, None
    if verbose:
        from mlx_qwen35.text.screen import Screen

        screen = Screen()
    for part in stream_generate(model, processor, prompt, **options):
        pieces.append(part.content if content_only else part.text)
        if screen:
            screen.show(part)
    if screen:
        screen.end()
        print(f"{'=' * 10}\n{statistics(part)}")
    return "".join(pieces)


@checked()
def generate_batch(
    model: Model,
    processor: Processor,
    prompts: Sequence[str | Sequence[Mapping[str, Any]] | Sequence[int] | Prompt],
    *,
    images: Sequence[Sequence[Any]] = (),
    videos: Sequence[Sequence[Any]] = (),
    fps: float | None = None,
    max_pixels: int | None = None,
    fetch: bool = False,
    system: str | None = None,
    tools: Sequence[Mapping[str, Any]] | None = (),
    enable_thinking: bool | None = None,
    reasoning_effort: str | None = None,
    preserve_thinking: bool | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    allow_control_tokens: bool = False,
    continue_final_message: bool = False,
    max_tokens: int | None | Sequence[int | None] = None,
    thinking_budget: int | None = None,
    response_format: Any = None,
    tool_choice: str | Mapping[str, Any] | None = None,
    strict: bool | None = None,
    n: int = 1,
    logprobs: bool = False,
    top_logprobs: int = 0,
    deadline: float | None = None,
    sampling: Sampling | None = None,
    stop: str | Iterable[str] = (),
    context_length: int | None = None,
    mtp: bool | None = None,
    draft_model: BlockDraftModel | MTPHead | Model | None = None,
    num_draft_tokens: int | None = None,
    lookup: bool | None = None,
    store: Store | None = None,
    features: MutableMapping[str, mx.array] | None = None,
    chunk_size: int | None = None,
    most_rows: int = 8,
    on_progress: Callable[[int, int], None] | None = None,
    cancel: Cancel = None,
) -> list[Completion]:
    """The answers to any number of prompts, computed side by side: one that has ended makes room for the next prompt.

    images, videos: one list a prompt. max_tokens: one number, or a list with one a prompt. most_rows: how many go on
    together. n: so many answers to each prompt, which stand one after the other in the list. on_progress(done, total):
    tokens of all prompts. The other options as in `stream_generate`, each row's own: what a prompt has in common with
    another is computed once.
    """
    given = locals() | {"stop": (stop,) if isinstance(stop, str) else tuple(stop)}
    shown = zip(one_each(images, "images", len(prompts)), one_each(videos, "videos", len(prompts)), strict=True)
    progress = _Progress(on_progress)
    wanted: list[Request] = []
    limits = limits_each(max_tokens, len(prompts))
    for prompt, (own_images, own_videos), limit in zip(prompts, shown, limits, strict=True):
        own = {"images": own_images, "videos": own_videos, "max_tokens": limit, "on_progress": progress.of_one()}
        wanted += requests.flattened(requests.read(model, processor, prompt, given | own))
    answers = [Collected(len(request.prompt.tokens)) for request in wanted]
    with _kept_in_place(model), _loop(model, processor, wanted, store, most_rows=most_rows) as loop:
        rows = {loop.add(request): answer for request, answer in zip(wanted, answers, strict=True)}
        while rows:
            loop.turn()
            for row, answer in list(rows.items()):
                while row.ready:
                    answer.add(row.take())
                if answer.finish_reason:
                    del rows[row]
    return [answer.completion() for answer in answers]


class _Progress:
    """on_progress of all prompts together, by that of each."""

    def __init__(self, on_progress: Callable[[int, int], None] | None) -> None:
        self._on_progress, self._counts = on_progress, []

    def of_one(self) -> Callable[[int, int], None] | None:
        if self._on_progress is None:
            return None
        counts = [0, 0]
        self._counts.append(counts)

        def told(done: int, total: int) -> None:
            counts[:] = done, total
            self._on_progress(*(sum(each) for each in zip(*self._counts, strict=True)))

        return told
