"""`chat` in a real terminal: typing, pastes, history, drawing, and every way to end it."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_qwen35.text.cells import width
from tests.conftest import CHECKOUT
from tests.text.test_drawing import ANSWER, draw

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and terminals of POSIX")
if os.name == "posix":
    from tests.cli.terminals import CHAT, CTRL_C, CTRL_D, CTRL_Z, PASTE, PASTED, SENT, UP, Terminal

DEMO = ("--temp", 0, "--no-think", "-n", 40)


@pytest.fixture
def chat(tmp_path):
    """chat(*flags, columns=.., NAME=..) opens one; all are closed at the end."""
    opened = []

    def chat(*flags: object, **settings) -> "Terminal":
        opened.append(Terminal(*CHAT, *flags, XDG_STATE_HOME=str(tmp_path / "state"), **settings))
        return opened[-1]

    yield chat
    for terminal in opened:
        terminal.child.close(force=True)


def said(path: Path) -> list[str]:
    """What was asked, by a transcript."""
    messages = json.loads(path.read_text())["messages"]
    return [message["content"] for message in messages if message["role"] == "user"]


def test_several_lines_commands_and_history(chat, tmp_path):
    told = tmp_path / "told.json"
    first = chat(*DEMO)
    first.wait("What is 17 + 25?")  # the demo says what to ask
    first.wait_for_prompt()
    assert " ".join(first.screen.split()).count("it knows nothing else.") == 1 and "jacket, violin" in first.screen
    first.type(f"{PASTE}Reverse this:\r\nstone \\\r\n/help{PASTED}")
    first.wait("stone \\\n  /help")
    first.type("\r")
    for typed in ("one\\\rtwo", '"""\rthree\r\rfour"""', "/opt/me/x.txt is what?", "// text", " /help me"):
        first.say(typed)
    first.say("/hepl")
    assert "did you mean /help?" in first.screen and "Commands" not in first.screen
    first.say("/sa\ta\x7f" + str(told)[:-3] + "\t")  # Tab ends the command's name, then the file's once it is there
    first.say(f"/save {told}")
    assert said(told) == [
        "Reverse this:\nstone \\\n/help", "one\ntwo", "three\n\nfour", "/opt/me/x.txt is what?", "// text", " /help me"
    ]  # fmt: skip
    first.say("What is 2 + 3?")
    first.say(" a secret")
    first.wait_for_prompt()
    first.type(CTRL_D)
    assert first.left() == 0
    (kept,) = (tmp_path / "state").rglob("*.jsonl")
    assert kept.stat().st_mode & 0o777 == 0o600 and "secret" not in kept.read_text()

    second = chat(*DEMO)
    second.wait_for_prompt()
    second.type(UP)
    second.wait("> What is 2 + 3?")
    second.type(UP * 20)
    second.wait("stone \\\n  /help")
    second.type(CTRL_C)
    second.wait_for_prompt()
    second.type(CTRL_C)
    second.wait("Ctrl-C again leaves.")
    second.wait_for_prompt()
    second.type(CTRL_C)
    assert second.left() == 0


def test_edit_undo_and_regen_at_the_prompt(chat, tmp_path):
    told = tmp_path / "told.json"
    there = chat("--temp", 0)
    there.say("What is 2 + 3?")
    there.wait_for_prompt()
    there.type("/edit\r")
    there.wait(lambda terminal: terminal.last_line == "> What is 2 + 3?")
    there.type("\x7f\x7f4?\r")
    there.wait_for_prompt()
    there.say("What is 5 + 5?")
    there.say("/regen")
    there.say("/undo")
    assert "Taken back:\n> What is 5 + 5?" in there.screen
    there.say(f"/save {told}")
    assert said(told) == ["What is 2 + 4?"]
    assert json.loads(told.read_text())["messages"][1]["content"] == "6"


TERM = pytest.param(signal.SIGTERM, marks=pytest.mark.soak)  # whose way is that of the next


@pytest.mark.parametrize("number", [TERM, signal.SIGHUP, signal.SIGKILL], ids=lambda number: number.name)
def test_killed_in_the_middle_of_an_answer(chat, checkpoint, tmp_path, number):
    file = tmp_path / "kept"
    flags = ("--model", checkpoint, "--session", file, "--no-think")
    first = chat(*flags, "-n", 12)
    first.say("hello the first")
    assert file.exists()
    first.begin("/regen 50000")  # it goes on for long; what was said before is in the file
    os.kill(first.child.pid, number)
    assert first.left() == 128 + number
    assert [*tmp_path.glob(".kept.lock")] == ([tmp_path / ".kept.lock"] if number == signal.SIGKILL else [])
    told = tmp_path / "told.json"
    second = chat(*flags, "-n", 3)
    second.wait("1 question, ")
    second.say(f"/save {told}")
    question, answer = json.loads(told.read_text())["messages"]
    assert question["content"] == "hello the first" and "hello the first" in second.screen
    if number == signal.SIGKILL:  # the last answer that was finished
        assert 5 < len(answer["content"]) < 200
    else:  # all that came, in the place of the one before; the end of it as it was shown
        shown = re.findall(r"[a-zA-Z0-9]{2,}", answer["content"])
        written = re.sub(r"\s|\x1b\[[0-9;?]*[a-zA-Z]", "", first.raw)
        assert len(answer["content"]) > 50 and all(word in written for word in shown)
    second.say("hello again")
    second.type(CTRL_D)
    assert second.left() == 0


def test_a_terminal_that_is_closed_is_a_hangup(chat, checkpoint, tmp_path):
    file = tmp_path / "kept"
    there = chat("--model", checkpoint, "--session", file, "--no-think", "-n", -1)
    there.begin("hello")
    there.child.ptyproc.fileobj.close()
    _, status = os.waitpid(there.child.pid, 0)
    for door in (there.child, there.child.ptyproc):
        door.closed = door.terminated = True
    assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGHUP and file.exists()
    done = ask("--model", checkpoint, "--session", file, stdin="")
    assert "1 question, " in done.stderr and "> hello" in done.stderr


def test_what_is_typed_during_an_answer_waits(chat, checkpoint, tmp_path):
    there, told = chat("--model", checkpoint, "--no-think", "-n", 150), tmp_path / "told.json"
    there.begin("hello")
    there.type(f"{PASTE}first\rsecond{PASTED}")
    there.wait("first\n  second")  # not before the prompt
    count = there.raw.count(SENT)
    assert there.screen.endswith("> first\n  second") and there.screen.count("second") == 1
    there.type("\r")
    there.wait(lambda terminal: terminal.raw.count(SENT) > count)
    there.say(f"/save {told}")
    assert said(told) == ["hello", "first\nsecond"]


def test_a_signal_at_the_prompt(chat, tmp_path):
    there = chat(*DEMO, "--session", tmp_path / "kept")
    there.wait_for_prompt()
    there.type("half a mess")
    there.wait("half a mess")
    os.kill(there.child.pid, signal.SIGTERM)
    assert there.left() == 128 + signal.SIGTERM
    assert there.raw.endswith("\x1b[?2004l") or "\x1b[?2004l" in there.raw[-60:]  # the terminal is as it was
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept"]


def test_ctrl_c_cuts_an_answer_which_is_kept(chat, checkpoint, tmp_path):
    there = chat("--model", checkpoint, "--session", tmp_path / "kept", "--no-think", "-n", -1)
    there.begin("hello")
    there.type(CTRL_C)
    there.wait_for_prompt()
    os.kill(there.child.pid, signal.SIGKILL)
    assert there.left() == 128 + signal.SIGKILL
    done = ask("--model", checkpoint, "--session", tmp_path / "kept", stdin="")
    assert "1 question, " in done.stderr and "> hello" in done.stderr


def ask(*flags: object, stdin: str, command: str = "chat") -> subprocess.CompletedProcess:
    argv = [sys.executable, "-m", "mlx_qwen35.cli.main", command, *map(str, flags)]
    return subprocess.run(argv, cwd=CHECKOUT, input=stdin, capture_output=True, text=True, timeout=60)


def test_a_second_program_on_one_file_is_told(chat, tmp_path):
    file, link = tmp_path / "kept", tmp_path / "link"
    link.symlink_to(file)
    there = chat(*DEMO, "--session", file)
    there.say("What is 2 + 3?")
    kept = file.read_bytes()
    for command, name in (("chat", file), ("generate", link)):
        more = ("-p", "hello") if command == "generate" else ()
        done = ask("--session", name, *more, stdin="hello\n", command=command)
        assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1
        assert f"{file} is in use by another program (process {there.child.pid})" in done.stderr
    assert file.read_bytes() == kept
    os.kill(there.child.pid, signal.SIGKILL)
    there.left()
    done = ask("--session", file, "-p", "What is 2 + 3?", "-n", 5, "--temp", 0, stdin="", command="generate")
    assert done.returncode == 0 and sorted(path.name for path in tmp_path.iterdir()) == ["kept", "link", "state"]


def test_no_colours_and_a_narrow_terminal(chat):
    there = chat("--temp", 0, columns=20, NO_COLOR="1")
    there.say("What is 17 + 25?")
    there.say("/help")
    screen = there.screen
    assert "[thinking]\n7+5=12, 1+2+1=4\n\n[answer]\n42\n" in screen
    assert not any(f"\x1b[{code}m" in there.raw for code in (1, 2, 3, 4, 31, 32, 36, "0;32", "0;1"))
    long = "a message that is longer than the line"
    there.type(long)
    there.wait(lambda terminal: long.replace(" ", "") in "".join(terminal.screen.split()))
    there.child.setwinsize(40, 60)
    there._pyte.resize(40, 60)
    there.wait(lambda terminal: long in terminal.screen)


def test_a_signal_while_lines_are_read_from_a_pipe(checkpoint, tmp_path):
    command = [*map(str, (*CHAT, "--model", checkpoint, "--session", tmp_path / "kept", "-n", 3))]
    process = subprocess.Popen(command, cwd=CHECKOUT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process.stdin.write(b"hello\n")
    process.stdin.flush()
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    process.communicate()
    assert "1 question, " in ask("--model", checkpoint, "--session", tmp_path / "kept", stdin="").stderr


DRAW = """
import sys
from types import SimpleNamespace
from mlx_qwen35.text.screen import Screen
from mlx_qwen35.text.reply import ContentDelta, ReasoningDelta
from tests.text.test_drawing import ANSWER
screen = Screen()
screen.show(SimpleNamespace(text="", events=[ReasoningDelta("why \x1b[31m not")]))
for at in range(0, len(ANSWER), 3):
    screen.show(SimpleNamespace(text=ANSWER[at : at + 3], events=[ContentDelta(ANSWER[at : at + 3])]))
