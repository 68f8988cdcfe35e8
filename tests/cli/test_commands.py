"""The commands of a chat, through plain lines; tests/cli/test_terminal.py types them."""

import json

import mlx.core as mx
import pytest

from mlx_qwen35 import generation, library
from mlx_qwen35.cli.chat import history
from mlx_qwen35.cli.chat.commands import COMMANDS, Command, help_text, read_line
from mlx_qwen35.cli.chat.completion import candidates
from mlx_qwen35.errors import CheckpointError, PromptError
from mlx_qwen35.session.lock import SessionLock
from tests.checkpoints import random_tensors, tiny_config, write_checkpoint
from tests.speakers import VOCAB
from tests.text.folders import write_text_files

FLAGS = ("chat", "--model", "x", "--no-think")


@pytest.fixture
def asked(monkeypatch):
    """The prompts and settings of all answers."""
    asked, stream = [], generation.stream_generate

    def watched(model, processor, prompt, **options):
        asked.append((prompt.text, options))
        return stream(model, processor, prompt, **options)

    monkeypatch.setattr(generation, "stream_generate", watched)
    return asked


@pytest.mark.parametrize(
    "line, read",
    [
        ("hello", "hello"),
        ("/opt/me/x.txt is what?", "/opt/me/x.txt is what?"),
        ("//text", "//text"),
        ("// a comment", "// a comment"),
        ("/", "/"),
        ("/2 is half", "/2 is half"),
        (" /reset", " /reset"),
        ("/*.py", "/*.py"),
        ("/image of mine\nand more", "/image of mine\nand more"),
        ("/reset ", Command("reset")),
        ("/RESET", Command("reset")),
        ("/?", Command("help")),
        ("/quit", Command("exit")),
        ("/image  a b.png ", Command("image", "a b.png")),
        ("/system be\nkind", Command("system", "be\nkind")),
    ],
)
def test_what_is_a_command(line, read):
    assert read_line(line) == read


@pytest.mark.parametrize("line", ["/rest", "/imge x", "/undo 3", "/tmp is full", "/hello"])
def test_what_is_no_command_is_refused(line):
    with pytest.raises(PromptError, match="[Bb]egin the line with a space") as refused:
        read_line(line)
    if line in ("/rest", "/imge x"):
        assert f"did you mean /{'reset' if line == '/rest' else 'image'}?" in str(refused.value)


def test_unknown_commands_are_not_sent(speak, run):
    speak("hello")
    done = run(*FLAGS, stdin="/rest\none\n")
    assert done.out == "hello\n" and done.err.startswith("error: there is no command /rest: did you mean /reset?")


def test_help_names_all(speak, run):
    speak("hello")
    done = run(*FLAGS, stdin="/help\n")
    assert all(f"/{name}" in done.err and told in done.err for name, (_, told) in COMMANDS.items())
    assert max(map(len, help_text(40).splitlines()[:-1])) < 100


def test_undo_and_regen(speak, run, asked):
    speak("hello", "two", "three")
    done = run(*FLAGS, stdin="/undo\n/regen\none\n/regen\ntwo\n/undo\nthree\n")
    assert done.out == "hello\nhello\ntwo\ntwo\n"
    assert "error: nothing was said yet" in done.err and "error: nothing was asked yet" in done.err
    assert "Taken back:\n> two\ntwo\n" in done.err
    texts = [text for text, _ in asked]
    assert texts[0] == texts[1] and "two" not in texts[3].replace("<think>", "")


def test_regen_with_more_room(speak, run, asked):
    speak("hello the hello")
    done = run(*FLAGS, "-n", 2, stdin="one\n/regen 40\n/regen x\n")
    assert "cut after 2 tokens (-n). /regen 4 answers again with more room." in done.err
    assert done.out.endswith("hello the hello\n") and done.err.count("error: /regen x") == 1
    assert [options["max_tokens"] for _, options in asked] == [2, 40]


def test_an_answer_that_cannot_be_given_again_stays(speak, run, asked, tmp_path):
    said, told = speak("hello", "two"), tmp_path / "told.json"
    object.__setattr__(said.processor, "context_length", 60)
    done = run(*FLAGS, stdin=f"one\n/edit {'hello ' * 80}\n/save {told}\n")
    assert "error: the prompt has" in done.err
    assert [message["content"] for message in json.loads(told.read_text())["messages"]] == ["one", "hello"]


def test_edit(speak, run, asked):
    speak("hello", "two")
    done = run(*FLAGS, stdin="one\n/edit three\n/edit\n")
    assert done.out == "hello\nhello\n" and "/edit TEXT" in done.err
    assert "three" in asked[1][0] and "one" not in asked[1][0]


