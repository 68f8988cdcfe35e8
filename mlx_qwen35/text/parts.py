"""One answer as text: tokens in, parts out.

Knows how a token becomes characters, stop strings and the events of a reply, what a caller is told with each token, and
the counts and times of an answer. Knows nothing of the model, the cache or how tokens are made.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlx_qwen35.text.markdown import reply_markdown
from mlx_qwen35.text.reply import ContentDelta, Event, ReasoningDelta, ReplyParser, ToolCall
from mlx_qwen35.text.stop import StopStrings
from mlx_qwen35.text.tokenizer import Detokenizer

Told = tuple[float, tuple[tuple[int, float], ...]]  # a token's log probability, and the likeliest tokens with theirs

if TYPE_CHECKING:
    from mlx_qwen35.experts.pool import ExpertStats
    from mlx_qwen35.text.tokenizer import Tokenizer


class _Split:
    """The views of `events`: the same characters told apart."""

    events: tuple[Event, ...]

    @property
    def reasoning(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, ReasoningDelta))

    @property
    def content(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, ContentDelta))

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        return tuple(event for event in self.events if isinstance(event, ToolCall))


@dataclass(frozen=True)
class Part(_Split):
    """What one token adds to the answer. The last part of an answer, and only it, has a finish_reason.

    text: the new characters as the model wrote them, reasoning and tool calls included; "" while a character or a
        possible stop string is incomplete. Stop strings and the end-of-turn token never show.
    token: the token id; None in a last part that brings no token (cancelled, or max_tokens 0).
    logprobs: [V] log probabilities of the distribution `token` comes from, before temperature and truncation, one for
        each of the tokenizer's V tokens; lazy, to be read on the thread that generates. None where token is None.
    logprob: that of `token`; top_logprobs: the most probable tokens with theirs, falling, of equal ones the least id
        first. None and () unless they were asked for.
    events: the same characters split into ReasoningDelta, ContentDelta and ToolCall; `reasoning`, `content` and
        `tool_calls` are views of it, of this part alone. With call_pieces also CallDelta, before the ToolCall.
    prompt_tokens, prompt_tps: tokens computed before the first of the answer, and how many a second.
    cached_tokens: tokens that the cache held already; they are not among prompt_tokens.
    generation_tokens, generation_tps: tokens of the answer so far; those after the first, a second since the first.
    peak_memory: the most that MLX held in this process, in GB (10^9 bytes).
    finish_reason: "stop" (end of turn or stop string), "length" (max_tokens or context full), "deadline",
        "cancelled", or None.
    from_draft: whether the token had been drafted. drafted_tokens, accepted_tokens: how many were so far, and how many
    of those are in the answer; drafts: the same by who drafted them, (drafted, accepted) of "head" (an MTP head or a
    draft model), "copy" (of what was said before) and "grammar" (what a form forces). verified: "exact", if each
    drafted token had the bits that it has alone, or "fast"; "" where none was drafted.
    index: of the answer, where several to one prompt were asked for.
    stop_string: the one that ended the answer; None where none did.
    prompt_experts, experts: what streaming experts from the disk did while the prompt was read, and for the answer so
        far; None where all are in memory.
    """

    text: str
    token: int | None
    logprobs: mx.array | None = field(repr=False)
    events: tuple[Event, ...]
    prompt_tokens: int
    prompt_tps: float
    cached_tokens: int
    generation_tokens: int
    generation_tps: float
    peak_memory: float
    finish_reason: str | None = None
    from_draft: bool = False
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    drafts: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    verified: str = ""
    prompt_experts: ExpertStats | None = None
    experts: ExpertStats | None = None
    index: int = 0
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    stop_string: str | None = None


@dataclass(frozen=True)
class Completion(_Split):
    """A finished answer. `text` as in Part, all of it; `tokens` with the end-of-turn token if it came.

    prompt_tokens: of the whole prompt; cached_tokens: those of it that were not computed for this answer. logprobs,
    top_logprobs: of each token, where they were asked for. stop_string: as in Part.
    """

    text: str
    tokens: tuple[int, ...]
    events: tuple[Event, ...]
    prompt_tokens: int
    finish_reason: str
    cached_tokens: int = 0
    logprobs: tuple[float, ...] = ()
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] = ()
    stop_string: str | None = None

    def _repr_markdown_(self) -> str:
        return reply_markdown(self.reasoning, self.content, self.tool_calls)


class AnswerText:
    """Turns the tokens of one answer into visible text and events."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        eos_token_ids: Iterable[int],
        *,
        thinking: bool,
        tools: Sequence[Mapping[str, Any]] = (),
        stop: str | Iterable[str] = (),
        continued: str = "",
        call_pieces: bool = False,
    ) -> None:
        """continued: as Prompt has it; call_pieces: as ReplyParser has it."""
        self._eos = frozenset(eos_token_ids)
        self._characters = Detokenizer(tokenizer)
        self._stops = StopStrings(stop)
        how = {"continued": continued, "call_pieces": call_pieces}
        self._parser = ReplyParser(thinking=thinking, tools=list(tools) or None, **how)

    @property
    def stop_string(self) -> str | None:
        """The one that has come."""
        return self._stops.stop

    def add(self, token: int, *, last: bool = False) -> tuple[str, list[Event], bool]:
        """-> (new text, new events, whether the answer ends here: end of turn or stop string).

        `last`: nothing follows, whatever the token is; what was held back comes out.
        """
        if token in self._eos:
            return *self.finish(), True
        text, stopped = self._stops.feed(self._characters.add(token))
        events = self._parser.feed(text)
        if stopped or last:
            rest, final = self.finish(cut=not stopped)
            text, events = text + rest, [*events, *final]
        return text, events, stopped

    def finish(self, *, cut: bool = False) -> tuple[str, list[Event]]:
        """-> (text, events) of what was held back; cut: more would have followed"""
        text, _ = self._stops.feed(self._characters.finish())
        text += self._stops.finish()
        return text, [*self._parser.feed(text), *self._parser.finish(cut=cut)]


