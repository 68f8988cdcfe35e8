"""What a report about this machine has to say: findings, one a line, that can be pasted as they are.

Knows what is worth asking, and asks each thing by itself: what cannot be found is said in its line, and never an error.
Everything else is imported only when it is asked, because a broken MLX is one of the things to be found. No names of
users and no values of variables that may hold secrets get into it.
"""

from __future__ import annotations

import getpass
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlx_qwen35.library.listing import LocalModels

PACKAGE = "mlx-qwen35"
_PACKAGES = ("numpy", "safetensors", "tokenizers", "huggingface_hub", "pillow")
_NOT_FOR_USERS = ("test", "dev")  # extras
_VARIABLES = (
    "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_ENDPOINT", "XDG_CACHE_HOME", "TRANSFORMERS_OFFLINE", "LD_PRELOAD",
    "MLX_METAL_FAST_SYNCH", "MLX_MAX_OPS_PER_BUFFER", "MLX_ENABLE_TF32", "OPENBLAS_CORETYPE",
)  # fmt: skip
_QUESTION, _ANSWER = "What is 17 + 25?", "42"
_ANSWER_SECONDS = 60  # that the demo may take, with the compiling of kernels


@dataclass(frozen=True)
class Finding:
    """One line: what was asked, what was found in words, and the same as values for programs."""

    name: str
    words: str
    values: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """All findings, in order."""

    findings: tuple[Finding, ...]

    def __str__(self) -> str:
        wide = max(len(finding.name) for finding in self.findings)
        return "\n".join(f"{finding.name:{wide}}  {finding.words}" for finding in self.findings)

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """For JSON: each finding's values, with the words under "said"."""
        return {finding.name: {"said": finding.words, **finding.values} for finding in self.findings}


Check = Callable[[], tuple[str, dict[str, Any]]]


def examine(*, demo: bool = True, disk: bool = True) -> Report:
    """Ask everything. demo: let the demo answer, in a process of its own; disk: read from it for a second."""
    _models.cache_clear()
    checks: dict[str, Check] = {
        "version": _version, "machine": _machine, "memory": _memory, "Python": _python, "MLX": _mlx,
        "packages": _packages, "extras": _extras,
    }  # fmt: skip
    checks |= {"demo": _demo} if demo else {}
    checks |= {"kernels": _kernels, "LM Studio": _lmstudio, "Hub cache": _hub_cache}
    checks |= {"disk": _disk} if disk else {}
    checks |= {"own cache": _own_cache, "variables": _variables}
    return Report(tuple(_asked(name, check) for name, check in checks.items()))


def _asked(name: str, check: Check) -> Finding:
    try:
        words, values = check()
    except Exception as error:  # whatever is broken is what this is for
        problem = f"{type(error).__name__}: {error}".splitlines()[0]
        words, values = f"could not be found ({problem})", {"problem": problem}
    return Finding(name, without_names(words), without_names(values))