def test_system_and_think(speak, run, asked):
    speak("hello", "two", "three", "four")
    lines = ["one", "/system be kind", "/think on", "two", "/think", "/system -", "/think low", "three", "/think much"]
    done = run(*FLAGS, "--system", "be short", stdin="\n".join(lines))
    texts = [text for text, _ in asked]
    assert "be short" in texts[0] and texts[0].endswith("</think>\n\n")
    assert "be kind" in texts[1] and "be short" not in texts[1] and texts[1].endswith("<think>\n")
    assert "be kind" not in texts[2] and texts[2].endswith("<think>\n")
    assert "Thinking: on" in done.err and "low changes nothing" in done.err
    assert "error: /think much: write one of on, off, auto, none, minimal, low" in done.err


def test_stats(speak, run):
    speak("hello")
    done = run(*FLAGS, stdin="/stats\none\n/stats\n")
    assert "error: there is no answer yet" in done.err and "Generation: 2 tokens" in done.err


def test_save_and_load(speak, run, tmp_path):
    speak("hello", "two", "three")
    told, page = tmp_path / "told.json", tmp_path / "told.MD"
    done = run(*FLAGS, "--system", "be", stdin=f"one\ntwo\n/save {told}\n/save {page}\n/save {told}\n/save\n")
    assert done.err.count("Saved to") == 2 and f"error: {told} is there already" in done.err
    assert "error: no file; write /save FILE" in done.err
    messages = json.loads(told.read_text())["messages"]
    assert [message["role"] for message in messages] == ["system", *["user", "assistant"] * 2]
    assert page.read_text().startswith("## System\n\nbe\n\n## You\n\none\n\n## Answer\n\nhello\n")
    done = run(*FLAGS, stdin=f"/load {page}\n/load {tmp_path / 'none.json'}\n/load {told}\nthree\n/system\n")
    assert done.out == "three\n" and "2 questions, 0 tokens are computed" in done.err
    assert "> two\ntwo\n" in done.err and "System message: be" in done.err and done.err.count("error: ") == 2


@pytest.mark.parametrize(
    "text, reason",
    [
        ("{", "no JSON"),
        ("3", "holds no messages"),
        ('[{"role": "user", "content": "a"}]', "no answer"),
        ('[{"role": "assistant", "content": "a"}]', "no question before it"),
    ],
)
def test_what_is_no_transcript(speak, run, tmp_path, text, reason):
    speak("hello", "two")
    (tmp_path / "a.json").write_text(text)
    done = run(*FLAGS, stdin=f"one\n/load {tmp_path / 'a.json'}\ntwo\n")
    assert reason in done.err and done.out == "hello\ntwo\n"


def test_sessions_loaded_and_saved(run, tmp_path):
    first, second, copy = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    flags = ("chat", "--temp", 0, "--no-think", "-n", 4)
    run(*flags, "--session", first, stdin=f"What is 2 + 3?\n/save {copy}\n")
    lines = f"Hello!\n/load {first}\nWhat is 4 + 4?\n/save {tmp_path / 'told.json'}\n"
    done = run(*flags, "--session", second, "--system", "be kind", stdin=lines)
    assert "1 question, " in done.err and done.status == 0, done.err
    for file, count in ((first, 2), (second, 1), (copy, 1)):  # the chat goes on in the file that was loaded
        done = run(*flags, "--session", file, stdin="/system\n")
        assert f"{count} question" in done.err
        assert ("be kind" in done.err) == (file is second)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c", "told.json"]
    (tmp_path / "mine").write_text("not to be lost")
    done = run(*flags, stdin=f"/save {tmp_path / 'mine'}\n")
    assert "is no session: give another name" in done.err and (tmp_path / "mine").read_text() == "not to be lost"


