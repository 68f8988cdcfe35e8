"""What is piped into `generate` joins the prompt, and nothing that is left open keeps it waiting."""

import os
import socket
import subprocess
import sys
import time

import pytest

from mlx_qwen35.cli import stdin
from mlx_qwen35.errors import PromptError
from tests.conftest import CHECKOUT

pytestmark = pytest.mark.skipif(os.name != "posix", reason="pipes of POSIX")


@pytest.fixture
def standard_input(monkeypatch, tmp_path):
    """standard_input(kind, data) -> the end to write to, if any, after `data` was written."""
    opened = []

    def give(kind: str, data: bytes = b"", *, end: bool = True):
        ours = None
        if kind == "file":
            (tmp_path / "in").write_bytes(data)
            theirs = os.open(tmp_path / "in", os.O_RDONLY)
        elif kind == "pipe":
            theirs, ours = os.pipe()
        elif kind == "socket":
            one, two = socket.socketpair()
            theirs, ours = one.detach(), two.detach()
        else:
            theirs = os.open("/dev/null", os.O_RDONLY)
        if ours is not None:
            os.write(ours, data)
            if end:
                os.close(ours)
            else:
                opened.append(ours)
        monkeypatch.setattr("sys.stdin", os.fdopen(theirs, "r", encoding="utf-8"))
        return ours

    monkeypatch.setattr(stdin, "SOON", 0.2)
    yield give
    for number in opened:
        os.close(number)


@pytest.mark.parametrize("kind", ["file", "pipe", "socket"])
def test_what_is_piped_in_follows_the_prompt(standard_input, kind):
    standard_input(kind, "one\r\ntwo €\n\n".encode())
    assert stdin.read_prompt(["Review this:"]) == ("Review this:\n\none\ntwo €", False)
    standard_input(kind, b"alone\n")
    assert stdin.read_prompt([]) == ("alone", False)
    standard_input(kind, b"text\n")
    assert stdin.read_prompt(["before", "-", "behind"]) == ("before\n\ntext\n\nbehind", False)


@pytest.mark.parametrize("kind", ["file", "pipe", "socket", "nothing"])
def test_an_empty_one_adds_nothing(standard_input, kind):
    standard_input(kind)
    assert stdin.read_prompt(["hi"]) == ("hi", False)
    standard_input(kind)
    assert stdin.read_prompt([]) == (None, False)


@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_a_pipe_that_is_left_open_is_not_waited_for(standard_input, kind, capsys):
    ours = standard_input(kind, end=False)
    start = time.monotonic()
    assert stdin.read_prompt(["hi"]) == ("hi", True)
    assert time.monotonic() - start < 5
    stdin.tell_missed()
    assert capsys.readouterr().err == ""  # nothing is missed
    os.write(ours, b"late")
    stdin.tell_missed()
    assert "was not read: -p - waits for it" in capsys.readouterr().err


def test_one_that_ends_late_is_no_miss(standard_input, capsys):
    standard_input("pipe")
    stdin.tell_missed()
    assert capsys.readouterr().err == ""


def test_what_was_begun_is_read_to_its_end_and_said_to_be(monkeypatch, capsys):
    monkeypatch.setattr(stdin, "PATIENT", 0.1)
    code = "import time, sys; print('one', flush=True); time.sleep(1); print('two')"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as slow:
        monkeypatch.setattr("sys.stdin", slow.stdout)
        monkeypatch.setattr(stdin, "SOON", 30)
        assert stdin.read_prompt(["hi"]) == ("hi\n\none\ntwo", False)
    assert capsys.readouterr().err == "Reading standard input to its end before answering.\n"


def test_no_standard_input_at_all(monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    assert stdin.read_prompt(["hi"]) == ("hi", False)


def test_what_is_no_text_or_asked_for_twice(standard_input):
    standard_input("pipe", b"\xff\xfe\x00")
    with pytest.raises(PromptError, match="standard input is no text .*give UTF-8"):
        stdin.read_prompt(["hi"])
    with pytest.raises(PromptError, match="only once"):
        stdin.read_prompt(["-", "-"])


def test_whole_processes(checkpoint):
    """A program that leaves its pipe open, and one that writes: neither hangs, and the second is asked."""
    asked = [sys.executable, "generate.py", "--model", str(checkpoint), "-p", "hi", "-n", "3", "--json", "--stats"]
    pipe = subprocess.PIPE
    counts = []
    for data in (None, b"hello the hello"):
        with subprocess.Popen(asked, cwd=CHECKOUT, stdin=pipe, stdout=pipe, stderr=pipe) as process:
            if data is not None:
                process.stdin.write(data)
                process.stdin.close()
            out = process.stdout.read()  # to its end, while the pipe is open
            err = process.stderr.read().decode()
            assert process.wait(timeout=60) == 0 and out, err
        counts.append(int(err.partition("Prompt: ")[2].split()[0]))
    assert counts[1] > counts[0] + 3
