"""The parts of one answer, put together again.

Knows parts. Knows nothing of where they come from.
"""

from __future__ import annotations

from mlx_qwen35.text.parts import Completion, Part
from mlx_qwen35.text.reply import Event


class Collected:
    """An answer while it grows. finish_reason: None until it has ended."""

    def __init__(self, prompt_tokens: int) -> None:
        """prompt_tokens: of the whole prompt."""
        self.finish_reason: str | None = None
        self._stop_string: str | None = None
        self._prompt_tokens, self._cached = prompt_tokens, 0
        self._text: list[str] = []
        self._tokens: list[int] = []
        self._events: list[Event] = []
        self._told: list[tuple[float, tuple[tuple[int, float], ...]]] = []

    def add(self, part: Part) -> None:
        """The next part."""
        self._text.append(part.text)
        self._events += part.events
        if part.token is not None:
            self._tokens.append(part.token)
            if part.logprob is not None:
                self._told.append((part.logprob, part.top_logprobs))
        self._cached, self.finish_reason = part.cached_tokens, part.finish_reason
        self._stop_string = part.stop_string

    def completion(self) -> Completion:
        return Completion(
            text="".join(self._text),
            tokens=tuple(self._tokens),
            events=tuple(self._events),
            prompt_tokens=self._prompt_tokens,
            finish_reason=self.finish_reason or "cancelled",
            cached_tokens=self._cached,
            logprobs=tuple(logprob for logprob, _ in self._told),
            top_logprobs=tuple(top for _, top in self._told),
            stop_string=self._stop_string,
        )
