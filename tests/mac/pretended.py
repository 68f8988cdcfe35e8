"""A Mac, pretended: `pytest --as-mac` runs the suite as if this were one, its child processes too.

pretend() changes what code asks a system: sys.platform, what `platform` says, functions of os that macOS lacks, /proc,
sysctl, vm_stat and ps, and Metal, which is said to be there beside a CPU that is MLX's default device. Nothing is
computed by a GPU. Modules of others are imported as on this system, since what they bring (compiled for it) is of it.

Child processes pretend too: ENVIRONMENT sets a variable, and puts the folder `site` with its sitecustomize.py, which
reads that, in front of what they import. Knows no tests.
"""

from __future__ import annotations

import builtins
import fcntl
import importlib.abc
import importlib.machinery
import io
import os
import platform
import resource
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[2]
VARIABLE = "MLX_QWEN35_TESTS_AS_MAC"
SITE = Path(__file__).parent / "site"
GPU = {  # of a small Mac: what a test only gets on a large one is found out
    "architecture": "applegpu_g13g", "device_name": "Apple M1", "memory_size": 8 << 30,
    "max_buffer_length": 4 << 30, "max_recommended_working_set_size": 5461 << 20, "resource_limit": 499000,
}  # fmt: skip
LACKING = (  # of os, on macOS
    "posix_fadvise", "posix_fallocate", "sched_getaffinity", "sched_setaffinity", "O_DIRECT", "RWF_NOWAIT",
    "copy_file_range", "memfd_create", "fdatasync", "pidfd_open", "eventfd",
)  # fmt: skip
NO_KERNELS = "cannot be pretended: a GPU that computes"
CANNOT = {  # beginnings of tests' names, and why; who wants kernels to run skips by NO_KERNELS
    "tests/test_quickstart.py::test_in_a_kernel": "Jupyter's kernel, which asks macOS not to nap",
}
_OURS = ("mlx_qwen35", "tests", "benchmarks", "conftest", "__main__")
_REAL = sys.platform
_PLATFORM = {
    "mac_ver": ("15.5", ("", "", ""), "arm64"), "system": "Darwin", "machine": "arm64", "processor": "arm",
    "release": "24.5.0",
}  # fmt: skip
_VM_STAT = "Mach Virtual Memory Statistics: (page size of 16384 bytes)\n" + "".join(
    f"Pages {kind}: {count}.\n" for kind, count in (("free", 90_000), ("inactive", 90_000), ("speculative", 500))
)
_SAYS = {
    "hw.memsize": str(GPU["memory_size"]), "machdep.cpu.brand_string": GPU["device_name"], "hw.model": "MacBookAir10,1",
    "iogpu.wired_limit_mb": "0",
}  # fmt: skip


def is_pretended() -> bool:
    """Whether this process is on a pretended Mac."""
    return VARIABLE in os.environ


def environment() -> dict[str, str]:
    """Variables by which child processes pretend too."""
    there = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    return {VARIABLE: "1", "PYTHONPATH": os.pathsep.join([str(SITE), *(path for path in there if path != str(SITE))])}


def pretend() -> None:
    """From now on this process is on a Mac. A second call does nothing."""
    if sys.platform == "darwin":
        return
    os.environ.update(environment())
    sysconfig.get_config_vars()  # remembers what it reads from a file that is called like the system
    sys.meta_path.insert(0, _AsOnThisSystem())
    _hide_proc()
    _say_what_macos_says()
    _have_its_fcntl()
    _count_in_bytes()
    for name in LACKING:
        if hasattr(os, name):
            delattr(os, name)
    if "mlx.core" in sys.modules:
        _pretend_metal(sys.modules["mlx.core"])
    for name, told in _PLATFORM.items():
        setattr(platform, name, _unless_really(getattr(platform, name), told))
    sys.platform = "darwin"


def _unless_really(real: Callable[..., Any], told: Any) -> Callable[..., Any]:
    """What `platform` says, but for a module that is being imported as on this system."""
    return lambda *args, **more: told if sys.platform == "darwin" else real(*args, **more)