class Clock:
    """Counts and times of one answer, from now on; cached_tokens: what the cache holds now; experts: asked for what
    streaming has done since loading, None where nothing is streamed; verified: as Part has it."""

    def __init__(
        self, cached_tokens: int, experts: Callable[[], ExpertStats | None], *, verified: str = "fast"
    ) -> None:
        self._verified = verified
        self._drafts: dict[str, tuple[int, int]] = {}
        self._prompt_tokens = 0
        self._cached_tokens = cached_tokens
        self._start = time.perf_counter()
        self._first = self._start
        self._experts = experts
        self._at_start = self._at_answer = experts()
        self.generated = self._drafted = self._accepted = 0

    def prompt_done(self, offset: int) -> None:
        """offset: what the cache holds now."""
        self._prompt_tokens = offset - self._cached_tokens  # fewer than asked if it was cancelled
        self._first = time.perf_counter()
        self._at_answer = self._experts()

    def token(self, *, drafted: int = 0, from_draft: bool = False, source: str = "") -> None:
        """One more. drafted: how many tokens were since the last one; from_draft: whether this was one; source: by
        whom."""
        self.generated += 1
        self._drafted += drafted
        self._accepted += from_draft
        if drafted or from_draft:
            before = self._drafts.get(source, (0, 0))
            self._drafts = {**self._drafts, source: (before[0] + drafted, before[1] + from_draft)}
        if self.generated == 1:
            self._first = time.perf_counter()

    def part(
        self,
        text: str,
        events: list[Event],
        token: int | None,
        logprobs: mx.array | None,
        finish_reason: str | None,
        *,
        from_draft: bool = False,
        told: Told | None = None,
        index: int = 0,
        stop_string: str | None = None,
    ) -> Part:
        logprob, top = told or (None, ())
        now, experts = time.perf_counter(), self._experts()
        return Part(
            text=text,
            token=token,
            logprobs=logprobs,
            events=tuple(events),
            prompt_tokens=self._prompt_tokens,
            prompt_tps=_rate(self._prompt_tokens, self._first - self._start),
            cached_tokens=self._cached_tokens,
            generation_tokens=self.generated,
            generation_tps=_rate(self.generated - 1, now - self._first),
            peak_memory=mx.get_peak_memory() / 1e9,
            finish_reason=finish_reason,
            from_draft=from_draft,
            drafted_tokens=self._drafted,
            accepted_tokens=self._accepted,
            drafts=self._drafts,
            verified=self._verified if self._drafted else "",
            prompt_experts=None if experts is None else self._at_answer - self._at_start,
            experts=None if experts is None else experts - self._at_answer,
            index=index,
            logprob=logprob,
            top_logprobs=top,
            stop_string=stop_string,
        )


def _rate(count: int, seconds: float) -> float:
    return count / seconds if count > 0 and seconds > 0 else 0.0


def statistics(part: Part) -> str:
    """The three lines that mlx-lm prints under an answer; one more of drafts, one of streamed experts."""
    experts = "" if part.experts is None else f"\nExperts: {part.experts}"
    cached = f" ({part.cached_tokens} more from the cache)" if part.cached_tokens else ""
    drafts = ""
    if part.drafted_tokens:
        share = 100 * part.accepted_tokens / part.drafted_tokens
        each = ", ".join(f"{source} {right} of {made}" for source, (made, right) in part.drafts.items())
        drafts = (
            f"Drafts: {part.accepted_tokens} of {part.drafted_tokens} tokens accepted ({share:.1f} %; {each}; "
            f"{part.verified} verification)\n"
        )
    return (
        f"Prompt: {part.prompt_tokens} tokens, {part.prompt_tps:.3f} tokens-per-sec{cached}\n"
        f"Generation: {part.generation_tokens} tokens, {part.generation_tps:.3f} tokens-per-sec\n{drafts}"
        f"Peak memory: {part.peak_memory:.3f} GB{experts}"
    )