screen.end()
print("$", end="")
"""


@pytest.mark.parametrize("columns", [20, 60])
def test_markdown_is_drawn_once_and_scrolls(columns):
    there = Terminal(sys.executable, "-c", DRAW, columns=columns, rows=8)  # most of it scrolls away
    assert there.left() == 0
    assert there.screen == "why \u241b[31m not\n\n" + wrapped(draw(ANSWER, columns), columns) + "$"
    assert not re.search(r"\x1b\[[0-9;]*[A-HJKSTfn]|\x1b[78M]|\r(?!\n)|\x08", there.raw)  # no going back


def wrapped(text: str, columns: int) -> str:
    """As a terminal breaks the lines that are too long."""
    lines = []
    for line in text.split("\n"):
        while width(line) > columns:
            at = max(at for at in range(len(line)) if width(line[:at]) <= columns)
            lines.append(line[:at].rstrip())
            line = line[at:]
        lines.append(line.rstrip())
    return "\n".join(lines)


def test_stopped_and_back_again(chat, tmp_path):
    shell = Terminal("bash", "--norc", "--noprofile", "-i", PS1="$ ", XDG_STATE_HOME=str(tmp_path / "state"))
    command = " ".join(map(str, (*CHAT, *DEMO)))
    shell.wait(lambda terminal: terminal.last_line == "$")
    shell.type(command + "\r")
    shell.wait_for_prompt()
    shell.type("What is ")
    shell.wait(lambda terminal: terminal.last_line == "> What is")
    shell.type(CTRL_Z)
    shell.wait(lambda terminal: terminal.last_line == "$")
    shell.type("fg\r")
    shell.wait(lambda terminal: terminal.last_line == "> What is")
    shell.type("2 + 3?\r")
    shell.wait("\n5\n")
    shell.wait_for_prompt()
    shell.type(CTRL_D)
    shell.wait(lambda terminal: terminal.last_line == "$")
    shell.type("exit\r")
    assert shell.left() == 0