def without_names(value: Any) -> Any:
    """The same with ~ for the home folder, and "someone" for the user's name where it is part of a path."""
    if isinstance(value, dict):
        return {key: without_names(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_names(item) for item in value]
    if not isinstance(value, str):
        return value
    names = set()
    with suppress(Exception):
        home = str(Path.home())
        for folder in sorted({home, os.path.realpath(home)} - {"/"}, key=len, reverse=True):
            value = re.sub(rf"{re.escape(folder.rstrip('/'))}(?![\w.-])", "~", value)
            names.add(os.path.basename(folder.rstrip("/")))
    with suppress(Exception):
        names.add(getpass.getuser())
    for name in sorted(names - {""}, key=len, reverse=True):
        value = re.sub(rf"(?<=/){re.escape(name)}(?![\w.-])", "someone", value)
    return value


def _version() -> tuple[str, dict[str, Any]]:
    import mlx_qwen35

    place = Path(mlx_qwen35.__file__).parent
    return f"{PACKAGE} {mlx_qwen35.__version__} in {place}", {"version": mlx_qwen35.__version__, "folder": str(place)}


def _machine() -> tuple[str, dict[str, Any]]:
    from mlx_qwen35.machine import system

    values = {
        "processor": system.processor_name(), "model": system.model_name(), "processors": system.processors(),
        "system": system.system_name(),
    }  # fmt: skip
    model = f" ({values['model']})" if values["model"] else ""
    chip = values["processor"] or "a processor that the system does not name"
    return f"{chip}{model}, {values['processors']} processors, {values['system']}", values


def _memory() -> tuple[str, dict[str, Any]]:
    from mlx_qwen35.machine import system

    there, free, allowed = system.installed_memory(), system.free_memory(), system.wired_limit_set()
    counted = f"{there >> 30} GB as Apple counts, {_size(there)}" if system.is_mac() else _size(there)
    words = f"{counted}, {_size(free)} of it free"
    values: dict[str, Any] = {"installed": there, "free": free, "wired_limit_set": allowed}
    if system.is_mac():
        words += f"; iogpu.wired_limit_mb {'is not set' if allowed is None else f'is {allowed >> 20}'}"
    return words, values


def _python() -> tuple[str, dict[str, Any]]:
    version, kind = platform.python_version(), platform.python_implementation()
    values = {"version": version, "implementation": kind, "executable": sys.executable}
    translated = _is_translated()
    words = f"{kind} {version}, {sys.executable}"
    if translated:
        words += "; translated by Rosetta: MLX needs a Python for arm64"
    return words, {**values, "translated": translated}


def _is_translated() -> bool:
    from mlx_qwen35.machine import system

    return system.is_mac() and system.sysctl("sysctl.proc_translated") == "1"


def _mlx() -> tuple[str, dict[str, Any]]:
    import mlx.core as mx

    from mlx_qwen35.machine import gpu

    device = str(mx.default_device().type).removeprefix("DeviceType.")
    info, most = gpu.gpu_info(), gpu.working_set()
    values = {"version": mx.__version__, "metal": gpu.has_metal(), "default_device": device, "gpu": info}
    words = f"{mx.__version__}, {'with' if gpu.has_metal() else 'without'} Metal, computing on the {device}"
    if info.get("device_name"):
        words += f"; {info['device_name']}" + (f" ({info['architecture']})" if info.get("architecture") else "")
    return words + (f"; keeps up to {_size(most)} in place" if most else ""), values


def _packages() -> tuple[str, dict[str, Any]]:
    found = {name: _installed(name) for name in _PACKAGES}
    return ", ".join(f"{name} {version or 'not installed'}" for name, version in found.items()), found


def _extras() -> tuple[str, dict[str, Any]]:
    extras = {}
    for name, packages in _extra_packages().items():
        extras[name] = {package: _installed(package) for package in packages}
    words = []
    for name, packages in extras.items():
        lacks = [package for package, version in packages.items() if version is None]
        there = ", ".join(f"{package} {version}" for package, version in packages.items() if version)
        words.append(f"{name} no (pip install {' '.join(lacks)})" if lacks else f"{name} yes ({there})")
    return "; ".join(words) or "none", extras


def _extra_packages() -> dict[str, list[str]]:
    """Extra -> the packages that it brings; raises PackageNotFoundError where this was not installed."""
    extras = metadata.metadata(PACKAGE).get_all("Provides-Extra") or ()
    found = {extra: _brought(PACKAGE, extra) for extra in extras if extra not in _NOT_FOR_USERS}
    return {extra: packages for extra, packages in found.items() if packages}


def _brought(package: str, extra: str) -> list[str]:
    """What an extra of a package brings on this system, also by extras of others, such as mlx[cuda13]."""
    from packaging.requirements import Requirement

    names: list[str] = []
    for asked in map(Requirement, metadata.requires(package) or ()):
        marker = asked.marker
        if marker is None or not marker.evaluate({"extra": extra}) or marker.evaluate({"extra": ""}):
            continue
        if asked.extras and _installed(asked.name):  # which may bring nothing on this system
            names += [name for other in asked.extras for name in _brought(asked.name, other)]
        else:
            names.append(asked.name)
    return names


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _demo() -> tuple[str, dict[str, Any]]:
    """In a process of its own: what crashes there is a finding."""
    code = "import sys; from mlx_qwen35.cli.main import main; sys.exit(main())"
    ask = ["generate", "-p", _QUESTION, "--temperature", "0", "--max-tokens", "200"]
    around = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    given = {"capture_output": True, "text": True, "errors": "replace", "stdin": subprocess.DEVNULL, "env": around}
    began = time.monotonic()
    try:
        done = subprocess.run([sys.executable, "-c", code, *ask], timeout=_ANSWER_SECONDS, **given)
    except subprocess.TimeoutExpired:
        return f"gave no answer within {_ANSWER_SECONDS} s", {"status": None}
    seconds = time.monotonic() - began
    answer = " ".join(done.stdout.rpartition("</think>")[2].split())
    values = {"question": _QUESTION, "answer": answer, "status": done.returncode, "seconds": round(seconds, 2)}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["nothing on standard error"])[-1]
        return f"ended with status {done.returncode}: {last}", {**values, "error": last}
    right = "" if _ANSWER in answer else ", which is wrong"
    warned = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    words = [f"says {answer[-40:]!r} to {_QUESTION!r}{right}, {seconds:.1f} s with the start", *warned]
    return "; ".join(words), {**values, "warnings": warned}


