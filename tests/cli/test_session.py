"""--session: what a command computed and said, another goes on from."""

import json

import mlx.core as mx
import pytest

from mlx_qwen35 import library
from tests.conftest import CHECKOUT

DEMO = CHECKOUT / "mlx_qwen35" / "demo"


def statistics(done) -> dict:
    assert done.status == 0, done.err
    return json.loads(done.out)["statistics"]


def test_a_document_is_read_once(run, tmp_path):
    document, file = "Ada has a red lamp and a blue chair. " * 20, tmp_path / "a.session"
    ask = ("generate", "--json", "-n", 3, "--temp", 0, "--system", document, "--session", file)
    first = statistics(run(*ask, "-p", "Who has a lamp?"))
    assert first["cached_tokens"] == 0 and file.exists()
    done = run(*ask, "-p", "Who has a chair?")
    second = statistics(done)
    assert f"Going on with {file}: " in done.err
    assert second["prompt_tokens"] < 30 and second["cached_tokens"] > first["prompt_tokens"] - 30
    assert done.out != "" and statistics(run(*ask, "-p", "Who has a lamp?"))["cached_tokens"] > 100


def test_a_chat_goes_on(run, tmp_path):
    file = tmp_path / "a chat"
    flags = ("chat", "--no-think", "--temp", 0, "--stats", "-n", 20)
    picture = tmp_path / "p.png"
    from benchmarks.chat_script import picture as draw

    draw(3).save(picture)
    whole = run(*flags, stdin=f"/image {picture}\nWhat is in the picture?\nWhat is 2 + 3?\nHello!\n")
    first = run(*flags, "--session", file, stdin=f"/image {picture}\nWhat is in the picture?\nWhat is 2 + 3?\n")
    picture.unlink()
    second = run(*flags, "--session", file, stdin="Hello!\n")
    assert (first.status, second.status) == (0, 0)
    assert first.out + second.out == whole.out
    assert "Going on with" in second.err and "more from the cache" in second.err


def test_a_file_that_is_no_session_is_refused_and_kept(run, tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("not to be lost")
    for command in (("generate", "-p", "Hello!"), ("chat",)):
        done = run(*command, "--session", file)
        assert done.status == 2 and f"{file}" in done.err and "session" in done.err
    assert file.read_text() == "not to be lost"


def test_another_file_is_not_called_damaged(run, tmp_path):
    weights = tmp_path / "model.safetensors"
    mx.save_safetensors(str(weights), {"a": mx.zeros(3)})
    done = run("generate", "-p", "Hello!", "--session", weights)
    assert done.status == 2 and "is no session of this package" in done.err
    assert "amaged" not in done.err and "elete" not in done.err


@pytest.mark.parametrize("command", [("generate", "-p", "Hello!"), ("chat",)], ids=["generate", "chat"])
@pytest.mark.parametrize("place", ["", "no/such/folder/a", "n" * 250, "a file/a"])
def test_a_place_that_takes_no_session_is_named_before_anything_is_loaded(run, tmp_path, monkeypatch, command, place):
    (tmp_path / "a file").write_text("here")
    monkeypatch.setattr(library, "hold", lambda *given, **options: pytest.fail("loaded"))
    done = run(*command, "--session", tmp_path / place, stdin="Hello!\n")
    assert done.status == 2 and done.out == "" and done.err.count("\n") == 1
    assert str(tmp_path) in done.err and [*tmp_path.iterdir()] == [tmp_path / "a file"]


def test_a_link_to_a_session_stays_a_link(run, tmp_path):
    (tmp_path / "disk").mkdir()
    link, target = tmp_path / "link", tmp_path / "disk" / "a.session"
    link.symlink_to(target)
    for cached in (0, 1):
        done = statistics(run("generate", "--json", "-n", 3, "-p", "Hello!", "--session", link))
        assert link.is_symlink() and target.is_file() and [*target.parent.iterdir()] == [target]
        assert (done["cached_tokens"] > 0) == cached


def test_a_number_of_drafts_needs_who_drafts(run):
    done = run("generate", "-p", "Hello!", "--num-draft-tokens", 2)
    assert done.status == 2 and "nothing drafts: add --mtp" in done.err


@pytest.mark.parametrize("option", ["--kv-group-size", "--quantized-kv-start"])
def test_how_a_cache_is_quantized_needs_that_it_is(run, option):
    done = run("generate", "-p", "Hello!", option, 32)
    assert done.status == 2 and "add --kv-bits 4 or 8" in done.err


def test_a_large_chat_is_mostly_kept_in_words(run, tmp_path, monkeypatch):
    """Killed after the second answer, it has all that was said, and what was computed for the first."""
    from mlx_qwen35.cli.chat import keeping
    from mlx_qwen35.session import Session

    monkeypatch.setattr(keeping, "_LARGE", 0)
    monkeypatch.setattr(keeping, "_SHARE", 1e9)
    saves, save = [], Session.save
    monkeypatch.setattr(Session, "save", lambda *given: (saves.append(1), save(*given))[1])
    file, flags = tmp_path / "kept", ("chat", "--temp", 0, "--no-think", "-n", 4)
    copies = []

    def copied(self, path):
        newer.write(path, self.notes)
        copies.append((file.read_bytes(), newer._beside(file).read_bytes()))

    from mlx_qwen35.session import newer

    monkeypatch.setattr(Session, "save_notes", copied)
    done = run(*flags, "--session", file, stdin="What is 2 + 3?\nHello!\nAgain\n")
    assert done.status == 0 and len(saves) == 2 and len(copies) == 2  # after the first answer, and at the end
    assert [*tmp_path.iterdir()] == [file]
    whole, words = copies[-1]
    file.write_bytes(whole)
    newer._beside(file).write_bytes(words)
    done = run(*flags, "--session", file, stdin="")
    assert "3 questions, " in done.err and "> Again" in done.err
