"""From a prompt to streamed parts: prefill, decode one step ahead, stop, and a cache that is exact whenever it ends.

Only this, decoding.py and speculative/ evaluate (and a streamed expert bank). Knows when things are computed and which
tokens the cache covers. Knows nothing of the layers, of templates or of what is done with the parts.

Whenever the work ends (end of turn, stop string, length, cancelled, closed, interrupted, an error), the cache covers
the prompt and exactly the tokens that were handed out: a step that was queued ahead and not handed out is undone.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlx_qwen35 import speculative
from mlx_qwen35.decoding import decode
from mlx_qwen35.errors import ArgumentError
from mlx_qwen35.machine.gpu import wired
from mlx_qwen35.parts import Clock, Completion, Part, Row, statistics
from mlx_qwen35.request import PromptOptions, Request, check_covered, checked, one_each, read_drafting, read_prompt
from mlx_qwen35.vision.sight import Sight

if TYPE_CHECKING:
    from mlx_qwen35.cache import Cache
    from mlx_qwen35.model import Model
    from mlx_qwen35.mtp import MTPHead
    from mlx_qwen35.processor import Processor, Prompt
    from mlx_qwen35.sampling import Sampling
    from mlx_qwen35.session import Session
    from mlx_qwen35.vision.media import Media

__all__ = ["Completion", "Part", "decode", "generate", "generate_batch", "prefill", "statistics", "stream_generate"]

Cancel = Any  # a callable () -> bool, anything with is_set() (threading.Event), or None


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
    chunk_size = model.prefill_chunk if chunk_size is None else chunk_size
    if chunk_size < 1:
        raise ArgumentError(f"chunk_size is {chunk_size}; it must be 1 or more")
    tokens = mx.array(tokens)
    tokens = tokens[None] if tokens.ndim == 1 else tokens
    check_covered(covered, tokens.shape[1], cache)
    total = tokens.shape[1] - covered
    cancelled = _cancel_check(cancel)
    ends = sorted({*range(chunk_size, total, chunk_size), *(b for b in boundaries if 0 < b < total), total})
    done, logits = 0, None
    cache.reserve(cache.offset + total)
    if on_progress:
        on_progress(0, total)
    if cancelled():
        return None
    if media and not isinstance(media, Sight):
        media = model.see(tokens, media, cache, known=features, covered=covered)
    tokens = tokens[:, covered:]
    for end in ends:
        if cancelled():
            return None
        before = cache.snapshot()
        try:
            part, sight = tokens[:, done:end], media[done:end]
            hidden = model.hidden(part, cache, sight, more=end < total)  # [B, chunk, H]
            if cache.draft is not None:
                cache.draft.prime(part, hidden, sight.positions if sight else None)
            if end == total:
                logits = model.head(hidden[:, -1:])[:, -1]  # [B, V]
                mx.eval(logits)
            mx.eval(cache.arrays())
        except BaseException:
            cache.restore(before)
            raise
        mx.clear_cache()
        done = end
        if on_progress:
            on_progress(done, total)
    return logits


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
    tools: Sequence[Mapping[str, Any]] = (),
    enable_thinking: bool | None = None,
    reasoning_effort: str | None = None,
    preserve_thinking: bool | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    allow_control_tokens: bool = False,
    max_tokens: int | None = None,
    thinking_budget: int | None = None,
    sampling: Sampling | None = None,
    stop: str | Iterable[str] = (),
    session: Session | None = None,
    cache: Cache | None = None,
    covered: int = 0,
    features: MutableMapping[str, mx.array] | None = None,
    context_length: int | None = None,
    mtp: bool | None = None,
    draft_model: MTPHead | Model | None = None,
    num_draft_tokens: int | None = None,
    chunk_size: int | None = None,
    boundaries: Iterable[int] = (),
    on_progress: Callable[[int, int], None] | None = None,
    cancel: Cancel = None,
) -> Generator[Part, None, None]:
    """The answer to `prompt`, one Part a token, while it is generated.

    prompt: a text (one user message), a list of messages, token ids, or a Prompt.
    images, videos, fps, max_pixels, fetch: what it shows, and how that is read; see `Processor.prompt`.
    system, tools, enable_thinking, reasoning_effort, preserve_thinking, chat_template_kwargs, allow_control_tokens:
    what the template is told; see there, too.
    max_tokens: None goes on until the context is full. sampling: None takes what generation_config.json says.
    thinking_budget: after so many tokens of reasoning it is closed: a sentence that says so, </think> and a blank line
    come as tokens of the answer, and the answer proper follows. 0: it is closed before it begins. None: no budget.
    session: what was computed before. The prompt is all of it; the part that begins as an earlier one is not computed
    again. cache and covered are its own then. It makes one answer at a time: SessionError while another stream of it is
    neither read to its end nor closed.
    cache: continued; the prompt is what comes after the tokens it holds, and afterwards it covers prompt and answer.
    covered: not 0: the prompt is all of it instead, and the cache holds its first `covered` tokens, which need not be
    computed again; a repetition penalty knows them then.
    features: a FeatureStore, or any other mapping by Media.key, of pictures and videos that were encoded before.
    context_length: the most tokens that cache, prompt and answer may have together; None: what was said at loading.
    mtp: whether the model's own MTP head drafts (`load(..., mtp=True)`); None: if it was loaded. draft_model: another
    head, or a small model with the same vocabulary, that drafts in its place. num_draft_tokens: at most so many tokens
    are drafted at a time, 1 to 4 (None: 3); fewer, or none, where that is faster by what was measured so far, unless
    the sampling has a seed. Drafts change how fast tokens come, not which (greedy) or how they are distributed.
    on_progress(done, total), boundaries: see `prefill`. cancel: a callable or threading.Event, looked at between chunks
    and tokens; a cancelled answer ends with a Part whose finish_reason is "cancelled".

    Raises PromptError, before anything is computed, for a prompt that is empty, shows what cannot be read or seen, or
    leaves no room in the context.
    """
    options = PromptOptions.of(locals())
    if session is not None and (cache is not None or covered):
        raise ArgumentError("a session has a cache of its own, and knows what it covers: give it alone")
    if session is not None and session.model is not model:
        raise ArgumentError("the session is another model's: give the model that it was made with (session.model)")
    prompt = read_prompt(processor, prompt, images, videos, options)
    cache = model.make_cache() if cache is None else cache
    check_covered(covered, len(prompt.tokens), cache)
    if prompt.media:
        model.placement([prompt.tokens], [prompt.media], cache, covered=covered)
    asked = Request.made(
        model,
        processor,
        [prompt],
        held=cache.offset - covered,
        context_length=context_length,
        max_tokens=max_tokens,
        thinking_budget=thinking_budget,
        sampling=sampling,
        tools=options.tools,
        stop=stop,
    )
    asked.drafting = read_drafting(model, asked.sampler.sampling, mtp, draft_model, num_draft_tokens)
    prefilling = {"chunk_size": chunk_size, "boundaries": tuple(boundaries), "on_progress": on_progress}
    if session is not None:
        return _in_place(model, _stream_in_session(session, model, prompt, features, asked, prefilling, cancel))
    return _in_place(model, _stream(model, cache, prompt, covered, features, asked, prefilling, cancel))


def _in_place(model: Model, parts: Generator[Part, None, None]) -> Generator[Part, None, None]:
    """The same parts; while they come macOS keeps a resident model's weights where they are."""
    with _kept_in_place(model):
        yield from parts