def test_a_session_that_another_has_is_not_loaded(run, tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    flags = ("chat", "--temp", 0, "--no-think", "-n", 4)
    run(*flags, "--session", first, stdin="What is 2 + 3?\n")
    kept = first.read_bytes()
    with SessionLock(first):
        lines = f"Hello!\n/load {first}\n/save {first}\nWhat is 4 + 4?\n"
        done = run(*flags, "--session", second, stdin=lines)
    assert done.err.count(f"error: {first} is in use by another program") == 2 and first.read_bytes() == kept
    assert "2 questions, " in run(*flags, "--session", second, stdin="").err


def test_a_chat_that_says_nothing_writes_nothing(run, tmp_path):
    file, flags = tmp_path / "a", ("chat", "--temp", 0, "--no-think", "-n", 4)
    run(*flags, "--session", file, stdin="")
    before = file.stat()
    run(*flags, "--session", file, stdin="/help\n")
    assert file.stat().st_mtime_ns == before.st_mtime_ns and file.stat().st_ino == before.st_ino
    run(*flags, "--session", file, stdin="/system be\n")
    assert "System message: be" in run(*flags, "--session", file, stdin="/system\n").err


@pytest.fixture
def other(tmp_path):
    folder = tmp_path / "other"
    config = tiny_config("dense", vocab_size=VOCAB, eos_token_id=VOCAB - 1, max_position_embeddings=6000)
    write_checkpoint(folder, config, random_tensors(config))
    return write_text_files(folder)


@pytest.mark.parametrize("beside", [True, False])
def test_another_model_goes_on(run, checkpoint, other, asked, monkeypatch, beside):
    from mlx_qwen35.cli.chat import models

    loaded, load = [], library.load_held
    monkeypatch.setattr(models, "_fit_together", lambda folder: beside)

    def load_held(held, **options):
        loaded.append((load(held, **options), mx.get_active_memory()))
        return loaded[-1][0]

    monkeypatch.setattr(library, "load_held", load_held)
    done = run("chat", "--model", checkpoint, "--no-think", "-n", 3, stdin=f"hello\n/model {other}\nagain\n/model\n")
    assert done.status == 0 and done.err.count(f"Model: {other}") == 2
    assert "to make room" in done.err or beside
    assert "hello" in asked[1][0] and "again" in asked[1][0]
    (first, _), (second, _) = loaded
    assert type(first).__name__ == type(second).__name__ == "UnloadedModel"


@pytest.mark.parametrize("beside", [True, False])
def test_a_model_that_cannot_be_loaded_leaves_the_old_one(run, checkpoint, other, asked, monkeypatch, beside, tmp_path):
    from mlx_qwen35.cli.chat import models

    monkeypatch.setattr(models, "_fit_together", lambda folder: beside)
    load = library.load_held

    def load_held(held, **options):
        if held.folder == other:
            raise CheckpointError("damaged in the middle")
        return load(held, **options)

    monkeypatch.setattr(library, "load_held", load_held)
    lines = f"hello\n/model {other}\n/model {tmp_path / 'none'}\nagain\n/model\n"
    done = run("chat", "--model", checkpoint, "--no-think", "-n", 3, stdin=lines)
    assert "error: damaged in the middle" in done.err and done.err.count("error: ") == 2 and done.status == 0
    assert ("is loaded again" in done.err) != beside
    assert "hello" in asked[1][0] and "again" in asked[1][0] and f"Model: {checkpoint}" in done.err


def test_a_model_that_cannot_see_what_was_shown_is_refused_before_it_is_loaded(run, other, tmp_path):
    from benchmarks.chat_script import picture

    picture(3).save(tmp_path / "p.png")
    lines = f"/image {tmp_path / 'p.png'}\nWhat is in the picture?\n/model {other}\n/model\n"
    done = run("chat", "--temp", 0, "--no-think", "-n", 4, stdin=lines)
    assert "error: " in done.err and "no vision tower" in done.err and "Model: demo" in done.err


def test_tab(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a b.png").touch()
    (tmp_path / ".hidden").touch()
    (tmp_path / "album").mkdir()

    words = {"think": ["on", "off"]}

    def ended(text):
        found = candidates(text, lambda name: words.get(name, []))
        return [text[: len(text) - there] + word for word, there in found]

    assert ended("/re") == ["/regen ", "/reset"] and ended("say /re") == []
    assert ended("/image a") == ["/image a b.png", "/image album/"]
    assert ended("/image ") == ["/image a b.png", "/image album/"]
    assert ended("/image .h") == ["/image .hidden"]
    assert ended("/think o") == ["/think on", "/think off"]
    assert ended("what is in ./al") == ["what is in ./album/"] and ended(f"{tmp_path}/al") == [f"{tmp_path}/album/"]


def test_history_is_private_and_bounded(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_QWEN35_HISTORY", str(tmp_path / "a" / "h"))
    file = history.history_file()
    for number in range(2 * history.MOST + 5):
        history.add(file, f"ä\n{number}")
    for text in (" secret", "", "  ", "x" * 30_000):
        history.add(file, text)
    with open(file, "ab") as more:
        more.write(b"\xff{\n3\n")
    found = history.read(file)
    assert found[-1] == f"ä\n{2 * history.MOST + 4}" and history.MOST - 2 <= len(found) <= history.MOST
    assert len(file.read_bytes().splitlines()) == history.MOST
    assert file.stat().st_mode & 0o777 == 0o600 and file.parent.stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("MLX_QWEN35_HISTORY", "")
    assert history.history_file() is None
