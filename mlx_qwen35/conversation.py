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

from mlx_qwen35 import checks, generation
from mlx_qwen35.engine.allowed import PromptOptions, check_options
from mlx_qwen35.engine.options import ChatOptions, names_of
from mlx_qwen35.errors import ArgumentError, PromptError
from mlx_qwen35.machine.interrupt import stop_on_ctrl_c
from mlx_qwen35.session import Session, load_session
from mlx_qwen35.text.messages import MediaPart
from mlx_qwen35.text.screen import call_record
from mlx_qwen35.text.variables import variables_of
from mlx_qwen35.vision.features import FeatureStore

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from mlx_qwen35.model import Model
    from mlx_qwen35.processor import Processor
    from mlx_qwen35.text.parts import Part

Message = dict[str, Any]
Exchange = tuple[list[Message], Message]  # what was asked, what was answered

_SETTINGS = sorted(names_of(ChatOptions))


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
        options: PromptOptions | None = None,
        reading: Mapping[str, Any] | None = None,
        settings: Mapping[str, Any] | None = None,
        session: Session | None = None,
    ) -> None:
        """options: what the template is told beside system, tools and enable_thinking. reading: how pictures and videos
        are read, as `Processor.prepare` has it. settings: of `stream_generate`. session: what was computed, and what
        was said if `save` wrote it."""
        checks.model_and_processor(type(self).__name__, model, processor)
        check_options({"system": system, "tools": tools, "enable_thinking": enable_thinking}, type(self).__name__)
        check_settings(settings or {}, type(self).__name__)
        self._model, self._processor = model, processor
        self.system, self._tools, self.enable_thinking = system, list(tools or ()), enable_thinking
        self._options = replace(options or PromptOptions(), **(reading or {}))
        self._settings = dict(settings or {})
        self._features = FeatureStore()
        self.reset()
        if session is not None:
            self.go_on(session)
            self.system = system or self.system

    def reset(self) -> None:
        """Forgets everything but features of pictures, which may come again."""
        self.exchanges: list[Exchange] = []
        self.shown: list[Message] = []
        self._session = Session(self._model, self._processor)

    def go_on(self, session: Session) -> None:
        """Takes what was computed, and what was said if `save` wrote it, in place of what there is."""
        notes = session.notes or {}
        self.exchanges = [(questions, answer) for questions, answer in notes.get("exchanges", [])]
        self.system, self.shown = notes.get("system"), []
        self._session = session

    def load(self, path: str | Path) -> None:
        """Goes on with what `save` wrote. Raises SessionError where it is none, or another model's."""
        self.go_on(load_session(path, self._model, self._processor))

    def take(self, exchanges: Sequence[Exchange], system: str | None) -> None:
        """Takes what was said elsewhere, in place of what there is. Raises PromptError where the model cannot read it,
        and leaves the conversation as it was."""
        read = []
        for questions, answer in exchanges:
            *asked, answered = self._processor.prepare([*questions, answer], **self._options.reading)
            read.append((asked, answered))
        before = self.exchanges, self.system, self.shown
        self.exchanges, self.system, self.shown = read, system, []
        try:
            self.check(self._processor)
        except BaseException:
            self.exchanges, self.system, self.shown = before
            raise

    def forget_computed(self) -> None:
        """Gives back what was computed and seen; what was said stays."""
        self._features = FeatureStore()
        self._session.forget()

    def change_model(self, model: Model, processor: Processor, settings: Mapping[str, Any]) -> None:
        """Another model answers from now on; what was said stays, what was computed or seen does not."""
        self._model, self._processor, self._settings = model, processor, dict(settings)
        self._features, self._session = FeatureStore(), Session(model, processor)

    def save(self, path: str | Path, *, computed: bool = True) -> None:
        """Writes what was said and computed to a file, which `load_session` reads. Raises WriteError.

        computed False: what was said alone, beside the file, which is there; what was computed since is then computed
        again by who loads it.
        """
        self._session.notes = {"exchanges": self.exchanges, "system": self.system}
        self._session.save(path) if computed else self._session.save_notes(path)

    @property
    def nbytes(self) -> int:
        """About what a file of it takes."""
        return self._session.nbytes

    @property
    def computed(self) -> int:
        """Tokens that need not be computed again."""
        return len(self._session.tokens)

    @property
    def settings(self) -> dict[str, Any]:
        """Of all answers, as `stream_generate` has them."""
        return self._settings

    @property
    def options(self) -> PromptOptions:
        """What the template is told with all answers."""
        return replace(
            self._options, system=self.system, tools=self._tools, enable_thinking=self.enable_thinking
        )

    @property
    def messages(self) -> list[Message]:
        """All that was said, without the system message."""
        return [message for questions, answer in self.exchanges for message in (*questions, answer)]

    @property
    def calls(self) -> list[Message]:
        """The tool calls that the next message has to give the results of."""
        return self.exchanges[-1][1].get("tool_calls", []) if self.exchanges else []

    def read(self, kind: str, source: Any, where: str, **reading: Any) -> Message:
        """The part of a message that shows a picture or video, which is read now. where: its name in errors. reading:
        how, over how all are.

        Raises PromptError if it cannot be read or seen.
        """
        content = [MediaPart(kind, source, where)]
        (message,) = self._processor.prepare([{"role": "user", "content": content}], **self._options.reading | reading)
        return message["content"][0]

    def question(self, text: str) -> Message:
        """A text as the next message: a user's, which shows what is to be shown, or the result of a tool's call."""
        content = [*self.shown, {"type": "text", "text": text}] if self.shown else text
        return {"role": "tool" if self.calls else "user", "content": content}

    def think(self, enable_thinking: bool | None, reasoning_effort: str | None) -> dict[str, Any]:
        """Whether and how much answers reason from now on, as `Processor.prompt` has it; -> what the template is told.

        Raises PromptError for what the template does not take, and changes nothing then.
        """
        said = replace(self._options, enable_thinking=enable_thinking, reasoning_effort=reasoning_effort)
        names = ("enable_thinking", "reasoning_effort", "preserve_thinking", "chat_template_kwargs")
        told = variables_of(self._processor.template).of(**{name: getattr(said, name) for name in names})
        self._options, self.enable_thinking = said, enable_thinking
        return told

    def undo(self) -> Exchange | None:
        """Takes back the last exchange, and returns it; None: nothing was said."""
        if not self.exchanges:
            return None
        *self.exchanges, last = self.exchanges
        return last

    def answer_again(
        self,
        on_part: Callable[[Part], None],
        questions: Sequence[Message] | None = None,
        **settings: Unpack[ChatOptions],
    ) -> list[Part]:
        """Another answer in place of the last, to the same questions or to others; as `answer` otherwise. The last one
        stays where no token of another has come. Raises PromptError if nothing was asked."""
        last = self.undo()
        if last is None:
            raise PromptError("nothing was asked yet: write a message first")
        before = len(self.exchanges)
        try:
            return self.answer(last[0] if questions is None else questions, on_part, **settings)
        finally:
            if len(self.exchanges) == before:
                self.exchanges = [*self.exchanges, last]

    def check(self, processor: Processor) -> None:
        """Raises PromptError if another processor cannot read what was said."""
        if self.exchanges:
            processor.prompt(self.messages, **self.options.said)

    def answer(
        self,
        questions: Sequence[Message],
        on_part: Callable[[Part], None],
        **settings: Unpack[ChatOptions],
    ) -> list[Part]:
        """Answers messages; -> the parts, each of which `on_part` was given as it came. settings: of `stream_generate`,
        over those of all.

        Question and answer join the exchanges, also where the answer was interrupted after it had begun; the first
        Ctrl-C ends it with a part whose finish_reason is "cancelled". Raises PromptError if they make no prompt.
        """
        check_settings(settings, "answer")
        names = PromptOptions.names()
        told = {name: value for name, value in settings.items() if name in names}
        if told.get("enable_thinking") is None:
            told.pop("enable_thinking", None)
        options = replace(self.options, **told)
        prompt = self._processor.prompt([*self.messages, *questions], **options.said)
        asked_for = {name: value for name, value in settings.items() if name not in names}
        parts: list[Part] = []
        try:
            with stop_on_ctrl_c() as asked:
                stream = generation.stream_generate(
                    self._model,
                    self._processor,
                    prompt,
                    tools=options.tools or (),
                    session=self._session,
                    features=self._features,
                    cancel=asked,
                    **{**self._settings, **asked_for},
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


def check_settings(settings: Mapping[str, Any], owner: str) -> None:
    """Raises ArgumentError for what is no setting of an answer in a conversation. owner: who was given them."""
    check_options(settings, owner, names=_SETTINGS)
    if settings.get("n", 1) > 1:
        raise ArgumentError(
            f"n is {settings['n']}, and a conversation goes on with one answer; ask stream_generate for several"
        )


def _message(parts: list[Part]) -> Message:
    message: Message = {"role": "assistant", "content": "".join(part.content for part in parts)}
    if reasoning := "".join(part.reasoning for part in parts):
        message["reasoning_content"] = reasoning
    if calls := [call for part in parts for call in part.tool_calls]:
        message["tool_calls"] = [{"type": "function", "function": call_record(call)} for call in calls]
    return message
