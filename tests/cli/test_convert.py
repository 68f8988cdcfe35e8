"""`convert`: flags to arguments, and real conversions: one that `generate` reads again, one that is interrupted."""

import json
import re
import shlex
from pathlib import Path

import pytest

from mlx_qwen35.cli import progress
from mlx_qwen35.cli.progress import Progress
from mlx_qwen35.conversion import task
from mlx_qwen35.library import converting, lmstudio


@pytest.fixture
def calls(monkeypatch):
    calls = []

    def convert(source, target, **options):
        assert all(options.pop(f"on_{name}") for name in ("download", "progress", "measure", "note"))
        assert not options.pop("verify")
        calls.append((source, target, options))
        return target

    monkeypatch.setattr(converting, "convert", convert)
    return calls


PLAIN = {
    "bits": None, "group_size": 64, "mode": "affine", "recipe": None, "target_size": None, "dtype": None,
    "pack_experts": False, "outtype": None, "adapter_path": None, "overwrite": False, "resume": False,
}  # fmt: skip


@pytest.mark.parametrize(
    "argv, options",
    [
        ("a b", {}),
        ("--hf-path a --mlx-path b", {}),
        ("a --mlx-path b --overwrite", {"overwrite": True}),
        ("a b --resume", {"resume": True}),
        ("a b --pack-experts", {"pack_experts": True}),
        ("a b -q", {"bits": 4}),
        ("a b --q-bits 6", {"bits": 6}),
        ("a b -q --q-bits 8 --q-group-size 32", {"bits": 8, "group_size": 32}),
        ("a b --q-mode mxfp4", {"bits": 4, "mode": "mxfp4"}),
        ("a b --quant-predicate mixed_3_6", {"bits": 4, "recipe": "mixed_3_6"}),
        ("a b --target-size 1.5GB", {"bits": 4, "target_size": 1_500_000_000}),
        ("a b --target-size 2GiB", {"bits": 4, "target_size": 2 << 30}),
        ("a b --target-size 5000", {"bits": 4, "target_size": 5000}),
        ("a b --dtype bfloat16", {"dtype": "bfloat16"}),
        ("a b --outtype q8_0", {"outtype": "q8_0"}),
    ],
)
def test_flags(calls, run, argv, options):
    done = run("convert", *argv.split())
    assert (done.status, done.out) == (0, "b\n")
    assert calls == [("a", "b", {**PLAIN, **options})]


@pytest.mark.parametrize(
    "argv, says",
    [
        ("", "SOURCE"),
        ("a", "TARGET"),
        ("a b --hf-path c", "--hf-path"),
        ("a b --lmstudio c/d", "--lmstudio"),
        ("a --lmstudio c", "two plain names"),
        ("a --lmstudio ../d", "two plain names"),
        ("a --lmstudio c/d/e", "two plain names"),
        ("a b --target-size much", "--target-size"),
        ("a b --target-size 0GB", "--target-size"),
        ("a b --target-size 24", "did you mean '24GB'?"),
        ("a b --target-size 1GB --q-bits 4", "--target-size"),
    ],
)
def test_wrong_flags(calls, run, argv, says):
    done = run("convert", *argv.split())
    assert done.status == 2 and done.err.startswith("error: ") and says in done.err
    assert not calls


def test_into_lmstudio(calls, run, monkeypatch):
    monkeypatch.setattr(lmstudio, "models_folder", lambda: Path("models"))
    assert run("convert", "a", "--lmstudio", "me/Qwen3.5-4B-MLX-4bit").status == 0
    assert calls[0][1] == "models/me/Qwen3.5-4B-MLX-4bit"


def test_a_converted_checkpoint_answers_the_same(checkpoint, run, tmp_path):
    target = tmp_path / "converted"
    done = run("convert", checkpoint, target, "--verify")
    assert done.status == 0 and "logits of 64 tokens: equal to the source's" in done.err
    ask = ("-p", "hello", "-n", "8", "--json")
    first, second = (json.loads(run("generate", "--model", folder, *ask).out) for folder in (checkpoint, target))
    assert first["text"] == second["text"]
    done = run("convert", checkpoint, target)
    assert done.status == 2 and done.err.count("error: ") == 1