def _kernels() -> tuple[str, dict[str, Any]]:
    from mlx_qwen35 import kernels

    told = getattr(kernels, "checked", None)  # -> {name: what is wrong with it, None: nothing}
    results: dict[str, str | None] = told() if told else {}
    if not results:
        return "not checked yet", {"checked": {}}
    wrong = {name: why for name, why in results.items() if why}
    words = f"{len(results) - len(wrong)} of {len(results)} right"
    return words + "".join(f"; {name}: {why}" for name, why in wrong.items()), {"checked": results}


def _lmstudio() -> tuple[str, dict[str, Any]]:
    from mlx_qwen35.library import lmstudio

    return _models_in(lmstudio.models_folder(), lmstudio.PLACE)


def _hub_cache() -> tuple[str, dict[str, Any]]:
    from mlx_qwen35.library import hub_cache

    return _models_in(hub_cache.cache_folder(), hub_cache.PLACE)


def _models_in(folder: Path, place: str) -> tuple[str, dict[str, Any]]:
    models = [model for model in _models() if model.place == place]
    broken = [model for model in models if not model.complete]
    values = {"folder": str(folder), "there": folder.is_dir(), "models": len(models), "broken": len(broken)}
    if not folder.is_dir():
        return f"{folder} is not there", values
    words = f"{folder}: {len(models)} of this family"
    return words + (f", {len(broken)} of them incomplete or not readable" if broken else ""), values


@lru_cache(maxsize=1)
def _models() -> LocalModels:
    from mlx_qwen35.library.listing import list_models

    return list_models()


def _disk() -> tuple[str, dict[str, Any]]:
    from mlx_qwen35.library.speed import FROM_MEMORY, file_speed
    from mlx_qwen35.machine.files import can_forget

    path = max(_weight_files(), key=lambda path: path.stat().st_size)
    speed, read = file_speed(path)
    sure = can_forget()
    words = f"{speed / 1e9:.2f} GB/s, reading {_size(read)} here and there of {path.parent.name}/{path.name}"
    return words + ("" if sure else f" {FROM_MEMORY}"), {"bytes_per_second": speed, "read": read, "from_disk": sure}


def _weight_files() -> Iterator[Path]:
    from mlx_qwen35.machine.files import listed

    for model in _models():
        yield from (path for path in listed(model.folder, "*.safetensors") if path.is_file())


def _own_cache() -> tuple[str, dict[str, Any]]:
    from mlx_qwen35.machine.files import listed
    from mlx_qwen35.machine.system import cache_folder

    folder = cache_folder()
    size = sum(path.stat().st_size for path in listed(folder, "**/*") if path.is_file())
    upward = next(place for place in (folder, *folder.parents) if place.exists())
    writable = os.access(upward, os.W_OK)
    words = f"{folder}, {_size(size)}" + ("" if writable else ", which cannot be written to")
    return words, {"folder": str(folder), "bytes": size, "writable": writable}


def _variables() -> tuple[str, dict[str, Any]]:
    found = [name for name in _VARIABLES if os.environ.get(name)]
    return (f"set: {', '.join(found)}" if found else "none that matters here is set"), {"set": found}


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
