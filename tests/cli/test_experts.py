"""Expert streaming as a user meets it: the line while an answer comes, the table under it, and --json's part of it."""

import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from mlx_qwen35 import library
from mlx_qwen35.cli import experts
from mlx_qwen35.config import ModelConfig
from mlx_qwen35.experts.budget import StreamPlan
from mlx_qwen35.experts.pool import ExpertStats
from mlx_qwen35.library import Held
from mlx_qwen35.notebook.chat import Chat
from mlx_qwen35.sampling import Sampling

LINE = r"Experts: \d+\.\d% in memory, \d+\.\d\d GB read at \d+\.\d\d GB/s, \d+\.\d% waiting"


@pytest.fixture
def streamed(checkpoint, monkeypatch, tmp_path) -> Path:
    """A checkpoint that does not fit: its experts are streamed, whatever --memory says."""
    text = ModelConfig.from_folder(checkpoint).text
    slots = (text.moe.num_experts - 1,) * text.num_hidden_layers
    plan = StreamPlan(slots, group=2, chunk=64, tile=64, cache_limit=1 << 24, memory=1 << 30)
    monkeypatch.setattr(library, "hold", lambda folder, memory, **given: Held(folder, None, 2048, plan))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return checkpoint


def ask(run, folder, *flags, command="generate"):
    prompt = ["-p", "hello there"] if command == "generate" else []
    return run(command, "--model", folder, *prompt, "-n", 6, "--no-think", *flags, stdin="hello\n\nhello again\n")


@pytest.mark.parametrize("command, answers", [("generate", 1), ("chat", 2)])
def test_a_table_when_it_is_asked_for(streamed, run, command, answers):
    done = ask(run, streamed, "--expert-stats", command=command)
    assert done.status == 0 and "experts" not in done.out
    assert len(re.findall(r"^  experts +prompt +answer$", done.err, re.M)) == answers
    asked = [int(n.replace(",", "")) for n in re.findall(r"asked for one token at a time.* ([\d,]+)$", done.err, re.M)]
    assert len(asked) == answers and min(asked) > 0
    for words in ("of them in memory", "read ahead", "bytes read", "waited for the disk", "read a token"):
        assert done.err.count(words) >= answers
    assert "asked for one" not in ask(run, streamed, command=command).err


def test_what_is_all_in_memory_says_so(speak, run):
    speak("hello")
    done = run("generate", "--model", "x", "-p", "hi", "--no-think", "--expert-stats", "--stats", "-v")
    assert "all are in memory" in done.err and "waiting" not in done.err


def test_verbose_and_stats_have_a_line(streamed, run):
    for flag in ("--verbose", "--stats"):
        done = ask(run, streamed, flag)
        assert len(re.findall(f"^{LINE}$", done.err, re.M)) == 1, done.err
    assert len(re.findall(f"^{LINE}$", ask(run, streamed, "-v", command="chat").err, re.M)) == 2


def test_a_terminal_sees_it_live(streamed, run, monkeypatch):
    monkeypatch.setattr("_pytest.capture.EncodedFile.isatty", lambda self: True)
    monkeypatch.setattr("_pytest.capture.CaptureIO.isatty", lambda self: True)
    done = ask(run, streamed, "--verbose")
    drawn = re.findall(re.escape("\x1bD\x1b[A\x1b7\x1b[B\r\x1b[K") + f"({LINE})" + re.escape("\x1b8"), done.err)
    assert len(drawn) >= 5 and done.err.count("\x1b[J") == len(drawn)
    assert re.search(rf"\x1b\[J{LINE}\nThe answer is cut .*\n$", done.err)  # it stays
    assert "\x1b8" not in ask(run, streamed).err


def test_a_narrow_terminal_gets_a_short_line(monkeypatch, capsys):
    monkeypatch.setattr("_pytest.capture.CaptureIO.isatty", lambda self: True)
    monkeypatch.setattr(experts.shutil, "get_terminal_size", lambda *_, **__: os.terminal_size((20, 24)))
    stats = ExpertStats(9, 1, 0, 0, 0, 0, 1, 5, 2.0, 1.0, 1.0, 1.0)
    line = experts.ExpertLine(True)
    line.after(SimpleNamespace(experts=stats))
    assert capsys.readouterr().err.endswith("Experts: 90.0% in m\x1b8")


def test_json_has_them(streamed, run, speak):
    told = json.loads(ask(run, streamed, "--json").out)["statistics"]
    assert told["experts"]["hits"] + told["experts"]["misses"] > 0 and 0 <= told["experts"]["hit_rate"] <= 1
    prompt = told["prompt_experts"]  # (a CPU takes small experts pair by pair in prompts, too)
    assert prompt["swept"] + prompt["misses"] > 0 and prompt["bytes_read"] > 0
    last = ask(run, streamed, "--json", "lines").out.splitlines()[-1]
    assert json.loads(last)["statistics"]["experts"]["seconds"] > 0
    speak("hello")
    assert "experts" not in json.loads(run("generate", "--model", "x", "-p", "hi", "--json").out)["statistics"]


def test_the_next_start_is_warm_unless_it_is_not_to_be(streamed, run, tmp_path):
    ask(run, streamed, "--no-warm-start")
    assert not (tmp_path / "cache").exists()
    for command in ("generate", "chat"):
        ask(run, streamed, command=command)
        (path,) = (tmp_path / "cache").rglob("*.json")
        assert json.loads(path.read_text())["layers"]
        path.unlink()


def test_a_notebook_has_them_in_its_table(streamed):
    held = library.hold(streamed, None)
    model = library.load_held(held, warm_start=False)
    chat = Chat(model, library.load_processor(streamed), display="off", max_tokens=4, sampling=Sampling())
    reply = chat.send("hello")
    assert 0 <= reply.statistics["expert_hit_rate"] <= 1 and reply.statistics["expert_bytes_read"] >= 0
    shown = reply.markdown()
    for words in ("experts in memory", "read from the disk", "waited for it"):
        assert words in shown
    model.unload()
