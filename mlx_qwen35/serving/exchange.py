"""What passes between an interface and a model: what is asked, in no interface's words, and the answers to it.

    body -> Api.read -> Ask -> (a model is loaded, the engine answers) -> Answering -> Api.whole or Api.stream -> bytes

Knows engine Parts. Knows neither HTTP nor any interface.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from mlx_qwen35.serving.refusal import Refusal

if TYPE_CHECKING:
    from mlx_qwen35.text.parts import Part
    from mlx_qwen35.text.reply import ToolCall

ALIVE_EVERY = 10.0  # seconds without a word after which a client is told that it goes on; the shortest limit is 240


@dataclass
class Ask:
    """model: the name as it was given; None: whichever there is.

    prompt: messages, as `Engine.submit` takes them; or, where `plain`, a text or token ids that no template is put
    around, and which may spell control tokens. options: others of `Engine.submit` (max_tokens, tools, stop, ...), but
    sampling and fetch. sampling: fields of `Sampling` that differ from the model's own defaults. stream: in pieces.
    ttl: seconds that the model is to stay when it is idle, math.inf for ever, None: the server's own. load_only: the
    model is loaded, or unloaded with a ttl of 0, and the Answering ends without a Part. unread: fields of the body that
    mean nothing here. others: further prompts of the same request; their answers are numbered on from this one's
    (together.py makes one Answering of all).
    extra: whatever the interface wants to find again when it answers.
    """

    model: str | None
    prompt: Sequence[Mapping[str, Any]] | Sequence[int] | str
    options: dict[str, Any] = field(default_factory=dict)
    sampling: dict[str, Any] = field(default_factory=dict)
    stream: bool = False
    plain: bool = False
    ttl: float | None = None
    load_only: bool = False
    unread: Sequence[str] = ()
    others: Sequence[Ask] = ()
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Alive:
    """Nothing was said for a while: the prompt is being read, or the model loaded. done, total: tokens of the prompt;
    loading: None, or the share of the model that is loaded, 0 to 1."""

    done: int = 0
    total: int = 0
    loading: float | None = None


@dataclass
class Usage:
    """Tokens of a whole request: prompt_tokens has those in it that were not computed, cached_tokens; answer_tokens of
    all its answers, reasoning_tokens those of them in the reasoning."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    answer_tokens: int = 0
    reasoning_tokens: int = 0


@dataclass
class Finished:
    """One answer of a request, whole. text: as the model wrote it, tags and all. finish_reason: as Part has it, and
    never None; stop_string: as Part has it. logprobs: of each token (id, log probability, the likeliest with theirs),
    where they were asked for."""

    text: str = ""
    reasoning: str = ""
    content: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    finish_reason: str = "stop"
    stop_string: str | None = None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[tuple[int, float, tuple[tuple[int, float], ...]]] = field(default_factory=list)


class Answering(Protocol):
    """An answer that is being made, for one reader. Iterated it gives Parts and, while nothing comes, `Alive`s, then it
    ends; errors are Refusals. Iterate it or ask for `finished`, not both."""

    model: str  # the name that answers
    id: str  # 24 hexadecimal digits, another for each request
    created: int  # seconds since 1970
    usage: Usage  # up to now; whole at the end
    prompt_seconds: float  # until the first token
    answer_seconds: float  # from then on
    load_seconds: float  # that loading took for this request, 0 if it was loaded

    def __aiter__(self) -> AsyncIterator[Part | Alive]: ...

    async def finished(self) -> list[Finished]:
        """All answers, when they have ended."""

    def token_text(self, token: int) -> str:
        """A token as text, for log probabilities."""

    def token_bytes(self, token: int) -> bytes: ...


class Api(Protocol):
    """One way in, such as POST /v1/chat/completions. An object without state of its own, but for what it keeps of
    earlier answers."""

    media_type: str  # of a stream: text/event-stream or application/x-ndjson

    def read(self, body: Mapping[str, Any], headers: Mapping[str, str]) -> Ask:
        """Raises Refusal for what cannot be asked. headers: names in lower case."""

    def whole(self, ask: Ask, answering: Answering, made: Sequence[Finished]) -> dict[str, Any]:
        """The JSON of an answer without streaming."""

    def stream(self, ask: Ask, answering: Answering) -> AsyncIterator[str]:
        """The text of a stream, in pieces, each of whole events. An error while it runs is told in the stream, in the
        interface's way, and ends it; nothing is raised but what ends the connection."""

    def refused(self, refusal: Refusal) -> dict[str, Any]:
        """The JSON of an error."""