def _kept_in_place(model: Model) -> AbstractContextManager[None]:
    return wired() if model.expert_stats is None else nullcontext()  # streamed experts have a limit of their own


def _stream_in_session(
    session: Session,
    model: Model,
    prompt: Prompt,
    features: MutableMapping[str, mx.array] | None,
    asked: Request,
    prefilling: dict[str, Any],
    cancel: Cancel,
) -> Generator[Part, None, None]:
    """As `_stream`; the session knows afterwards what its cache covers, and has taken snapshots on the way."""
    with session.answering():
        covered = session.go_on(prompt)
        show, chunk = prefilling["on_progress"], prefilling["chunk_size"] or model.prefill_chunk
        answered: list[int] = []

        def on_progress(done: int, total: int) -> None:
            session.reached(chunk)
            if show:
                show(done, total)

        ends = [*prefilling["boundaries"], *(place - covered for place in session.meetings)]
        prefilling = {**prefilling, "boundaries": ends, "on_progress": on_progress}
        try:
            with closing(_stream(model, session.cache, prompt, covered, features, asked, prefilling, cancel)) as parts:
                for part in parts:
                    if part.token is not None:
                        answered.append(part.token)
                        # A round of drafts may have brought the cache further than what was handed out.
                        if session.cache.offset == len(prompt.tokens) + len(answered):
                            session.reached(1 if asked.drafting is None else asked.drafting.most + 1)
                    yield part
        finally:
            session.settle([*prompt.tokens, *answered])


