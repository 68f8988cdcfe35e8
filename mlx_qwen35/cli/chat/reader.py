"""Where a chat's messages come from: a terminal with editing, or plain lines.

Knows where lines come from. Editing at a terminal is terminal.py's, which brings a library.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Protocol

from mlx_qwen35.cli.chat.blocks import continues, opens_block, unquoted
from mlx_qwen35.errors import PromptError
from mlx_qwen35.machine.interrupt import Ending


class Reader(Protocol):
    """Reads messages. `read` raises EOFError at the end, KeyboardInterrupt for Ctrl-C where nothing was typed, and
    Terminated where a signal ends the program."""

    at_terminal: bool

    def read(self, label: str, default: str = "") -> str: ...

    def waiting(self) -> AbstractContextManager[None]:
        """Inside, an answer is shown, and messages wait."""
        ...


class LineReader:
    """Plain lines: one is a message. At a terminal that can do no more, several can be joined as at others."""

    def __init__(self) -> None:
        self.at_terminal = sys.stdin.isatty()
        if self.at_terminal:
            with suppress(ImportError):
                import readline  # noqa: F401  - editing for input()

    def read(self, label: str, default: str = "") -> str:
        try:
            if not self.at_terminal:
                return input("")
            if default:
                print(f"(was: {default})", file=sys.stderr)
            lines = [input(label)]
            block = opens_block(lines[0])
            while continues("\n".join(lines), block):
                if not block:
                    lines[-1] = lines[-1][:-1]
                lines.append(input("... "))
            return unquoted("\n".join(lines), block)
        except UnicodeDecodeError as error:
            raise PromptError(f"the input is no text ({error}); give UTF-8") from error

    def waiting(self) -> AbstractContextManager[None]:
        return nullcontext()


def open_reader(ending: Ending, words: Callable[[str], list[str]]) -> Reader:
    """The reader for what standard input is. words: what Tab offers to a command, see completion.py."""
    screens = [stream for stream in (sys.stdout, sys.stderr) if stream.isatty()]
    if not (sys.stdin.isatty() and screens) or os.environ.get("TERM", "dumb") in ("dumb", "unknown"):
        return LineReader()
    from mlx_qwen35.cli.chat.terminal import TerminalReader

    return TerminalReader(screens[0], ending, words)
