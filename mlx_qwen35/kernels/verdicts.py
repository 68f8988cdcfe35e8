"""What kernels were found to be, kept from one start to the next in a file of the user's cache.

Knows the file, and for what machine and versions a verdict holds. Knows no kernel. A file that is damaged or not ours
counts as none, and where none can be written nothing is kept: either costs a check, never an error.
"""

from __future__ import annotations

import json
import os
import tempfile
from contextlib import suppress
from pathlib import Path

import mlx.core as mx

import mlx_qwen35

from ..machine.gpu import gpu_info
from ..machine.system import cache_folder, system_name
from .backend import Backend, current

_FORMAT = "mlx-qwen35 kernels 1"
_KEPT = 8  # machines and versions

Verdicts = dict[str, "str | None"]  # by key of a trial: what is wrong; None: nothing


def verdict_file() -> Path:
    """Where they are kept."""
    return cache_folder() / "kernels.json"


def identity(backend: Backend) -> str:
    """What a verdict holds for: the GPU, the system whose compiler it is, MLX, this package."""
    info = gpu_info()
    device = " ".join(str(info[key]) for key in ("device_name", "architecture") if info.get(key)) or "no GPU"
    return " | ".join((backend.name, device, system_name(), f"mlx {mx.__version__}", mlx_qwen35.__version__))


def read(file: Path, holder: str) -> Verdicts:
    """Those of one identity; {} where there are none."""
    return _read_all(file).get(holder, {})


def remember(file: Path, holder: str, found: Verdicts) -> None:
    """Add some, atomically."""
    everything = _read_all(file)
    own = everything.pop(holder, {}) | found
    kept = dict(list(everything.items())[-(_KEPT - 1) :]) | {holder: own}
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}-")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as made:
                json.dump({"format": _FORMAT, "verdicts": kept}, made, indent=1)
            os.replace(name, file)
        except BaseException:
            with suppress(OSError):
                os.unlink(name)
            raise


def checked(file: Path | None = None) -> dict[str, str | None]:
    """Kernels that were checked on this machine with these versions: name -> what is wrong with one, None: nothing.

    {} where none was yet, or there is no GPU for them.
    """
    backend = current()
    if backend is None:
        return {}
    found: dict[str, str | None] = {}
    for key, why in read(file or verdict_file(), identity(backend)).items():
        name = key.split(" ", 1)[0]
        found[name] = found.get(name) or why
    return found


def _read_all(file: Path) -> dict[str, Verdicts]:
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
        if held["format"] != _FORMAT:
            return {}
        every = held["verdicts"]
        sound = all(
            isinstance(key, str) and isinstance(why, str | None) for own in every.values() for key, why in own.items()
        )
        return every if sound else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
