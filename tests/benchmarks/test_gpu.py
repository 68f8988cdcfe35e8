"""The run for machines with a GPU, as far as it goes without one; and parts of layers compared on a small model."""

import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from benchmarks import gpu, kernels, sides
from tests.benchmarks.test_sides import CASE
from tests.conftest import CHECKOUT


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "benchmarks/gpu.py", *arguments]
    return subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True)


def test_without_a_gpu_it_says_so_and_does_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process, whose default device is the CPU also where there is a GPU: another would begin to measure."""
    assert mx.default_device() == mx.cpu
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--results", str(tmp_path / "results")])
    monkeypatch.setattr(gpu.subprocess, "run", None)
    monkeypatch.setattr(gpu, "circumstances", lambda: {"machine": "one"})
    assert gpu.main() == 2 and "MLX has no GPU here" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_a_dry_run_names_files_that_are_there(tmp_path: Path) -> None:
    done = run("--dry-run", "--results", str(tmp_path / "results"))
    assert done.returncode == 0 and not (tmp_path / "results").exists()
    named = [word for word in done.stdout.split() if word.startswith(("benchmarks/", "tests/"))]
    assert named and all((CHECKOUT / word).exists() for word in named)


def test_what_it_would_run_is_understood(tmp_path: Path) -> None:
    """Every option of every command is one that the benchmark has."""
    for _, command in gpu.commands(tmp_path, quick=True)[1:]:
        told = subprocess.run([*command[:2], "--help"], cwd=CHECKOUT, capture_output=True, text=True).stdout
        assert all(option in told for option in command if option.startswith("--")), command


def test_probes_count_bytes_and_operations() -> None:
    found = gpu.probe(nbytes=1 << 22, operations=50, rounds=2)
    assert [record["quantity"] for record in found] == ["bandwidth, GB/s", "gap, s an operation"]
    assert 0.01 < found[0]["found"]["median"] < 10_000 and 0 < found[1]["found"]["median"] < 0.1


def test_machines_have_names_for_folders() -> None:
    assert gpu.folder_name("Apple M4 Max, 16 cores, Darwin arm64") == "gpu-apple-m4-max"


def test_parts_of_layers_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
    monkeypatch.setitem(sides.CASES, "tiny", CASE)
    models = kernels.Models("tiny", tmp_path)
    parts = [models.delta_net("tiny"), models.attention("tiny")]
    parts += [models.feed_forward("tiny", "dense"), models.head("tiny")]
    records = kernels.measure(models, parts, rows=[1, 20], context=9, rounds=1)
    assert [record["quantity"] for record in records[::2]] == ["delta net, 1 row", "attention, 1 row", "dense, 1 row",
                                                               "head, 1 row"]  # fmt: skip
    assert all(record["apart"] < 1e-3 for record in records)
    wrong = kernels.Part("dense", "tiny", parts[2].ours, lambda context: lambda x: 2 * parts[2].theirs(context)(x))
    with pytest.raises(SystemExit, match="dense, 1 rows: the sides are"):
        kernels.measure(models, [wrong], rows=[1], context=0, rounds=1)
