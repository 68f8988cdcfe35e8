"""A chat in a notebook: answers that render themselves while they come, and a history that outlives an interrupt.

Knows questions and where answers are shown; what is said and computed is conversation.py's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_qwen35 import checks
from mlx_qwen35.conversation import Conversation, Message, check_settings
from mlx_qwen35.engine.allowed import PromptOptions
from mlx_qwen35.engine.options import ChatOptions, spelled
from mlx_qwen35.errors import ArgumentError, PromptError
from mlx_qwen35.generation import stream_generate
from mlx_qwen35.notebook import shell
from mlx_qwen35.notebook.reply import Reply
from mlx_qwen35.notebook.thumbnails import thumbnails
from mlx_qwen35.notebook.views import PLACES, open_view
from mlx_qwen35.session.file import check_place
from mlx_qwen35.session.lock import SessionLock
from mlx_qwen35.text.markdown import reply_markdown, safe_markdown
from mlx_qwen35.text.reply import ToolCall
from mlx_qwen35.vision.media import Media

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from mlx_qwen35.model import Model
    from mlx_qwen35.processor import Processor
    from mlx_qwen35.text.parts import Part

_ASKED = {"user": "**You**", "tool": "**Result**"}


class Chat:
    """A conversation with a model. What was computed for one answer serves the next, pictures included.

    An interrupted cell leaves it usable: a question whose answer had begun is in the history, with what there is of the
    answer (`last`); one whose answer had not begun is not.
    """

    @spelled(stream_generate, ChatOptions)
    def __init__(
        self,
        model: Model,
        processor: Processor,
        *,
        display: str = "auto",
        **settings: Unpack[ChatOptions],
    ) -> None:
        """settings: as in `stream_generate`, but images, videos and those that a conversation gives itself (session,
        cache, covered, features, cancel, continue_final_message).

        display: where answers are shown while they come: "rich" (as in a notebook; needs IPython), "text" (standard
        output), "off", or "auto": rich in a notebook, text in IPython in a terminal, off in a program.
        """
        if display not in PLACES:
            raise ArgumentError(f"display is {display!r}; choose {', '.join(PLACES)}")
        check_settings(settings, "Chat")
        checks.model_and_processor("Chat", model, processor)
        options = PromptOptions.of(settings)
        self._display = display
        self._talk = Conversation(
            model,
            processor,
            system=options.system,
            tools=options.tools or (),
            enable_thinking=options.enable_thinking,
            options=options,
            settings={name: value for name, value in settings.items() if name not in PromptOptions.names()},
        )
        self.last: Reply | None = None

    @property
    def history(self) -> list[Message]:
        """What was said, as messages, without the system message; pictures and videos are Media."""
        return self._talk.messages

    def send(
        self, text: str, *, images: Sequence[Any] = (), videos: Sequence[Any] = (), **settings: Unpack[ChatOptions]
    ) -> Reply:
        """Asks, shows the answer while it comes, and returns it.

        images, videos: in any form that `stream_generate` takes. settings: those of `Chat`, for this answer alone
        (enable_thinking, sampling, max_tokens, stop, ...). Raises PromptError, and leaves the chat as it was, if it
        makes no prompt; KeyboardInterrupt once an interrupted answer is put away.
        """
        given = [("image", "images", images), ("video", "videos", videos)]
        check_settings(settings, "send")
        checks.text("text", text)
        for _, name, sources in given:
            checks.some(name, sources, name)
        if not (text.strip() or len(images) or len(videos)):
            raise PromptError("the message is empty; write a text, or give images= or videos=")
        reading = {name: settings.pop(name) for name in ("fps", "max_pixels", "fetch") if name in settings}
        shown = [
            self._talk.read(kind, source, f"{name}[{at}]", **reading)
            for kind, name, sources in given
            for at, source in enumerate(sources)
        ]
        content = [*shown, {"type": "text", "text": text}] if shown else text
        return self._answer([{"role": "user", "content": content}], settings)

    def send_results(self, *results: Any, **settings: Unpack[ChatOptions]) -> Reply:
        """Gives the results of the tool calls of the last answer, one each and in their order, and shows the answer.

        A result that is not text goes as JSON. Raises PromptError if there are not as many as calls.
        """
        calls = len(self._talk.calls)
        if not calls or len(results) != calls:
            raise PromptError(
                f"{len(results)} results for {calls} tool calls of the last answer; give one for each, in their order"
            )
        texts = [r if isinstance(r, str) else json.dumps(r, ensure_ascii=False, default=str) for r in results]
        return self._answer([{"role": "tool", "content": text} for text in texts], settings)

    def regenerate(self, **settings: Unpack[ChatOptions]) -> Reply:
        """Answers the last question once more, in place of its answer. settings: as in `send` (`sampling=` with another
        seed, say). The old answer stays if the new one is interrupted before it begins."""
        if not self._talk.exchanges:
            raise PromptError("nothing was asked yet; use send")
        before = self._talk.exchanges
        *self._talk.exchanges, (questions, _) = before
        kept = len(self._talk.exchanges)
        try:
            return self._answer(questions, settings)
        finally:
            if len(self._talk.exchanges) == kept:
                self._talk.exchanges = before

    def undo(self) -> None:
        """Takes back the last question and its answer."""
        self._talk.undo()

    def save(self, path: str | Path) -> None:
        """Writes what was said and computed to a file, which `load`, `mlx-qwen35 chat --session` and `load_session` go
        on with. Raises SessionError while another program has the file, WriteError where the disk refuses."""
        checks.path("path", path)
        check_place(Path(path))
        with SessionLock(path):
            self._talk.save(path)

    def load(self, path: str | Path) -> None:
        """Goes on with a chat that was saved, in place of what was said here; the settings stay, but the system message
        is that of the file. Raises SessionError where it is no session of this model."""
        checks.path("path", path)
        self._talk.load(path)
        self.last = None

    def reset(self) -> None:
        """Forgets what was said; the system message and the settings stay."""
        self._talk.reset()
        self.last = None

    def _answer(self, questions: list[Message], settings: Mapping[str, Any]) -> Reply:
        media = _media(questions)
        parts: list[Part] = []
        view = open_view(self._display, media)
        progress = settings.get("on_progress", view.progress)

        def show(part: Part) -> None:
            parts.append(part)
            view.show(part)

        try:
            self._talk.answer(questions, show, **{**settings, "on_progress": progress})
        except BaseException:
            if parts:
                self.last = Reply.from_parts(parts, media=media)
            with suppress(Exception):  # what ended the answer counts, and not that it cannot be shown
                view.end(self.last if parts else None)
            raise
        reply = self.last = Reply.from_parts(parts, media=media, shown_in=self._shown_in())
        view.end(reply)
        if reply.finish_reason == "cancelled":
            raise KeyboardInterrupt
        return reply

    def _shown_in(self) -> int | None:
        return None if self._display == "off" else shell.cell()

    def _repr_markdown_(self) -> str:
        """All of it."""
        shown = []
        for message in self.history:
            if message["role"] == "assistant":
                calls = [ToolCall(c["function"]["name"], c["function"]["arguments"], "", 0) for c in _calls(message)]
                shown.append(reply_markdown(message.get("reasoning_content", ""), message["content"], calls))
            else:
                asked = [_ASKED[message["role"]], thumbnails(_media([message])), safe_markdown(_text(message))]
                shown.append("\n\n".join(part for part in asked if part))
        return "\n\n---\n\n".join(shown) or "*(nothing was said yet)*"

    def __repr__(self) -> str:
        return f"Chat({len(self._talk.exchanges)} questions)"


def _media(messages: Sequence[Message]) -> list[Media]:
    contents = [message["content"] for message in messages if isinstance(message["content"], list)]
    return [part[part["type"]] for content in contents for part in content if part["type"] != "text"]


def _text(message: Message) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content if "text" in part)


def _calls(message: Message) -> list[dict[str, Any]]:
    return message.get("tool_calls", [])
