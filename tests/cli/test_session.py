"""--session: what a command computed and said, another goes on from."""

import json

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
