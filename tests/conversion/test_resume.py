"""Conversions that end before their time: killed, interrupted, on a full disk, two at once, and gone on with."""

import errno
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_qwen35.checkpoint.source import open_source
from mlx_qwen35.conversion import pipeline, task
from mlx_qwen35.conversion.convert import convert, unfinished
from mlx_qwen35.conversion.partial import claim, container_of
from mlx_qwen35.conversion.write import SafetensorsFile
from mlx_qwen35.errors import CheckpointError
from tests.conftest import CHECKOUT
from tests.conversion.test_convert import config_of, source_of

UNIFORM = {"recipe": "uniform"}  # nothing is measured before


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task, "PIECE_BYTES", 20_000)
    monkeypatch.setattr(pipeline, "workers", lambda: 2)
    monkeypatch.setattr(SafetensorsFile, "sync", lambda self: None)  # a busy disk takes seconds for it


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return source_of(tmp_path_factory.mktemp("source") / "a")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For what happens behind the last piece, of which there are few."""
    config = config_of("dense", layer_types=["linear_attention", "full_attention"], vocab_size=96)
    del config["vision_config"]
    return source_of(tmp_path_factory.mktemp("small") / "a", config=config)


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an undisturbed conversion writes."""
    return contents(convert(source, tmp_path_factory.mktemp("whole") / "b"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def killed(source: Path, runs: list[tuple[Path, int | None]], **options: Any) -> list[dict[str, Any]]:
    """Conversions to these targets, one after the other, ended at these moments; what each left."""
    job = {"source": str(source), "options": options, "runs": [(str(target), moment) for target, moment in runs]}
    command = [sys.executable, str(CHECKOUT / "tests/conversion/killed.py"), json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


class Stop(Exception):
    pass


def stop_at(part: float, error: type[BaseException] = KeyboardInterrupt) -> Any:
    def on_progress(done: int, total: int) -> None:
        if done > part * total:
            raise error

    return on_progress


def begun(source: Path, target: Path, part: float = 0.5, **options: Any) -> Path:
    """An interrupted conversion."""
    with pytest.raises(KeyboardInterrupt):
        convert(source, target, on_progress=stop_at(part), **options)
    return target


def test_killed_at_twenty_moments(source: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    """One conversion that dies twenty times and is gone on with as often; what is there at last is what would be."""
    chance = random.Random(4)
    target = tmp_path / "out/b"
    moments = [chance.randrange(10, 200), 300, *(chance.randrange(10, 100) for _ in range(18))]  # samples: about 240
    states = killed(source, [(target, moment) for moment in moments], resume=True)
    assert [state["status"] for state in states] == [-9] * 20
    for state in states:
        assert not state["target"] and not state["hidden_loads"] and state["others"] == [".b.partial"]
    assert unfinished(target)
    assert contents(convert(source, target, resume=True)) == whole
    assert os.listdir(tmp_path / "out") == ["b"]


def test_killed_near_the_end(small: Path, tmp_path: Path) -> None:
    """At each of the last calls: between the last piece and the removal of what was hidden."""
    whole = contents(convert(small, tmp_path / "whole", **UNIFORM))
    [state] = killed(small, [(tmp_path / "out/b", None)], **UNIFORM, resume=True)
    assert state["status"] == 0 and state["loads"] and not state["hidden"]
    moments = range(state["calls"] - 24, state["calls"])
    runs = [(tmp_path / f"{moment}/b", moment) for moment in moments]
    twice = [run for target, moment in runs for run in ((target, moment), (target, None))]
    states = killed(small, twice, **UNIFORM, resume=True)
    named = 0
    for (target, moment), first, last in zip(runs, states[::2], states[1::2], strict=True):
        # With the target there and nothing hidden but an empty folder, there is nothing to go on with.
        assert first["status"] == -9 and (last["status"] == 0 or first["target"]), moment
        assert first["loads"] == first["target"], moment
        assert contents(target) == whole and last["others"] == ["b"], moment
        named += first["target"]
    assert 0 < named < 24  # the range holds the moment in which the target gets its name


def test_killed_while_it_replaces(small: Path, tmp_path: Path) -> None:
    """There is a good checkpoint at all times: under its name, or one that the next conversion puts back there."""
    whole = contents(convert(small, tmp_path / "whole", **UNIFORM))
    old = contents(convert(small, tmp_path / "old", bits=8, **UNIFORM))
    shutil.copytree(tmp_path / "old", tmp_path / "out/b")
    [state] = killed(small, [(tmp_path / "out/b", None)], **UNIFORM, resume=True, overwrite=True)
    runs = [(tmp_path / f"{moment}/b", moment) for moment in range(state["calls"] - 32, state["calls"])]
    for target, _ in runs:
        shutil.copytree(tmp_path / "old", target)
    states = killed(small, runs, **UNIFORM, resume=True, overwrite=True)
    kept = [not first["target"] for first in states]
    assert 0 < sum(kept) < 4  # moments in which no folder has the name
    for (target, moment), first in zip(runs, states, strict=True):
        assert first["status"] == -9, moment
        if first["target"]:
            assert contents(target) in (old, whole), moment
        else:
            assert contents(container_of(target) / "replaced") == old, moment
    again = killed(small, [(target, None) for target, _ in runs], **UNIFORM, resume=True, overwrite=True)
    for (target, moment), last in zip(runs, again, strict=True):
        assert last["status"] == 0 and contents(target) == whole and last["others"] == ["b"], moment


def test_what_was_lost_is_written_again(source: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    """After a power failure the journal may say more than the disk has."""
    target = begun(source, tmp_path / "b", 0.6)
    path = container_of(target) / "folder/model.safetensors"
    data = bytearray(path.read_bytes())
    for place in range(len(data) // 2, len(data), 5000):
        data[place] ^= 1
    path.write_bytes(data)
    assert contents(convert(source, target, resume=True)) == whole
    target = begun(source, tmp_path / "c", 0.6)
    os.truncate(container_of(target) / "folder/model.safetensors", 300_000)
    assert contents(convert(source, target, resume=True)) == whole


def test_the_number_of_workers_changes_nothing(
    source: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for count in (1, 7):
        monkeypatch.setattr(pipeline, "workers", lambda count=count: count)
        assert contents(convert(source, tmp_path / str(count))) == whole


def test_interrupted(source: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    """The work is kept and gone on with; progress begins where it ended."""
    target = begun(source, tmp_path / "b")
    assert unfinished(target) and not target.exists()
    seen: list[tuple[int, int]] = []
    convert(source, target, resume=True, on_progress=lambda done, total: seen.append((done, total)))
    assert 0.4 < seen[0][0] / seen[0][1] < 0.7 and seen[-1][0] == seen[-1][1]
    assert contents(target) == whole and not unfinished(target) and not container_of(target).exists()


def test_interrupted_before_anything_was_done(source: Path, tmp_path: Path) -> None:
    begun(source, tmp_path / "b", -1)
    assert not list(tmp_path.iterdir())


def test_a_callers_own_error(source: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    with pytest.raises(Stop):
        convert(source, tmp_path / "b", on_progress=stop_at(0.5, Stop))
    assert contents(convert(source, tmp_path / "b", resume=True)) == whole


def test_unfinished_work_is_in_the_way(source: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    """Until it is gone on with or discarded; a refusal leaves it as it is."""
    target = begun(source, tmp_path / "b")
    before = contents(container_of(target))
    with pytest.raises(CheckpointError, match=r"unfinished conversion .* \(--resume.* \(--overwrite"):
        convert(source, target)
    with pytest.raises(CheckpointError, match=r"begun with quantization \[4, 64, 'affine'\] and not \[8, 64"):
        convert(source, target, bits=8, resume=True)
    with pytest.raises(CheckpointError, match="begun with dtype None and not float16"):
        convert(source, target, dtype="float16", resume=True)
    assert contents(container_of(target)) == before
    assert contents(convert(source, target, overwrite=True)) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_another_source_is_not_mixed_in(tmp_path: Path) -> None:
    first, second = source_of(tmp_path / "a"), source_of(tmp_path / "c")
    target = begun(first, tmp_path / "b")
    with pytest.raises(CheckpointError, match="files of the source, MLX or this package have changed"):
        convert(second, target, resume=True)
    os.utime(first / "model.safetensors", ns=(1, 1))
    with pytest.raises(CheckpointError, match="files of the source, MLX or this package have changed"):
        convert(first, target, resume=True)


def test_another_source_of_the_same_size_and_time(tmp_path: Path) -> None:
    """As archives and builds that are to be repeated leave them."""
    source = source_of(tmp_path / "a")
    target, weights = begun(source, tmp_path / "b"), source / "model.safetensors"
    before, data = weights.stat(), bytearray(weights.read_bytes())
    data[-2] ^= 1
    weights.write_bytes(data)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(CheckpointError, match="files of the source, MLX or this package have changed"):
        convert(source, target, resume=True)


def test_nothing_to_resume(source: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    assert contents(convert(source, tmp_path / "b", resume=True)) == whole
    with pytest.raises(CheckpointError, match="exists already"):
        convert(source, tmp_path / "b", resume=True)


def failing(
    monkeypatch: pytest.MonkeyPatch, call: str, number: int, after: int, cost: Callable[[Any], int] = lambda data: 1
) -> None:
    """os.pwrite or os.preadv raise this error once what they were given has cost more than `after`."""
    original, left = getattr(os, call), after

    def broken(handle: int, data: Any, offset: int) -> int:
        nonlocal left
        left -= cost(data)
        if left < 0:
            raise OSError(number, os.strerror(number))
        return original(handle, data, offset)

    monkeypatch.setattr(os, call, broken)


def test_disk_that_fills_up(
    source: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One error that says what to do, whichever write it hits; the work is kept."""
    target = tmp_path / "b"
    for room in (100_000, 250_000, 250_000):
        with monkeypatch.context() as patched:
            failing(patched, "pwrite", errno.ENOSPC, room, len)
            with pytest.raises(CheckpointError, match="the disk is full: .*model.safetensors .*Go on with --resume"):
                convert(source, target, resume=True)
        assert not target.exists()
    assert contents(convert(source, target, resume=True)) == whole


def test_a_limit_for_files_is_no_full_disk(source: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    """It is the process's own, and its end says so, before any work is done that would be lost."""
    code = f"""
import resource
from mlx_qwen35 import convert
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
convert({str(source)!r}, {str(tmp_path / "b")!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=CHECKOUT)
    last = done.stderr.strip().splitlines()[-1]
    assert "model.safetensors is larger than a file may be here: raise the limit" in last
    assert not list(tmp_path.iterdir())
    assert contents(convert(source, tmp_path / "b", resume=True)) == whole


def test_full_disk_for_the_journal(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, lines = os.write, 0

    def full(handle: int, data: bytes) -> int:
        nonlocal lines
        lines += 1
        return write(handle, data[: len(data) // 2]) if lines > 9 else write(handle, data)

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(CheckpointError, match="the disk is full: .*journal"):
        convert(source, tmp_path / "b")
    monkeypatch.undo()
    open_source(convert(source, tmp_path / "b", resume=True))


def test_source_that_cannot_be_read_for_a_while(
    source: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        failing(patched, "preadv", errno.EIO, 400)
        with pytest.raises(CheckpointError, match="cannot be read .*Go on with --resume"):
            convert(source, tmp_path / "b")
    assert contents(convert(source, tmp_path / "b", resume=True)) == whole


def test_two_at_once(source: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    """The second refuses, and harms nothing; one that was killed is in nobody's way."""
    target = tmp_path / "b"
    code = "import sys; from mlx_qwen35.conversion.convert import convert; convert(*sys.argv[1:], overwrite=True)"
    said = []

    def try_another(done: int, total: int) -> None:
        if not said and done > total // 2:
            command = [sys.executable, "-c", code, str(source), str(target)]
            said.append(subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=100).stderr)

    convert(source, target, on_progress=try_another)
    assert "another conversion is writing" in said[0] and contents(target) == whole
    with claim(tmp_path / "c"), pytest.raises(CheckpointError, match="another conversion is writing"):
        convert(source, tmp_path / "c", resume=True)


def test_target_that_appears_meanwhile(source: Path, tmp_path: Path) -> None:
    def appear(done: int, total: int) -> None:
        if done == total:
            (tmp_path / "b").mkdir()
            (tmp_path / "b/thesis.txt").write_text("years of work")

    with pytest.raises(CheckpointError, match="appeared during the conversion"):
        convert(source, tmp_path / "b", on_progress=appear)
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["thesis.txt"]


def test_the_disk_is_asked_for_what_is_missing_only(
    source: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = begun(source, tmp_path / "b", 0.9)
    size = sum(map(len, whole.values()))
    usage = shutil._ntuple_diskusage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, size * 2 // 3))
    with pytest.raises(CheckpointError, match="B free and the conversion needs"):
        convert(source, tmp_path / "c")
    open_source(convert(source, target, resume=True))
