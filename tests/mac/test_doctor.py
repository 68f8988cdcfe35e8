"""doctor: a block for a report, whatever is broken; a Mac's words on any system; no names of users."""

import json
import os
import platform
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_qwen35 import kernels
from mlx_qwen35.cli import report as doctor
from mlx_qwen35.cli.main import main
from mlx_qwen35.library import speed
from mlx_qwen35.machine import files, system
from tests.conftest import CHECKOUT
from tests.mac.pretended import GPU
from tests.machine import Machine

NAMES = ["version", "machine", "memory", "Python", "MLX", "packages", "extras", "demo", "kernels", "LM Studio",
         "Hub cache", "disk", "own cache", "variables"]  # fmt: skip


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setattr(speed, "_FILE_SECONDS", 0.02)
    return Machine(tmp_path / "alice", monkeypatch)


def lines(capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, str]:
    assert main(["doctor", *flags]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    wide = max(map(len, NAMES)) + 2
    return {line[:wide].strip(): line[wide:] for line in said.out.splitlines()}


def test_the_block(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    machine.lmstudio("someone/Qwen3.5-1B")
    (machine.lmstudio("someone/Qwen3.5-2B") / "model.safetensors").unlink()
    machine.cached("someone/Qwen3.5-4B")
    told = lines(capsys)
    assert list(told) == NAMES
    assert told["demo"].startswith("says '42' to 'What is 17 + 25?'") and "wrong" not in told["demo"]
    assert told["kernels"] == "not checked yet"
    assert told["LM Studio"] == "~/.lmstudio/models: 2 of this family, 1 of them incomplete or not readable"
    assert told["Hub cache"] == "~/.cache/huggingface/hub: 1 of this family"
    assert " GB/s, reading " in told["disk"] and "demo/model.safetensors" in told["disk"]  # the largest here
    assert f"mlx-qwen35 {doctor.metadata.version('mlx-qwen35')}" in told["version"] and mx.__version__ in told["MLX"]
    assert not any("could not be found" in words for words in told.values())


def test_json(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json", "--no-demo", "--no-probe"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert list(told) == [name for name in NAMES if name not in ("demo", "disk")]
    assert all(isinstance(values["said"], str) for values in told.values())
    assert told["memory"]["installed"] == system.installed_memory() and told["MLX"]["version"] == mx.__version__
    assert told["LM Studio"] | {"said": None} == {
        "said": None, "folder": "~/.lmstudio/models", "there": False, "models": 0, "broken": 0,
    }  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_whatever_is_broken_is_said(machine: Machine, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def broken() -> Any:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(doctor, "_demo", lambda: ("fine", {}))
    monkeypatch.setattr(doctor, "_" + name.lower().replace(" ", "_").replace("lm_studio", "lmstudio"), broken)
    told = {finding.name: finding for finding in doctor.examine().findings}
    assert list(told) == NAMES
    assert told[name].words == "could not be found (OSError: [Errno 5] Input/output error)"
    assert [other for other in NAMES if "could not be found" in told[other].words] == [name]


def test_without_mlx(tmp_path: Path) -> None:
    """As where its library cannot be loaded: everything that does not need it is there."""
    code = "import sys; sys.modules['mlx'] = None\nfrom mlx_qwen35.cli.main import main; main(['doctor', '--no-demo'])"
    around = {**os.environ, "PYTHONPATH": str(CHECKOUT), "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=around)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert "\nMLX        could not be found (ModuleNotFoundError" in done.stdout
    assert f"CPython {platform.python_version()}" in done.stdout and "\npackages   numpy" in done.stdout


def test_nobody_is_named(machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither in the home folder, nor where links lead to, nor in other paths and errors."""
    other = machine.home.parent / "volumes" / "alice" / "models"
    other.mkdir(parents=True)
    (machine.home / ".lmstudio").mkdir()
    (machine.home / ".lmstudio" / "settings.json").write_text(json.dumps({"downloadsFolder": str(other)}))
    linked = machine.home.parent / "link"
    linked.symlink_to(machine.home)
    monkeypatch.setenv("HOME", str(linked))
    monkeypatch.setenv("HF_HUB_CACHE", str(machine.home / "a hub"))
    monkeypatch.setenv("HF_ENDPOINT", "https://alice:secret@example.com")
    monkeypatch.setattr(doctor.getpass, "getuser", lambda: "alice")
    monkeypatch.setattr(sys, "executable", str(machine.home / "venv" / "bin" / "python"))

    def broken() -> Any:
        raise OSError(f"{machine.home}/x and /Volumes/alice/y")

    monkeypatch.setattr(doctor, "_kernels", broken)
    for flags in ((), ("--json",)):
        assert main(["doctor", "--no-demo", *flags]) == 0
        said = capsys.readouterr().out
        assert "alice" not in said and "secret" not in said
        assert "~/a hub" in said and "~/venv/bin/python" in said and "volumes/someone/models" in said
        assert "~/x and /Volumes/someone/y" in said and "HF_ENDPOINT" in said
    assert doctor.without_names({"a": [f"{linked}", "malice", 7]}) == {"a": ["~", "malice", 7]}


def test_a_mac(machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    says = {
        "hw.memsize": str(8 << 30), "machdep.cpu.brand_string": "Apple M1", "hw.model": "MacBookAir10,1",
        "iogpu.wired_limit_mb": "6144", "sysctl.proc_translated": "1",
    }  # fmt: skip
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(platform, "mac_ver", lambda: ("15.5", ("", "", ""), "arm64"))
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    monkeypatch.setattr(system, "said", lambda program, *words: says.get(words[-1]) if words else None)
    monkeypatch.setattr(files, "can_forget", lambda: False)
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda device=mx.cpu: GPU if device == mx.gpu else {})
    monkeypatch.setattr(doctor, "_demo", lambda: ("fine", {}))
    told = lines(capsys)
    assert told["machine"] == f"Apple M1 (MacBookAir10,1), {system.processors()} processors, macOS 15.5 arm64"
    assert told["memory"] == "8 GB as Apple counts, 8.6 GB, 8.6 GB of it free; iogpu.wired_limit_mb is 6144"
    assert "with Metal, computing on the cpu; Apple M1 (applegpu_g13g); keeps up to 5.7 GB" in told["MLX"]
    assert "translated by Rosetta" in told["Python"] and "memory and not from the disk" in told["disk"]
    del says["iogpu.wired_limit_mb"], says["hw.model"]
    told = lines(capsys, "--no-probe")
    assert told["memory"].endswith("iogpu.wired_limit_mb is not set") and told["machine"].startswith("Apple M1, ")


def test_kernels(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "checked", lambda: {"router": None, "add_norm": "differs by 0.3"}, raising=False)
    words, values = doctor._kernels()
    assert words == "1 of 2 right; add_norm: differs by 0.3" and values["checked"]["router"] is None


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("print('<think>42</think>41')", "says '41' to 'What is 17 + 25?', which is wrong"),
        ("import os; os.abort()", "ended with status -6"),
        ("import sys; sys.exit('error: no demo')", "ended with status 1: error: no demo"),
        ("import sys; print('42'); print('warning: slow', file=sys.stderr)", "s with the start; warning: slow"),
        ("import time; time.sleep(9)", "gave no answer within 0.5 s"),
    ],
)
def test_a_demo_that_fails(monkeypatch: pytest.MonkeyPatch, code: str, said: str) -> None:
    run = subprocess.run
    monkeypatch.setattr(doctor, "_ANSWER_SECONDS", 0.5 if "sleep" in code else 60)
    monkeypatch.setattr(doctor.subprocess, "run", lambda command, **more: run([sys.executable, "-c", code], **more))
    assert said in doctor._demo()[0]


def test_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    brought = doctor._extra_packages()
    assert brought["video"] == ["av"] and "test" not in brought
    assert all(name.startswith(("mlx-cuda", "mlx_cuda")) for name in brought.get("cuda", []))
    assert ("cuda" in brought) == (sys.platform == "linux")
    monkeypatch.setattr(doctor, "_installed", lambda name: None if name == "av" else "1.0")
    words, values = doctor._extras()
    assert "video no (pip install av)" in words and "notebook yes (ipython 1.0)" in words
    assert values["video"] == {"av": None}


class TestDisk:
    @pytest.fixture(autouse=True)
    def short(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(speed, "_FILE_SECONDS", 0.05)

    @pytest.mark.parametrize("size", [1, 5000, 9 << 20])
    def test_it_reads_inside_of_the_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
        path = tmp_path / "file"
        path.write_bytes(bytes(size))
        seen, preadv = [], os.preadv

        def noted(file: int, blocks: list[memoryview], at: int) -> int:
            seen.append((at, preadv(file, blocks, at), len(blocks[0])))
            return seen[-1][1]

        monkeypatch.setattr(os, "preadv", noted)
        found, read = speed.file_speed(path, threads=2)
        assert found > 0 and read == sum(count for _, count, _ in seen)
        assert all(count == asked == min(size, 4 << 20) and at + count <= size for at, count, asked in seen)

    def test_it_reads_once_where_there_is_no_time(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "file").write_bytes(bytes(5000))
        monkeypatch.setattr(speed, "_FILE_SECONDS", 0.0)
        found, read = speed.file_speed(tmp_path / "file", threads=2)
        assert found > 0 and read == 10_000

    def test_a_disk_that_fails_or_hangs(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(OSError):
            speed.file_speed(tmp_path / "none")
        path, open_again = tmp_path / "file", threading.Event()
        path.write_bytes(bytes(100))

        def hangs(*_: object) -> int:
            open_again.wait(20)
            return 0

        monkeypatch.setattr(os, "preadv", hangs)
        monkeypatch.setattr(speed, "_PATIENCE", 0.2)
        with pytest.raises(TimeoutError, match="file was not read within"):
            speed.file_speed(path)
        open_again.set()
