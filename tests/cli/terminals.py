"""A real terminal for tests: a program behind a pseudo-terminal (pexpect), and the screen it draws (pyte)."""

import os
import sys
import time

import pytest

from tests.conftest import CHECKOUT

pexpect = pytest.importorskip("pexpect", reason="pexpect is not installed (extra 'test')")
pyte = pytest.importorskip("pyte", reason="pyte is not installed (extra 'test')")
SECONDS = 60
PASTE, PASTED = "\x1b[200~", "\x1b[201~"
UP, CTRL_C, CTRL_D, CTRL_Z = "\x1b[A", "\x03", "\x04", "\x1a"
CHAT = (sys.executable, "-m", "mlx_qwen35.cli.main", "chat")


class Terminal:
    """`screen`: what a user sees, with what has scrolled away; `raw`: all that was written, escapes included."""

    def __init__(self, *command: object, columns: int = 80, rows: int = 40, **env: str) -> None:
        inherited = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS", "LINES")}
        program, *arguments = map(str, command)
        self.child = pexpect.spawn(
            program,
            arguments,
            cwd=str(CHECKOUT),
            env={**inherited, "TERM": "xterm-256color", "PYTHONPATH": str(CHECKOUT), **env},
            dimensions=(rows, columns),
            encoding="utf-8",
            codec_errors="replace",
            timeout=SECONDS,
        )
        self.child.delaybeforesend = None
        self.raw = ""
        self._pyte = pyte.HistoryScreen(columns, rows, history=5000, ratio=1e-9)
        self._stream = pyte.Stream(self._pyte)

    @property
    def screen(self) -> str:
        past = [_line(line, self._pyte.columns) for line in self._pyte.history.top]
        return "\n".join(line.rstrip() for line in [*past, *self._pyte.display]).rstrip()

    @property
    def last_line(self) -> str:
        return self.screen.splitlines()[-1] if self.screen else ""

    def type(self, text: str) -> None:
        self.child.send(text)

    def read(self, seconds: float = 0.05) -> None:
        try:
            while True:
                text = self.child.read_nonblocking(65536, timeout=seconds)
                self.raw += text
                self._stream.feed(text)
                seconds = 0
        except (pexpect.TIMEOUT, pexpect.EOF):
            pass

    def wait(self, met, seconds: float = SECONDS) -> None:
        """Reads until met(self), or a text is on the screen."""
        deadline = time.monotonic() + seconds
        while not (met in self.screen if isinstance(met, str) else met(self)):
            assert time.monotonic() < deadline and (self.child.isalive() or not self.read()), self.screen
            self.read()

    def wait_for_prompt(self) -> None:
        self.wait(lambda terminal: terminal.last_line in (">", "> "))

    def say(self, text: str) -> None:
        """Types a line at the prompt, and waits until the next is there."""
        self.wait_for_prompt()
        count = self.raw.count(SENT)
        self.type(text + "\r")
        self.wait(lambda terminal: terminal.raw.count(SENT) > count)
        self.wait_for_prompt()

    def begin(self, text: str, characters: int = 60) -> None:
        """Types a line at the prompt, and waits until the answer has begun."""
        self.wait_for_prompt()
        count = self.raw.count(SENT)
        self.type(text + "\r")
        self.wait(lambda terminal: terminal.raw.count(SENT) > count)
        at = self.raw.rfind(SENT)
        self.wait(lambda terminal: len(terminal.raw) > at + characters)

    def left(self) -> int:
        """The exit status once it has ended; a signal's number and 128 for one that was killed."""
        deadline = time.monotonic() + SECONDS
        while self.child.isalive():
            assert time.monotonic() < deadline, self.screen
            self.read()
        self.read()
        self.child.close()
        return self.child.exitstatus if self.child.signalstatus is None else 128 + self.child.signalstatus


SENT = "\x1b[?2004l"  # pastes are no longer told from typing: a prompt has ended


def _line(line, columns: int) -> str:
    return "".join(line[column].data for column in range(columns))
