"""What is said on a Mac of memory that its GPU cannot keep in place, and of memory that it does not have."""

import re
import sys
import warnings
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_qwen35 import load
from mlx_qwen35.cli.main import main
from mlx_qwen35.errors import Qwen35Warning
from mlx_qwen35.library import demo_folder, memory
from mlx_qwen35.library.estimating import estimate
from mlx_qwen35.library.holding import hold

GB = 10**9


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """A Mac with 48 GB of which its GPU may keep 36."""
    found = {"max_recommended_working_set_size": 36 * GB, "memory_size": 48 * GB}
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda device=mx.cpu: found if device == mx.gpu else {})
    monkeypatch.setattr(memory, "installed_memory", lambda: found["memory_size"])
    return found


@pytest.fixture
def silent() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", Qwen35Warning)
        yield


def test_what_fits_is_not_talked_about(sizes: dict[str, int], silent: None) -> None:
    for given in (None, "36GB", "100%", 35 * GB):
        hold(demo_folder(), given)


def test_above_what_the_gpu_keeps_it_warns(sizes: dict[str, int]) -> None:
    with pytest.warns(Qwen35Warning, match="40.0 GB of memory are more than the 36.0 GB that macOS lets") as said:
        assert hold(demo_folder(), "40GB").stream is None
    assert len(said) == 1 and Path(said[0].filename).name != "memory.py"
    megabytes = int(re.search(r"`sudo sysctl iogpu.wired_limit_mb=(\d+)`", str(said[0].message))[1])
    assert 40 * GB <= megabytes << 20 < 40 * GB + (1 << 20)
    sizes["max_recommended_working_set_size"] = megabytes << 20  # after that command
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hold(demo_folder(), "40GB")


def test_the_system_is_left_its_share(sizes: dict[str, int]) -> None:
    with pytest.warns(Qwen35Warning, match="needs some for itself: more than 42.0 GB is not wise") as said:
        hold(demo_folder(), "47GB")
    assert "sysctl" not in str(said[0].message)


def test_above_what_there_is_it_refuses(sizes: dict[str, int], capsys: pytest.CaptureFixture[str]) -> None:
    message = "64.0 GB of memory are more than the 48.0 GB that this Mac has: give at most 36.0 GB"
    for ask in (lambda: hold(demo_folder(), "64GB"), lambda: load(memory="64GB")):
        with pytest.raises(ValueError, match=message):
            ask()
    assert main(["generate", "-p", "hello", "-n", "1", "--memory", "64GB"]) == 2
    assert message in capsys.readouterr().err
    assert estimate("demo", "64GB").fits  # of another machine


def test_the_command_warns_in_one_line(
    sizes: dict[str, int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def show(*warning: object) -> None:  # as Python does where nobody records warnings
        sys.stderr.write(warnings.formatwarning(*warning[:4]))

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", show)
        assert main(["generate", "-p", "Sort: b, a", "-n", "1", "--memory", "40GB"]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "40.0 GB" in line]
    assert len(said) == 1 and said[0].startswith("warning: 40.0 GB of memory are more than")


def test_weights_that_fill_the_gpu(sizes: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    weights = estimate("demo").weights.total
    sizes["max_recommended_working_set_size"] = int(weights / 0.95)
    monkeypatch.setattr("mlx_qwen35.library.holding.longest_resident", lambda *_: 4096)
    with pytest.warns(Qwen35Warning, match="the weights of demo take .* macOS lets the GPU keep in place") as said:
        hold(demo_folder())
    assert "sysctl iogpu.wired_limit_mb=" in str(said[0].message)
    sizes["max_recommended_working_set_size"] = int(weights / 0.85)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Qwen35Warning)
        hold(demo_folder())


def test_elsewhere_nothing_is_said(monkeypatch: pytest.MonkeyPatch, silent: None) -> None:
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    hold(demo_folder(), "900GB")
    memory.check_weights("demo", 900 * GB)
