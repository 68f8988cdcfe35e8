"""What macOS says of a machine, on whatever system this is; and that nothing is an error."""

import os
import platform
import subprocess
import sys

import pytest

from mlx_qwen35.machine import system

VM_STAT = """Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                              100000.
Pages active:                            500000.
Pages inactive:                           40000.
Pages speculative:                         2000.
Pages throttled:                              0.
Pages wired down:                        150000.
Pages purgeable:                           7000.
"Translation faults":                 123456789.
"""
SAYS = {
    "/usr/sbin/sysctl -n hw.memsize": "51539607552\n",
    "/usr/sbin/sysctl -n machdep.cpu.brand_string": "Apple M4 Pro\n",
    "/usr/sbin/sysctl -n hw.model": "Mac16,7\n",
    "/usr/sbin/sysctl -n iogpu.wired_limit_mb": "0\n",
    "/usr/bin/vm_stat": VM_STAT,
    f"/bin/ps -o rss= -p {os.getpid()}": "  20480\n",
}


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A Mac whose programs say what is in the dictionary, and fail at all else."""
    says = dict(SAYS)

    def run(command: tuple[str, ...], **_: object) -> subprocess.CompletedProcess:
        line = " ".join(command)
        if line not in says:
            return subprocess.CompletedProcess(command, 1, "", f"unknown oid {line!r}")
        return subprocess.CompletedProcess(command, 0, says[line], "")

    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(platform, "mac_ver", lambda: ("15.5", ("", "", ""), "arm64"))
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    monkeypatch.setattr(system.subprocess, "run", run)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    return says


def test_a_mac(mac: dict[str, str]) -> None:
    assert system.is_mac() and system.system_name() == "macOS 15.5 arm64"
    assert (system.processor_name(), system.model_name()) == ("Apple M4 Pro", "Mac16,7")
    assert system.installed_memory() == 48 << 30
    assert system.free_memory() == 16384 * 142_000
    assert system.resident_memory() == 20 << 20
    assert system.processors() == os.cpu_count()
    assert system.wired_limit_set() is None
    mac["/usr/sbin/sysctl -n iogpu.wired_limit_mb"] = "40960"
    assert system.wired_limit_set() == 40 << 30


def test_a_mac_that_says_nothing(mac: dict[str, str]) -> None:
    mac.clear()
    assert system.processor_name() is system.model_name() is None
    assert system.wired_limit_set() is system.resident_memory() is None
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert system.installed_memory() == there == system.free_memory()
    for nonsense in ("words", "Mach Virtual Memory Statistics: (page size of 16384 bytes)\n"):
        mac["/usr/bin/vm_stat"] = mac["/usr/sbin/sysctl -n hw.memsize"] = nonsense
        assert system.free_memory() == there


def test_peaks_have_units(mac: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    class Used:
        ru_maxrss = 5000

    assert system.peak_of(Used()) == 5000
    assert system.peak_resident_memory() > 10_000  # as getrusage has it
    monkeypatch.setattr(sys, "platform", "linux")
    assert system.peak_of(Used()) == 5000 * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_linux() -> None:
    assert not system.is_mac() and system.system_name().startswith("Linux ")
    assert system.model_name() is system.wired_limit_set() is None and system.processor_name()
    assert 1 << 20 < system.free_memory() <= system.installed_memory()
    held = system.resident_memory()
    assert 1 << 20 < held <= system.peak_resident_memory() < system.installed_memory()
    assert system.processors() == len(os.sched_getaffinity(0))


def test_programs_that_fail_or_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "_SECONDS", 0.2)
    code = "import time; print('late', flush=True); time.sleep(9)"
    assert system.said(sys.executable, "-c", code) is None
    assert system.said(sys.executable, "-c", "print('right'); raise SystemExit(1)") is None
    assert system.said("/nowhere/sysctl", "-n", "x") is None
    monkeypatch.setattr(system, "_SECONDS", 20)
    assert system.said(sys.executable, "-c", "print(' right ')") == "right"
    assert system.said(sys.executable, "-c", "pass") is None


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home of/someone")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert str(system.cache_folder()) == "/home of/someone/.cache/mlx-qwen35"
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert str(system.cache_folder()) == "/elsewhere/mlx-qwen35"