def test_choosing_bits_shows_how_far_it_is(checkpoint, run, tmp_path):
    done = run("convert", checkpoint, tmp_path / "small", "--target-size", "1GB")
    assert done.status == 0
    assert re.search(r"Choosing bits: (\d+) modules of \1 modules, .*\nConverting: ", done.err)


def test_ctrl_c_says_how_to_go_on(checkpoint, run, tmp_path, monkeypatch):
    class Interrupting(Progress):
        def __call__(self, done: int, total: int) -> None:
            super().__call__(done, total)
            if done > total / 2:
                raise KeyboardInterrupt

    monkeypatch.setattr(task, "PIECE_BYTES", 5000)
    argv = ["convert", str(checkpoint), "--mlx-path", str(tmp_path / "out b"), "-q", "--q-group-size", "32"]
    with monkeypatch.context() as patched:
        patched.setattr("mlx_qwen35.cli.convert.Progress", Interrupting)
        done = run(*argv)
    assert done.status == 130 and not (tmp_path / "out b").exists()
    command = shlex.split(done.err.strip().splitlines()[-1])
    assert command[0] == "mlx-qwen35" and command[-1] == "--resume" and sorted(command[1:-1]) == sorted(argv)
    assert run(*command[1:]).status == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out b"]


class Clock:
    now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(progress, "time", clock := Clock())
    return clock


def test_progress_on_a_terminal(clock, capsys, monkeypatch):
    """Rate and time left are those of the last seconds; what was done before does not count."""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    show = Progress("Converting", "bytes")
    lines = []
    for done in range(2_000, 10_001, 100):  # MB: 8 GB at 100 MB/s, after 2 that are there already
        show(done * 10**6, 10_000 * 10**6)
        lines.append(capsys.readouterr().err.rpartition("\x1b[K")[2])
        clock.now += 1
    assert lines[0] == "Converting: 2.00 GB of 10.00 GB, 20 %"
    assert lines[30] == "Converting: 5.00 GB of 10.00 GB, 50 %, 100 MB/s, 0:50 min left"
    assert lines[-1] == "Converting: 10.00 GB of 10.00 GB, 1:20 min, 100 MB/s\n"


def test_progress_forgets_old_rates(clock, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    show = Progress("Converting", "bytes")
    done = 0
    for rate in [1000] * 20 + [10] * 30:
        show(done * 10**6, 10**12)
        done += rate
        clock.now += 1
    assert re.search(r", 10 MB/s, 27:12:\d\d h left$", capsys.readouterr().err)


def test_progress_in_a_file(clock, capsys):
    show = Progress("Loading", "bytes")
    for done in (0, 10**8, 3 * 10**8):
        show(done, 3 * 10**8)
        clock.now += 2
    assert capsys.readouterr().err == "Loading: 300.0 MB of 300.0 MB, 4.0 s, 75 MB/s\n"


def test_progress_in_a_file_of_what_takes_long(clock, capsys):
    """A line a minute, with the time that is left."""
    show = Progress("Converting", "bytes")
    for done in range(0, 10_001, 50):  # MB
        show(done * 10**6, 10_000 * 10**6)
        clock.now += 1
    assert capsys.readouterr().err.splitlines() == [
        "Converting: 3.00 GB of 10.00 GB, 30 %, 50 MB/s, 2:20 min left",
        "Converting: 6.00 GB of 10.00 GB, 60 %, 50 MB/s, 1:20 min left",
        "Converting: 9.00 GB of 10.00 GB, 90 %, 50 MB/s, 0:20 min left",
        "Converting: 10.00 GB of 10.00 GB, 3:20 min, 50 MB/s",
    ]