class _AsOnThisSystem(importlib.abc.MetaPathFinder):
    """Imports modules that are not this project's as on the system that is really there; then patches MLX."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] in _OURS:
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                if hasattr(spec.loader, "exec_module") and not isinstance(spec.loader, type):
                    spec.loader = _Really(spec.loader)
                return spec
        return None


class _Really:
    """Runs modules as on the system that is there; all else is the loader's in it, which is shared."""

    def __init__(self, loader: Any):
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        before = sys.platform
        sys.platform = _REAL
        try:
            self._loader.exec_module(module)
        finally:
            sys.platform = before
        if module.__name__ == "mlx.core":
            _pretend_metal(module)


def _pretend_metal(mx: Any) -> None:
    """A GPU that answers questions. Who computes on it gets MLX's own error."""
    real, cpu, limit = mx.device_info, mx.cpu, [0]

    def device_info(device: Any = None) -> dict[str, Any]:
        asked = mx.default_device() if device is None else device
        return dict(GPU) if asked in (mx.gpu, mx.Device(mx.gpu, 0)) else real(cpu)

    def set_wired_limit(nbytes: int) -> int:
        if nbytes > GPU["max_recommended_working_set_size"]:
            raise ValueError("[metal::set_wired_limit] Setting a wired limit larger than the maximum is not allowed")
        before, limit[0] = limit[0], nbytes
        return before

    mx.device_info, mx.set_wired_limit = device_info, set_wired_limit
    mx.metal.is_available = lambda: _asked_by_us()  # others would make kernels
    mx.set_default_device(mx.cpu)


def _hide_proc() -> None:
    """There is no /proc for this project's code, nor for what it calls in the standard library."""

    def without(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *args: Any, **more: Any) -> Any:
            if isinstance(path, str | bytes | os.PathLike) and os.fsdecode(path).startswith("/proc"):
                if _asked_by_us():
                    raise FileNotFoundError(2, "No such file or directory", os.fsdecode(path))
            return real(path, *args, **more)

        return call

    for module, names in ((builtins, ["open"]), (io, ["open"]), (os, ["open", "stat", "listdir", "scandir"])):
        for name in names:
            setattr(module, name, without(getattr(module, name)))


def _asked_by_us() -> bool:
    """Whether the nearest caller outside the standard library is of this project."""
    frame = sys._getframe(2)
    library = os.path.dirname(os.__file__)
    while frame is not None:
        file = frame.f_code.co_filename
        if "site-packages" in file:
            return False
        if file != __file__ and not file.startswith(("<", library)):
            return file.startswith(str(CHECKOUT))
        frame = frame.f_back
    return False


def _have_its_fcntl() -> None:
    """F_NOCACHE and F_FULLFSYNC, of which the latter syncs."""
    real = fcntl.fcntl

    def call(handle: Any, command: int, argument: Any = 0) -> Any:
        if command == 51:
            os.fsync(handle)
        return 0 if command in (48, 51) else real(handle, command, argument)

    fcntl.fcntl = call


def _count_in_bytes() -> None:
    """As macOS does with ru_maxrss, which is in KiB here."""

    def counted(used: Any) -> Any:
        told = {name: getattr(used, name) for name in dir(used) if name.startswith("ru_")}
        return SimpleNamespace(**told | {"ru_maxrss": used.ru_maxrss * 1024})

    usage, wait = resource.getrusage, os.wait4
    resource.getrusage = lambda who: counted(usage(who))

    def wait4(process: int, options: int) -> tuple[int, int, Any]:
        found, status, used = wait(process, options)
        return found, status, counted(used)

    os.wait4 = wait4


def _say_what_macos_says() -> None:
    real = subprocess.run

    def run(command: Any, *args: Any, **more: Any) -> Any:
        words = [str(word) for word in command] if isinstance(command, list | tuple) else []
        program = os.path.basename(words[0]) if words else ""
        if program == "sysctl":
            told = _SAYS.get(words[-1])
            return subprocess.CompletedProcess(command, 1 if told is None else 0, f"{told or ''}\n", "")
        if program == "vm_stat":
            return subprocess.CompletedProcess(command, 0, _VM_STAT, "")
        return real(command, *args, **more)

    subprocess.run = run
