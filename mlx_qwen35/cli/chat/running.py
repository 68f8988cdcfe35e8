"""The chat itself: reads messages and commands, shows answers, keeps what was said.

Knows the order of things. Each command's work is done where its noun lives.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from mlx_qwen35.cli import opening, options, prompting
from mlx_qwen35.cli.chat import transcript
from mlx_qwen35.cli.chat.commands import help_text, read_line
from mlx_qwen35.cli.chat.keeping import Keeping, save_copy
from mlx_qwen35.cli.chat.models import Models
from mlx_qwen35.cli.chat.reader import Reader, open_reader
from mlx_qwen35.cli.cut import tell_cut
from mlx_qwen35.cli.demo import DEMO_HINT
from mlx_qwen35.cli.experts import ExpertLine
from mlx_qwen35.errors import PromptError, Qwen35Error
from mlx_qwen35.machine.interrupt import Ending
from mlx_qwen35.text.screen import Screen, columns, note
from mlx_qwen35.text.variables import EFFORTS

if TYPE_CHECKING:
    from mlx_qwen35.conversation import Conversation
    from mlx_qwen35.text.parts import Part

    OnPart = Callable[[Part], None]

WELCOME = "/help lists the commands; Ctrl-C ends an answer, Ctrl-D leaves."
_THINK = {"on": True, "off": False, "auto": None}


def converse(args: argparse.Namespace, ending: Ending) -> int:
    """Runs the command `chat`; -> the exit status."""
    from mlx_qwen35.conversation import Conversation

    tools = prompting.read_tools(args.tools)
    told = prompting.prompt_options(args, tools)
    prompting.check_places(args)
    keeping = Keeping(args.session, ending)
    try:
        held = opening.hold(args, prompting.prompt_check(told, lambda processor: "?"))
        processor = opening.load_processor(args, held)
        processor.prompt("?", **told.said)  # raises what the template has against the flags
        question = [{"role": "user", "content": prompting.media_parts(args)}]
        shown = processor.prepare(question, **told.reading)[0]["content"]
        model = opening.load_model(args, held)
        opening.bound_to(processor, model)
        session = opening.open_session(args, model, processor)
        models = Models(args, held, model, processor)
        talk = Conversation(
            model,
            processor,
            system=args.system,
            tools=tools,
            enable_thinking=args.think,
            options=told,
            settings=models.settings(),
            session=session,
        )
        talk.shown += shown
        chat = _Chat(talk, models, keeping, ending, args)
        try:
            chat.run()
        finally:
            if chat.unsaved:
                keeping.save(talk)
        models.model.unload()
    finally:
        keeping.close()
    return 0


class _Chat:
    """unsaved: whether the file lacks something that was said."""

    def __init__(
        self, talk: Conversation, models: Models, keeping: Keeping, ending: Ending, args: argparse.Namespace
    ) -> None:
        self._talk, self._models, self._keeping = talk, models, keeping
        self._ending, self._args = ending, args
        self._reader: Reader = open_reader(ending, self._words)
        self._last: Part | None = None
        self._draft: str | None = None  # the question that is being edited
        self._given_up = False  # Ctrl-C was the last thing
        self.unsaved = keeping.is_new

    def run(self) -> None:
        """Reads lines and answers them, until the input ends, /exit, or Ctrl-C after something was given up already."""
        if self._reader.at_terminal:
            if self._models.name == "demo" and self._args.model is not None:  # else it is said already
                note(DEMO_HINT)
            note(WELCOME)
        self._recall()
        while True:
            draft, self._draft = self._draft, None
            label = "tool result> " if self._talk.calls and draft is None else "> "
            try:
                text = self._reader.read(label, draft or "")
            except EOFError:
                break
            except KeyboardInterrupt:
                if self._given_up:
                    break
                self._given_up = True
                note("\nCtrl-C again leaves.")
                continue
            self._given_up = False
            if not text.strip():
                continue
            try:
                line = read_line(text)
                if isinstance(line, str):
                    self._say(line) if draft is None else self._do_edit(line)
                elif line.name == "exit":
                    return
                else:
                    getattr(self, f"_do_{line.name}")(line.argument)
            except Qwen35Error as error:
                note(f"error: {error}")
            except KeyboardInterrupt:
                self._given_up = True
            self._ending.check()
        if self._reader.at_terminal:
            print()

    def _recall(self) -> None:
        if self._talk.exchanges:
            print(transcript.recalled(self._talk.exchanges, columns(sys.stderr)), file=sys.stderr)

    def _say(self, text: str) -> None:
        try:
            self._show(lambda on_part: self._talk.answer([self._talk.question(text)], on_part))
        except PromptError as error:
            if not self._talk.shown:
                raise
            self._talk.shown.clear()  # or the next message would fail with it too
            note(f"error: {error}\nWhat the message was to show is dropped with it.")

    def _show(self, answer: Callable[[OnPart], list[Part]], settings: Mapping[str, Any] = MappingProxyType({})) -> None:
        """Shows an answer while it comes, and keeps it. settings: of this answer alone."""
        screen, below = Screen(hide_thinking=self._args.hide_thinking), ExpertLine(self._args.verbose)
        last, answered = None, False
        before = self._talk.exchanges

        def show(part: Part) -> None:
            nonlocal answered
            below.before()
            screen.show(part)
            below.after(part)
            answered = answered or bool(part.content or part.tool_calls)

        try:
            with self._reader.waiting():
                *_, last = answer(show)
        finally:
            below.before()
            screen.end()
            below.end(last)
            if self._talk.exchanges is not before:
                self.unsaved = True
        self._last = last
        limit = {**self._talk.settings, **settings}["max_tokens"]
        tell_cut(last, limit, "/regen {more} answers again with more room", answered=answered)
        if self._talk.exchanges is not before:
            self._keep()
        options.print_statistics(self._args, last)
        self._given_up = last.finish_reason == "cancelled"

    def _keep(self) -> None:
        self.unsaved = not self._keeping.save_or_say(self._talk)

    def _words(self, command: str) -> list[str]:
        """What Tab offers to a command, beside files."""
        if command == "think":
            return [*_THINK, *EFFORTS]
        return self._models.names() if command == "model" else []

    # The commands, each with what follows its name.

    def _do_help(self, argument: str) -> None:
        note(help_text(columns(sys.stderr)))

    def _do_undo(self, argument: str) -> None:
        exchange = self._talk.undo()
        if exchange is None:
            raise PromptError("nothing was said yet, so there is nothing to take back")
        self.unsaved = True
        note(f"Taken back:\n{transcript.recalled([exchange], columns(sys.stderr))}")

    def _do_regen(self, argument: str) -> None:
        if argument and not (argument.isascii() and argument.isdigit() and int(argument)):
            raise PromptError(f"/regen {argument}: write /regen, or /regen N for at most N tokens")
        settings = {"max_tokens": int(argument)} if argument else {}
        self._show(lambda on_part: self._talk.answer_again(on_part, **settings), settings)

    def _do_edit(self, argument: str) -> None:
        if not self._talk.exchanges:
            raise PromptError("nothing was asked yet: write a message first")
        questions = self._talk.exchanges[-1][0]
        if argument:
            content = [*transcript.shown_with(questions), {"type": "text", "text": argument}]
            edited = {**questions[-1], "content": content if len(content) > 1 else argument}
            self._show(lambda on_part: self._talk.answer_again(on_part, [*questions[:-1], edited]))
        elif self._reader.at_terminal:
            self._draft = transcript.question_text(questions)
        else:
            raise PromptError("/edit needs the new words here: write /edit TEXT")

    def _do_system(self, argument: str) -> None:
        if argument:
            self._talk.system = None if argument == "-" else argument
            self.unsaved = True
        note(f"System message: {self._talk.system or 'none'}")

    def _do_think(self, argument: str) -> None:
        word = argument.lower()
        if word and word not in (*_THINK, *EFFORTS):
            raise PromptError(f"/think {argument}: write one of {', '.join((*_THINK, *EFFORTS))}")
        if word:
            told = self._talk.think(_THINK.get(word), None if word in _THINK else word)
            if word in EFFORTS[1:] and "reasoning_effort" not in told:
                note(f"This model knows no efforts: it thinks as it always does, and {word} changes nothing.")
        said = self._talk.options
        now = said.reasoning_effort or next(name for name, is_on in _THINK.items() if is_on is said.enable_thinking)
        note(f"Thinking: {now}{' (as the template says)' if now == 'auto' else ''}")

    def _do_image(self, argument: str) -> None:
        self._show_with("image", argument)

    def _do_video(self, argument: str) -> None:
        self._show_with("video", argument)

    def _show_with(self, kind: str, file: str) -> None:
        if not file:
            raise PromptError(f"no file; write /{kind} FILE")
        part = self._talk.read(kind, unquoted(file), f"/{kind}")
        self._talk.shown.append(part)
        note(f"The next message shows this {kind} ({part[kind].tokens} tokens).")

    def _do_save(self, argument: str) -> None:
        path = Path(unquoted(argument)).expanduser() if argument else self._keeping.path
        if path is None:
            raise PromptError("no file; write /save FILE (.md and .json are transcripts, any other a session)")
        if path.suffix.lower() in (".md", ".json"):
            transcript.write(path, self._talk.messages, self._talk.system)
        elif self._keeping.is_in(path):
            self._keeping.save(self._talk)
            self.unsaved = False
        else:
            save_copy(self._talk, path)
        note(f"Saved to {path}.")

    def _do_load(self, argument: str) -> None:
        if not argument:
            raise PromptError("no file; write /load FILE (a session, or a .json transcript)")
        path = Path(unquoted(argument)).expanduser()
        if path.suffix.lower() == ".md":
            raise PromptError(f"{path} is a transcript to read: load a session or a .json transcript")
        if path.suffix.lower() == ".json":
            exchanges, system = transcript.read(path)
            self._talk.take(exchanges, system)
        else:
            from mlx_qwen35.session import load_session

            session = load_session(path, self._models.model, self._models.processor)
            if self.unsaved:
                self._keeping.save(self._talk)
            self._keeping.go_on_with(path)
            self._talk.go_on(session)
        self.unsaved = True
        note(opening.going_on(str(path), len(self._talk.exchanges), self._talk.computed))
        self._recall()

    def _do_model(self, argument: str) -> None:
        if argument:
            self._models.change(unquoted(argument), self._talk)
            self._last = None
            self.unsaved = True
        note(f"Model: {self._models.name}")

    def _do_stats(self, argument: str) -> None:
        from mlx_qwen35.generation import statistics

        if self._last is None:
            raise PromptError("there is no answer yet")
        note(statistics(self._last))

    def _do_reset(self, argument: str) -> None:
        self._talk.reset()
        self._last = None
        self.unsaved = True


def unquoted(file: str) -> str:
    """The file as it was meant: one that is dropped on a terminal comes with quotes or backslashes."""
    if not os.path.exists(os.path.expanduser(file)):
        with suppress(ValueError):
            words = shlex.split(file)
            if len(words) == 1:
                return words[0]
    return file