def _stream(
    model: Model,
    cache: Cache,
    prompt: Prompt,
    covered: int,
    features: MutableMapping[str, mx.array] | None,
    asked: Request,
    prefilling: dict[str, Any],
    cancel: Cancel,
) -> Generator[Part, None, None]:
    cancelled = _cancel_check(cancel)
    (answer,) = asked.answers
    clock = Clock(cache.offset, lambda: model.expert_stats)
    cache.draft = drafter = None if asked.drafting is None else asked.drafting.drafter(model, cache)
    seeing = {"media": prompt.media, "features": features, "covered": covered}
    logits = prefill(model, prompt.tokens, cache, cancel=cancel, **seeing, **prefilling)
    clock.prompt_done(cache.offset)
    ending = None  # where the cache has to be if all ends now; None: where it is
    try:
        if logits is not None and not cancelled():
            drawing = {"max_tokens": asked.limit} | ({} if drafter is None else {"drafter": drafter})
            draw = decode if drafter is None else speculative.decode
            for step in draw(model, cache, logits, asked.sampler, asked.history, **drawing):
                ending = step.before
                token = step.tokens[0]
                clock.token(drafted=step.drafted, from_draft=step.from_draft)
                full = clock.generated == asked.limit
                text, events, ended = answer.add(token, last=full)
                reason = "stop" if ended else "length" if full else None
                part = clock.part(text, events, token, step.logprobs[0], reason, from_draft=step.from_draft)
                ending = step.after
                yield part
                if reason:
                    return
                if cancelled():
                    break
            else:
                yield clock.part(*answer.finish(), None, None, "length")  # max_tokens 0: only the prompt
                return
    finally:
        if ending is not None:
            cache.restore(ending)
            mx.eval(cache.arrays())
        cache.detach()
    yield clock.part(*answer.finish(), None, None, "cancelled")


@checked(options_of=stream_generate)
def generate(
    model: Model,
    processor: Processor,
    prompt: str | Sequence[Mapping[str, Any]] | Sequence[int] | Prompt,
    *,
    content_only: bool = False,
    verbose: bool = False,
    **options: Any,
) -> str:
    """The whole answer as the model wrote it, reasoning and tool calls included, as mlx-lm returns it.

    content_only: without reasoning and tool calls. verbose: show the answer as it comes, and the statistics.
    options: those of `stream_generate`.
    """
    pieces, part, screen = [], None, None
    if verbose:
        from mlx_qwen35.screen import Screen

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
    tools: Sequence[Mapping[str, Any]] = (),
    enable_thinking: bool | None = None,
    reasoning_effort: str | None = None,
    preserve_thinking: bool | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    allow_control_tokens: bool = False,
    max_tokens: int | None = None,
    thinking_budget: int | None = None,
    sampling: Sampling | None = None,
    stop: str | Iterable[str] = (),
    context_length: int | None = None,
    chunk_size: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    cancel: Cancel = None,
) -> list[Completion]:
    """The answers to several prompts, computed side by side (shorter prompts are padded on the left).

    images, videos: one list a prompt. The other options as in `stream_generate`. A row that has ended waits for the
    others; the longest decides about the context.
    """
    options = PromptOptions.of(locals())
    shown = zip(one_each(images, "images", len(prompts)), one_each(videos, "videos", len(prompts)), strict=True)
    if len(prompts) == 0:
        return []
    read = [read_prompt(processor, prompt, *media, options) for prompt, media in zip(prompts, shown, strict=True)]
    for prompt in read:
        if prompt.media:
            model.placement([prompt.tokens], [prompt.media])
    asked = Request.made(
        model,
        processor,
        read,
        context_length=context_length,
        max_tokens=max_tokens,
        thinking_budget=thinking_budget,
        sampling=sampling,
        tools=options.tools,
        stop=stop,
    )
    rows = [Row(answer, len(prompt.tokens)) for answer, prompt in zip(asked.answers, read, strict=True)]

    longest = max(len(prompt.tokens) for prompt in read)
    padding = [longest - len(prompt.tokens) for prompt in read]
    tokens = [[0] * pad + list(prompt.tokens) for pad, prompt in zip(padding, read, strict=True)]
    cache = model.make_cache(len(read), left_padding=padding if any(padding) else None)
    media = [prompt.media for prompt in read] if any(prompt.media for prompt in read) else ()
    prefilling = {"chunk_size": chunk_size, "on_progress": on_progress, "cancel": cancel}
    cancelled = _cancel_check(cancel)
    with _kept_in_place(model):
        logits = prefill(model, tokens, cache, media=media, **prefilling)
        if logits is not None and not cancelled():
            for step in decode(model, cache, logits, asked.sampler, asked.history, max_tokens=asked.limit):
                for row, token in zip(rows, step.tokens, strict=True):
                    row.add(token, asked.limit)
                if all(row.reason for row in rows) or cancelled():
                    break
    return [row.completion("cancelled" if asked.limit else "length") for row in rows]


def _cancel_check(cancel: Cancel) -> Callable[[], bool]:
    if cancel is None:
        return lambda: False
    return cancel.is_set if hasattr(cancel, "is_set") else cancel
