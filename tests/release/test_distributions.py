"""What is handed out: wheel and source distribution, built from the tracked files alone, and the formula for Homebrew.

Knows what has to be in them. The wheel is installed into an environment of its own, with the dependencies of this one.
"""

import email
import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import mlx_qwen35
from tests.conftest import CHECKOUT
from tools.release.formula import formula

WORKFLOWS = sorted((CHECKOUT / ".github/workflows").glob("*.yml"))


def run(*words: str | Path, cwd: Path) -> str:
    done = subprocess.run([*map(str, words)], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def tracked() -> list[str]:
    if not shutil.which("git") or not (CHECKOUT / ".git").exists():
        pytest.skip("not a git checkout: which files belong to the project is not known")
    return run("git", "ls-files", "-z", cwd=CHECKOUT).rstrip("\0").split("\0")


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both; the wheel is built from the source distribution."""
    pytest.importorskip("build", reason="build is not installed (extra 'test')")
    source = tmp_path_factory.mktemp("source")
    for name in tracked():
        if (CHECKOUT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(CHECKOUT / name, source / name)
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, cwd=source)
    return folder


def only(folder: Path, ending: str) -> Path:
    (found,) = folder.glob(f"*{ending}")
    return found


def test_contents(dist: Path) -> None:
    """The package's files, all of them and no others, and what says whose they are."""
    package = {name for name in tracked() if name.startswith("mlx_qwen35/")}
    wheel = zipfile.ZipFile(only(dist, ".whl")).namelist()
    assert {name for name in wheel if ".dist-info/" not in name} == package
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in wheel)
    with tarfile.open(only(dist, ".tar.gz")) as archive:
        source = {member.name.partition("/")[2] for member in archive if member.isfile()}
    made = {"PKG-INFO", "setup.cfg", *(name for name in source if ".egg-info/" in name)}
    assert source - made == package | {"LICENSE", "MANIFEST.in", "README.md", "pyproject.toml"}


def test_metadata(dist: Path) -> None:
    pytest.importorskip("twine", reason="twine is not installed (extra 'test')")
    run(sys.executable, "-m", "twine", "check", "--strict", *dist.iterdir(), cwd=dist)
    wheel = zipfile.ZipFile(only(dist, ".whl"))
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    said = email.message_from_bytes(wheel.read(name))
    assert (said["Name"], said["Version"]) == ("mlx-qwen35", mlx_qwen35.__version__)
    assert said["License-Expression"] == "Apache-2.0" and said["Requires-Python"] == ">=3.10"
    assert said.get_payload().startswith("# mlx_qwen35")
    needs = [need for need in said.get_all("Requires-Dist") if "extra ==" not in need]
    assert any(need.startswith("mlx>=") for need in needs) and len(needs) > 10


def test_installed_where_the_checkout_is_not(dist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an environment of its own; what it depends on is found in this one's folder."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "env", cwd=tmp_path)
    python = tmp_path / "env/bin/python"
    install = ("install", "--quiet", "--no-deps", "--no-index", "--no-compile")
    run(sys.executable, "-m", "pip", "--python", python, *install, only(dist, ".whl"), cwd=tmp_path)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(tmp_path / "env")}))
    (packages / "beside.pth").write_text(sysconfig.get_path("purelib") + "\n")
    assert f"mlx-qwen35 {mlx_qwen35.__version__}" in run(tmp_path / "env/bin/mlx-qwen35", "--version", cwd=tmp_path)
    where = run(python, "-c", "import mlx_qwen35; print(mlx_qwen35.Sampling(), mlx_qwen35.__file__)", cwd=tmp_path)
    assert str(packages) in where
    asked = ("generate", "-p", "What is 17 + 25?", "--temperature", "0")
    assert "42" in run(python, "-m", "mlx_qwen35", *asked, cwd=tmp_path)


def test_formula(tmp_path: Path) -> None:
    source = tmp_path / "mlx_qwen35-9.9.9.tar.gz"
    source.write_bytes(b"some bytes")
    text = formula(source, "https://example.org/mlx_qwen35-9.9.9.tar.gz", "https://example.org")
    assert f'sha256 "{hashlib.sha256(b"some bytes").hexdigest()}"' in text and "@" not in text.replace("python@", "")
    assert 'url "https://example.org/mlx_qwen35-9.9.9.tar.gz"' in text
    if shutil.which("ruby"):
        (tmp_path / "formula.rb").write_text(text)
        assert "Syntax OK" in run("ruby", "-c", "formula.rb", cwd=tmp_path)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_name_what_there_is(path: Path) -> None:
    """Files, make's targets and extras; and each can be read."""
    yaml = pytest.importorskip("yaml")
    jobs = yaml.safe_load(path.read_text())["jobs"]
    commands = "\n".join(step["run"] for job in jobs.values() for step in job["steps"] if "run" in step)
    targets = set(re.findall(r"^(\w+):", (CHECKOUT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake (\w+)", commands)) <= targets
    named = re.findall(r"(?<![\w./*-])(?:tests|tools|benchmarks)/[\w/.-]+", commands)
    assert not [name for name in named if not os.path.exists(CHECKOUT / name)]
