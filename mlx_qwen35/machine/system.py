"""What the system says of this machine: processor, memory, versions, where caches lie.

Knows sysctl, vm_stat and /proc. Knows nothing of MLX and of models. What a system does not say is None, and never an
error: these words go into reports.
"""

from __future__ import annotations

import os
import platform
import re
import resource
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

_SECONDS = 5  # that a program of the system may take to answer


def is_mac() -> bool:
    """Whether this is macOS."""
    return sys.platform == "darwin"


def processors() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor_name() -> str | None:
    """As its maker calls it, such as "Apple M4 Max"."""
    if is_mac():
        return sysctl("machdep.cpu.brand_string")
    return _field("/proc/cpuinfo", "model name") or platform.processor() or None


def system_name() -> str:
    """System, its version and the architecture, such as "macOS 15.5 arm64"."""
    if is_mac():
        version = platform.mac_ver()[0]
        return " ".join(part for part in ("macOS", version, platform.machine()) if part)
    return f"{platform.system()} {platform.release()} {platform.machine()}"


def without_mlx() -> str | None:
    """Why MLX has no files for this machine, in words and with what to do; None where it has some."""
    if is_mac() and platform.machine() == "x86_64":
        rosetta = sysctl("sysctl.proc_translated") == "1"
        return (
            "a Python that runs under Rosetta: install one for Apple silicon (arm64)"
            if rosetta
            else "Macs with Intel processors: it takes Apple silicon, or Linux"
        )
    if sys.platform in ("win32", "cygwin"):
        return "Windows as this package needs it: use Linux, under WSL for instance"
    return None


def model_name() -> str | None:
    """Of a Mac, such as "Mac16,5"; None elsewhere."""
    return sysctl("hw.model") if is_mac() else None


def installed_memory() -> int:
    """Bytes of memory that the machine has."""
    told = sysctl("hw.memsize") if is_mac() else None
    if told and told.isdigit():
        return int(told)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_memory() -> int:
    """Bytes that programs may take without others being pushed out; all there are where the system does not say."""
    found = _free_on_mac() if is_mac() else _kilobytes("/proc/meminfo", "MemAvailable")
    return installed_memory() if found is None else found


def wired_limit_set() -> int | None:
    """Bytes that a user of a Mac lets the GPU keep in place (sysctl iogpu.wired_limit_mb); None: nothing was set."""
    told = sysctl("iogpu.wired_limit_mb") if is_mac() else None
    return int(told) << 20 if told and told.isdigit() and int(told) else None


def resident_memory() -> int | None:
    """Bytes that this process holds at this moment."""
    if not is_mac():
        return _kilobytes("/proc/self/status", "VmRSS")
    told = said("/bin/ps", "-o", "rss=", "-p", str(os.getpid()))
    return int(told) << 10 if told and told.isdigit() else None


def peak_resident_memory() -> int:
    """Bytes: the most that this process has held, since forget_peak() where the system can forget it."""
    found = peak_of_process(os.getpid())  # what getrusage tells on Linux may be a parent's, from before exec
    return peak_of(resource.getrusage(resource.RUSAGE_SELF)) if found is None else found


def peak_of_process(process: int) -> int | None:
    """Bytes: the most that another process, which lives, has held; None where the system does not tell others."""
    return None if is_mac() else _kilobytes(f"/proc/{process}/status", "VmHWM")


def forget_peak() -> None:
    """Count the most that this process holds from now on, where the system can do that."""
    if not is_mac():
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_of(used: resource.struct_rusage) -> int:
    """Bytes: the most that a process has held, by what getrusage or wait4 tells of it."""
    return used.ru_maxrss * (1 if is_mac() else 1024)


def cache_folder() -> Path:
    """Where this package keeps what it can make again, whether or not the folder is there."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mlx-qwen35"


def state_folder() -> Path:
    """Where this package keeps what it cannot make again and nobody misses for long, whether or not it is there."""
    usual = "~/Library/Application Support" if is_mac() else "~/.local/state"
    return Path(os.environ.get("XDG_STATE_HOME") or usual).expanduser() / "mlx-qwen35"


def sysctl(name: str) -> str | None:
    """What macOS has under a name; None where it has nothing."""
    return said("/usr/sbin/sysctl", "-n", name)


def said(*command: str) -> str | None:
    """What a program of the system prints, None where it fails or does not answer within five seconds."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, stdin=subprocess.DEVNULL)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def _free_on_mac() -> int | None:
    """What is free, was read on speculation, or has not been used for a while: macOS gives that without compressing."""
    told = said("/usr/bin/vm_stat") or ""
    size = re.search(r"page size of (\d+) bytes", told)
    pages = dict(re.findall(r"^Pages (\w+):\s+(\d+)\.?$", told, re.MULTILINE))
    if size is None or "free" not in pages:
        return None
    return int(size[1]) * sum(int(pages.get(kind, 0)) for kind in ("free", "speculative", "inactive"))


def _field(path: str, name: str) -> str | None:
    """The value of the first line "name: value" of a file."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                key, colon, value = line.partition(":")
                if colon and key.strip() == name:
                    return value.strip() or None
    except OSError:
        pass
    return None


def _kilobytes(path: str, name: str) -> int | None:
    """Such a value in kB, as bytes."""
    told = (_field(path, name) or "").split()
    return int(told[0]) * 1024 if told and told[0].isdigit() else None
