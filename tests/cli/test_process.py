"""Whole processes: the doors, Ctrl-C, a closed pipe, a terminal."""

import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest

from tests.conftest import CHECKOUT

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and terminals of POSIX")
SECONDS = 60
SENT = "\x1b[?2004l"  # a line was sent: no more pastes are expected


def start(*argv: str, **options) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, *map(str, argv)], cwd=CHECKOUT, **options)


def test_the_doors_answer_help_without_mlx():
    for door in ("generate.py", "convert.py"):
        code = (
            f"import sys, runpy; sys.argv = [{door!r}, '--help']\ntry: runpy.run_path({door!r}, run_name='__main__')\n"
        )
        code += "except SystemExit as left: print(left.code, 'mlx.core' in sys.modules)"
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, timeout=SECONDS
        )
        assert done.stdout.splitlines()[-1] == "0 False", done.stderr
        assert "usage: mlx-qwen35" in done.stdout


def test_ctrl_c_ends_the_answer(checkpoint):
    pipe = subprocess.PIPE
    process = start("generate.py", "--model", checkpoint, "-p", "hi", "-n", "-1", "--stats", stdout=pipe, stderr=pipe)
    shown = process.stdout.read(40)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 130
    assert len(shown) == 40 and (shown + out).endswith(b"\n")
    assert b"Traceback" not in err and b"Generation: " in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_ends_the_answer_which_a_session_keeps(checkpoint, tmp_path, number):
    pipe, file = subprocess.PIPE, tmp_path / "kept"
    argv = ("generate.py", "--model", checkpoint, "-p", "hi", "-n", "-1", "--session", file)
    process = start(*argv, stdout=pipe, stderr=pipe)
    process.stdout.read(40)
    process.send_signal(number)
    out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 128 + number and out.endswith(b"\n") and b"Traceback" not in err
    process = start(*argv[:5], "-n", 1, *argv[7:], stdout=pipe, stderr=pipe)
    assert int(process.communicate(timeout=SECONDS)[1].split(b"kept: ")[1].split()[0].replace(b",", b"")) > 20
    assert [*tmp_path.iterdir()] == [file]


def test_a_closed_pipe(checkpoint):
    pipe = subprocess.PIPE
    process = start("generate.py", "--model", checkpoint, "-p", "hi", "-n", "-1", stdout=pipe, stderr=pipe)
    process.stdout.read(20)
    process.stdout.close()
    assert process.wait(timeout=SECONDS) == 141
    assert process.stderr.read() == b""
    process.stderr.close()


class Terminal:
    """A chat behind a pseudo-terminal."""

    def __init__(self, *argv: str) -> None:
        self._ours, theirs = os.openpty()
        self.process = start(
            *argv,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            preexec_fn=lambda: (os.setsid(), _adopt_terminal()),
            env={**os.environ, "TERM": "xterm"},
        )
        os.close(theirs)
        self.screen = ""

    def wait_for(self, text: str, more: int = 0) -> None:
        """Reads until `text` and `more` characters after it have come."""
        assert self._reads(text, more, SECONDS), self.screen

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def press_ctrl_c_until(self, text: str) -> None:
        """Python misses a Ctrl-C that comes just when it begins to wait for a line; a person presses again."""
        for _ in range(SECONDS):
            self.type("\x03")
            if self._reads(text, 0, 1):
                return
        raise AssertionError(self.screen)

    def left(self, *, pressing: str = "") -> int:
        """The exit status, once it has left."""
        for _ in range(SECONDS):
            if pressing and self.process.poll() is None:
                self.type(pressing)
            self._reads("what is never said", 0, 0.2)
            with suppress(subprocess.TimeoutExpired):
                status = self.process.wait(timeout=4.8 if pressing else 0.8)
                os.close(self._ours)
                return status
        self.process.kill()
        raise AssertionError(self.screen)

    def _reads(self, text: str, more: int, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while (at := self.screen.find(text)) < 0 or len(self.screen) < at + len(text) + more:
            ready, _, _ = select.select([self._ours], [], [], max(0, deadline - time.monotonic()))
            try:
                read = os.read(self._ours, 4096) if ready else b""
            except OSError:  # the other side is closed
                read = b""
            if not read:
                return False
            self.screen += read.decode(errors="replace")
        self.screen = self.screen[at + len(text) :]
        return True


def _adopt_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_ctrl_c_ends_the_answer_and_not_the_chat(checkpoint):
    chat = Terminal("-m", "mlx_qwen35.cli.main", "chat", "--model", checkpoint, "-n", "-1")
    chat.wait_for("> ")
    for _ in range(2):
        chat.type("hello\n")
        chat.wait_for(SENT, more=60)
        chat.type("\x03")
        chat.wait_for("> ")
    chat.type("/exit\n")
    assert chat.left() == 0


def test_a_second_ctrl_c_at_the_prompt_leaves(checkpoint):
    chat = Terminal("-m", "mlx_qwen35.cli.main", "chat", "--model", checkpoint)
    chat.wait_for("> ")
    chat.press_ctrl_c_until("Ctrl-C again leaves.")
    chat.wait_for("> ")
    assert chat.left(pressing="\x03") == 0
