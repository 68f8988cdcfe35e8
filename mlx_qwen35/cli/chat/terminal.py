"""Messages typed at a terminal: editing, history, Tab, pastes and several lines. Knows prompt_toolkit, no commands."""

from __future__ import annotations

import os
import sys
import termios
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from prompt_toolkit import PromptSession
from prompt_toolkit.application import Application
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.data_structures import Size
from prompt_toolkit.document import Document
from prompt_toolkit.history import History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import ColorDepth
from prompt_toolkit.output.vt100 import Vt100_Output
from prompt_toolkit.shortcuts import CompleteStyle

from mlx_qwen35.cli.chat import history
from mlx_qwen35.cli.chat.blocks import continues, opens_block, unquoted
from mlx_qwen35.cli.chat.completion import candidates
from mlx_qwen35.machine.interrupt import Ending, Terminated
from mlx_qwen35.text.screen import colours


class TerminalReader:
    """See reader.Reader. A paste is inserted as it is, with all its lines; Enter sends."""

    at_terminal = True

    def __init__(self, screen: TextIO, ending: Ending, words: Callable[[str], list[str]]) -> None:
        self._ending = ending
        self._block = False  # the message was begun with three quotes
        path = history.history_file()
        self._session: PromptSession[str] = PromptSession(
            history=InMemoryHistory() if path is None else _Kept(path),
            completer=_Tab(words),
            complete_while_typing=False,
            complete_style=CompleteStyle.READLINE_LIKE,
            enable_open_in_editor=True,
            enable_suspend=True,
            multiline=True,
            prompt_continuation=lambda width, number, wrapped: " " * width,
            key_bindings=self._bindings(),
            # A terminal that is asked where its cursor is answers late, and into what is typed then.
            color_depth=None if colours() else ColorDepth.MONOCHROME,
            output=Vt100_Output(screen, lambda: _size(screen), term=os.environ.get("TERM"), enable_cpr=False),
        )

    def read(self, label: str, default: str = "") -> str:
        self._block = False
        app = self._session.app
        with self._ending.deferred(lambda: self._wake(app)):
            self._ending.check()
            shown = [("ansigreen", label)]  # in a colour, or its space is left out of what is written
            text = self._session.prompt(shown, default=default, pre_run=lambda: self._wake(app))
        self._ending.check()
        return text

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside, what is typed or pasted is not echoed, but waits for the next prompt."""
        handle = sys.stdin.fileno()
        try:
            before = termios.tcgetattr(handle)
        except (termios.error, OSError):
            yield
            return
        flags = [*before]
        flags[3] &= ~termios.ECHO
        try:
            termios.tcsetattr(handle, termios.TCSADRAIN, flags)
            self._session.output.enable_bracketed_paste()
            self._session.output.flush()
            yield
        finally:
            with suppress(termios.error, OSError):  # a terminal that is gone
                termios.tcsetattr(handle, termios.TCSADRAIN, before)
                self._session.output.disable_bracketed_paste()
                self._session.output.flush()

    def _wake(self, app: Application[str]) -> None:
        if self._ending.number is not None and app.is_running and app.loop is not None:
            error = Terminated(self._ending.number)
            app.loop.call_soon_threadsafe(lambda: app.is_done or app.exit(exception=error))

    def _bindings(self) -> KeyBindings:
        keys = KeyBindings()

        @keys.add("enter")
        def _(event: KeyPressEvent) -> None:
            buffer = event.current_buffer
            if "\n" not in buffer.text:
                self._block = opens_block(buffer.text)
            at_end = buffer.document.is_cursor_at_the_end
            if (at_end or self._block) and continues(buffer.text, self._block):
                if not self._block:
                    buffer.delete_before_cursor()
                buffer.insert_text("\n")
            else:
                message = unquoted(buffer.text, self._block)
                if message != buffer.text:  # it is remembered without the quotes, too
                    buffer.text = message
                    self._block = False
                buffer.validate_and_handle()

        @keys.add("escape", "enter")
        def _(event: KeyPressEvent) -> None:
            event.current_buffer.insert_text("\n")

        @keys.add("c-c")
        def _(event: KeyPressEvent) -> None:
            if event.current_buffer.text:
                event.current_buffer.reset()
            else:
                event.app.exit(exception=KeyboardInterrupt, style="class:aborting")

        return keys


def _size(screen: TextIO) -> Size:
    there = os.get_terminal_size(screen.fileno())
    return Size(rows=there.lines or 24, columns=there.columns or 80)  # a line by wire says 0


class _Kept(History):
    """The history that a file keeps from chat to chat."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def load_history_strings(self) -> Iterator[str]:
        return reversed(history.read(self._path))

    def store_string(self, string: str) -> None:
        history.add(self._path, string)


class _Tab(Completer):
    def __init__(self, words: Callable[[str], list[str]]) -> None:
        self._words = words

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
        begun = document.current_line_before_cursor if document.line_count == 1 else ""
        for word, there in candidates(begun, self._words):
            yield Completion(word, -there)
