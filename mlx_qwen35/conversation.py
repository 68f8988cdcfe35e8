"""A conversation: its messages, what its next message shows, and what was computed for it.

Knows exchanges (what was asked, what was answered) and that whatever ends an answer leaves them whole. Answers are
`stream_generate`'s. What was computed is kept in a session, and what was seen as long as there is room. Knows nothing
of screens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_qwen35 import generation
from mlx_qwen35.interrupt import stop_on_ctrl_c
from mlx_qwen35.screen import call_record
from mlx_qwen35.session import Session
from mlx_qwen35.text.messages import MediaPart
from mlx_qwen35.vision.features import FeatureStore

if TYPE_CHECKING:
    from mlx_qwen35.model import Model
    from mlx_qwen35.parts import Part
    from mlx_qwen35.processor import Processor

Message = dict[str, Any]
Exchange = tuple[list[Message], Message]  # what was asked, what was answered


class Conversation:
    """Exchanges with one model, and the session that was computed for them. `shown`: pictures and videos of the next
    message, as parts of its content."""

    def __init__(
        self,
        model: Model,
        processor: Processor,
        *,
        system: str | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        enable_thinking: bool | None = None,
        reading: Mapping[str, Any] | None = None,
        settings: Mapping[str, Any] | None = None,
        session: Session | None = None,
    ) -> None:
        """reading: how pictures and videos are read, as `Processor.prepare` has it. settings: of `stream_generate`.
        session: what was computed, and what was said if `save` wrote it."""
        self._model, self._processor = model, processor
        self._system, self._tools, self._enable_thinking = system, list(tools), enable_thinking
        self._reading, self._settings = dict(reading or {}), dict(settings or {})
        self._features = FeatureStore()
        self.reset()
        if session is not None:
            self._session = session
            self.exchanges = [(questions, answer) for questions, answer in (session.notes or {}).get("exchanges", [])]

    def reset(self) -> None:
        """Forgets everything but features of pictures, which may come again."""
        self.exchanges: list[Exchange] = []
        self.shown: list[Message] = []
        self._session = Session(self._model, self._processor)

    def save(self, path: str | Path) -> None:
        """Writes what was said and computed to a file, which `load_session` reads. Raises WriteError."""
        self._session.notes = {"exchanges": self.exchanges}
        self._session.save(path)

    @property
    def messages(self) -> list[Message]:
        """All that was said, without the system message."""
        return [message for questions, answer in self.exchanges for message in (*questions, answer)]

    @property
    def calls(self) -> list[Message]:
        """The tool calls that the next message has to give the results of."""
        return self.exchanges[-1][1].get("tool_calls", []) if self.exchanges else []

    def read(self, kind: str, source: Any, where: str) -> Message:
        """The part of a message that shows a picture or video, which is read now. where: its name in errors.

        Raises PromptError if it cannot be read or seen.
        """
        content = [MediaPart(kind, source, where)]
        (message,) = self._processor.prepare([{"role": "user", "content": content}], **self._reading)
        return message["content"][0]

    def question(self, text: str) -> Message:
        """A text as the next message: a user's, which shows what is to be shown, or the result of a tool's call."""
        content = [*self.shown, {"type": "text", "text": text}] if self.shown else text
        return {"role": "tool" if self.calls else "user", "content": content}

    def answer(
        self,
        questions: Sequence[Message],
        on_part: Callable[[Part], None],
        *,
        enable_thinking: bool | None = None,
        **settings: Any,
    ) -> list[Part]:
        """Answers messages; -> the parts, each of which `on_part` was given as it came. settings: over those of all.

        Question and answer join the exchanges, also where the answer was interrupted after it had begun; the first
        Ctrl-C ends it with a part whose finish_reason is "cancelled". Raises PromptError if they make no prompt.
        """
        thinking = self._enable_thinking if enable_thinking is None else enable_thinking
        prompt = self._processor.prompt(
            [*self.messages, *questions],
            system=self._system,
            tools=self._tools or None,
            enable_thinking=thinking,
        )
        settings = {**self._settings, **settings}
        parts: list[Part] = []
        try:
            with stop_on_ctrl_c() as asked:
                stream = generation.stream_generate(
                    self._model,
                    self._processor,
                    prompt,
                    tools=self._tools,
                    session=self._session,
                    features=self._features,
                    cancel=asked,
                    **settings,
                )
                with closing(stream):
                    for part in stream:
                        parts.append(replace(part, logprobs=None))  # a megabyte a token
                        on_part(part)
        finally:
            if any(part.token is not None for part in parts):
                self.exchanges = [*self.exchanges, (list(questions), _message(parts))]
                self.shown = []
        return parts


def _message(parts: list[Part]) -> Message:
    message: Message = {"role": "assistant", "content": "".join(part.content for part in parts)}
    if reasoning := "".join(part.reasoning for part in parts):
        message["reasoning_content"] = reasoning
    if calls := [call for part in parts for call in part.tool_calls]:
        message["tool_calls"] = [{"type": "function", "function": call_record(call)} for call in calls]
    return message
