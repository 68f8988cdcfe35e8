"""One answer as text: tokens in, parts out.

Knows how a token becomes characters, stop strings and the events of a reply, and what a caller is told with each token.
Knows nothing of the model, the cache or how tokens are made.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlx_qwen35.text.reply import ContentDelta, Event, ReasoningDelta, ReplyParser, ToolCall
from mlx_qwen35.text.stop import StopStrings
from mlx_qwen35.text.tokenizer import Detokenizer

if TYPE_CHECKING:
    import mlx.core as mx

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
    logprobs: [V] log probabilities of the distribution `token` comes from, before temperature and truncation; lazy, to
        be read on the thread that generates. None where token is None.
    events: the same characters split into ReasoningDelta, ContentDelta and ToolCall; `reasoning`, `content` and
        `tool_calls` are views of it, of this part alone.
    prompt_tokens, prompt_tps: tokens computed before the first of the answer, and how many a second.
    cached_tokens: tokens that the cache held already; they are not among prompt_tokens.
    generation_tokens, generation_tps: tokens of the answer so far; those after the first, a second since the first.
    peak_memory: the most that MLX held in this process, in GB (10^9 bytes).
    finish_reason: "stop" (end of turn or stop string), "length" (max_tokens or context full), "cancelled", or None.
    """

    text: str
    token: int | None
    logprobs: mx.array | None
    events: tuple[Event, ...]
    prompt_tokens: int
    prompt_tps: float
    cached_tokens: int
    generation_tokens: int
    generation_tps: float
    peak_memory: float
    finish_reason: str | None = None


@dataclass(frozen=True)
class Completion(_Split):
    """A finished answer of a batch. `text` as in Part, all of it; `tokens` with the end-of-turn token if it came."""

    text: str
    tokens: tuple[int, ...]
    events: tuple[Event, ...]
    prompt_tokens: int
    finish_reason: str


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
    ) -> None:
        self._eos = frozenset(eos_token_ids)
        self._characters = Detokenizer(tokenizer)
        self._stops = StopStrings(stop)
        self._parser = ReplyParser(thinking=thinking, tools=list(tools) or None)

    def add(self, token: int, *, last: bool = False) -> tuple[str, list[Event], bool]:
        """-> (new text, new events, whether the answer ends here: end of turn or stop string).

        `last`: nothing follows, whatever the token is; what was held back comes out.
        """
        if token in self._eos:
            return *self.finish(), True
        text, stopped = self._stops.feed(self._characters.add(token))
        events = self._parser.feed(text)
        if stopped or last:
            rest, final = self.finish()
            text, events = text + rest, [*events, *final]
        return text, events, stopped

    def finish(self) -> tuple[str, list[Event]]:
        """-> (text, events) of what was held back"""
        text, _ = self._stops.feed(self._characters.finish())
        text += self._stops.finish()
        return text, [*self._parser.feed(text), *self._parser.finish()]


def statistics(part: Part) -> str:
    """The three lines that mlx-lm prints under an answer."""
    cached = f" ({part.cached_tokens} more from the cache)" if part.cached_tokens else ""
    return (
        f"Prompt: {part.prompt_tokens} tokens, {part.prompt_tps:.3f} tokens-per-sec{cached}\n"
        f"Generation: {part.generation_tokens} tokens, {part.generation_tps:.3f} tokens-per-sec\n"
        f"Peak memory: {part.peak_memory:.3f} GB"
    )
