"""The doors where something is missing: an old Python, packages that are not installed, machines without MLX."""

import ast
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_qwen35.cli import main as door
from mlx_qwen35.machine import system
from tests.conftest import CHECKOUT

DOORS = (("generate.py", "-p", "hi"), ("convert.py", "a", "b"), ("-m", "mlx_qwen35", "chat"))
OLD = """
import sys, runpy
class Version(tuple):
    major, minor, micro = 3, 9, 6
sys.version_info = Version((3, 9, 6, "final", 0))
sys.argv = [%r]
runpy.run_path(%r, run_name="__main__")
"""


def run(*argv: str, cwd: Path = CHECKOUT, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *argv], cwd=cwd, env={**os.environ, **variables}, capture_output=True, text=True, timeout=60,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door[0])
def test_without_packages(door: tuple[str, ...], tmp_path: Path) -> None:
    done = run("-S", *door, PYTHONPATH=str(CHECKOUT), XDG_STATE_HOME=str(tmp_path))
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert "is not installed" in done.stderr and "pip install" in done.stderr


@pytest.mark.parametrize("name", ["generate.py", "convert.py"])
def test_an_old_python(name: str) -> None:
    done = run("-c", OLD % (name, name))
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: mlx-qwen35 needs Python 3.10 or newer, and this is 3.9")
    code = OLD.replace("runpy.run_path(%r, run_name=\"__main__\")", "import mlx_qwen35") % "-m"
    done = run("-c", code)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_an_old_python_reads_as_far_as_the_message() -> None:
    for name in ("generate.py", "convert.py", "mlx_qwen35/__init__.py"):
        ast.parse((CHECKOUT / name).read_text(), feature_version=(3, 6))


def test_the_module_is_a_door() -> None:
    done = run("-m", "mlx_qwen35", "--version", PYTHONPATH=str(CHECKOUT))
    assert done.returncode == 0 and done.stdout.startswith("mlx-qwen35 ")


@pytest.mark.parametrize(
    "machine, translated, says",
    [("x86_64", None, "Intel processors"), ("x86_64", "1", "under Rosetta"), ("win32", None, "under WSL")],
)
def test_machines_without_mlx(monkeypatch: pytest.MonkeyPatch, machine: str, translated: str, says: str) -> None:
    monkeypatch.setattr(sys, "platform", "win32" if machine == "win32" else "darwin")
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(system, "sysctl", lambda name: translated)
    monkeypatch.setattr(door, "find_spec", lambda name: None)
    told = door._what_to_install(ModuleNotFoundError("no", name="numpy"))
    assert told.startswith("MLX is not installed, and is not made for ") and says in told


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_on_a_mac_with_an_intel_processor(tmp_path: Path) -> None:
    """One line, and no .venv of which pip cannot say why it stays empty."""
    pretended = "import sys, platform; sys.platform = 'darwin'; platform.machine = lambda: 'x86_64'"
    python = tmp_path / "python-for-intel"
    python.write_text(
        f'#!/bin/sh\ncase "$2" in *x86_64*) exec {sys.executable} -c "{pretended}\n$2";; esac\n'
        f'[ "$1" = -c ] && exec {sys.executable} "$@"\nexit 3\n'
    )
    python.chmod(0o755)
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(CHECKOUT / name, tmp_path)
    done = subprocess.run(
        ["make", "demo", f"PYTHON={python}"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode and "there is no MLX: it takes a Mac with Apple silicon" in done.stderr
    assert not (tmp_path / ".venv").exists() and "Making" not in done.stdout


def test_other_errors_are_not_hidden() -> None:
    assert door._what_to_install(ImportError("cannot import name 'x'", name="mlx_qwen35.cli")) is None
    assert "does not start" in door._what_to_install(ImportError("libjpeg.so", name="PIL._imaging"))
    assert "pillow is not installed" in door._what_to_install(ModuleNotFoundError("no", name="PIL"))


def test_nothing_tells_to_install_from_where_it_is_not() -> None:
    """The package is in no registry: what brings an extra is the clone ('.[video]') or the extra's own packages."""
    rooms = [CHECKOUT / "README.md", *(CHECKOUT / "docs").rglob("*.md")]
    for room in ("mlx_qwen35", "benchmarks", "examples"):
        rooms += [path for path in (CHECKOUT / room).rglob("*") if path.suffix in (".py", ".md", ".ipynb")]
    told = [path for path in rooms if "mlx-qwen35[" in path.read_text()]
    assert len(rooms) > 100 and not told
    extras = (CHECKOUT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2]
    for path in rooms:
        for names in re.findall(r"pip install (?:-e )?'\.\[([\w,]+)\]'", path.read_text()):
            assert all(f"\n{name} = [" in extras for name in names.split(",")), (path, names)
