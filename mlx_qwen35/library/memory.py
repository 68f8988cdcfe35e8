"""How much memory there is, and what "24GB", "60%" or nothing means of it.

Knows what devices and the system say. Knows nothing of models.
"""

from __future__ import annotations

import re
import warnings

import mlx.core as mx

from mlx_qwen35.errors import ArgumentError, Qwen35Warning
from mlx_qwen35.library.plan import parse_size, shown_size
from mlx_qwen35.machine.gpu import gpu_memory, working_set
from mlx_qwen35.machine.system import free_memory, installed_memory

_FULL = 0.9  # of what Metal recommends; mlx-lm warns from there on
_LEAST_FOR_SYSTEM = 4 << 30  # bytes
_FEWEST = 10**6  # bytes; less without a unit was meant in another one
_PERCENT = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*%")


def memory_size(memory: int | str | None) -> tuple[int, str]:
    """(bytes, where they are from) of bytes, "24GB", "60%" of what this machine has for models, or None: what is free.

    Raises ArgumentError for anything else.
    """
    if memory is None:
        return available_memory()
    percent = _PERCENT.fullmatch(memory.strip()) if isinstance(memory, str) else None
    if percent is None:
        return parse_size(memory, fewest=_FEWEST), "given"
    part = float(percent["number"]) / 100
    if not 0 < part <= 1:
        raise ArgumentError(f"{memory!r} is no share of memory: give more than 0% and at most 100%")
    size, source = _of_device() or (installed_memory(), "the memory of this machine")
    return int(part * size), f"{memory.strip()} of {source}"


def available_memory() -> tuple[int, str]:
    """(bytes, where they were found): what MLX recommends on a Mac, a GPU's memory, or the memory that is free."""
    return _of_device() or (free_memory(), "free on this machine")


def memory_left() -> int:
    """Bytes for another model, beside what MLX holds in this process."""
    found = _of_device()
    return found[0] - mx.get_active_memory() if found else free_memory()


def check_ceiling(size: int) -> None:
    """Whether a Mac can give `size` bytes: warns above what Metal recommends, raises ArgumentError above what there is.

    Elsewhere nothing is said.
    """
    recommended, there = working_set(), installed_memory()
    if recommended is None or size <= recommended:
        return
    if size > there:
        raise ArgumentError(
            f"{shown_size(size)} of memory are more than the {shown_size(there)} that this Mac has: give at most "
            f"{shown_size(recommended)}, which is what MLX recommends on it"
        )
    warnings.warn(
        f"{shown_size(size)} of memory are more than the {shown_size(recommended)} that macOS lets the GPU keep in "
        f"place: what is above may be compressed or swapped out, which is slow. {_how_to_raise(size, there)}",
        Qwen35Warning,
        stacklevel=3,
    )


def check_weights(name: str, weights: int) -> None:
    """Warns where the weights of a resident model leave little of what a Mac lets the GPU keep, as mlx-lm does."""
    recommended = working_set()
    if recommended is None or weights <= _FULL * recommended:
        return
    more = _how_to_raise(int(weights / _FULL), installed_memory())
    warnings.warn(
        f"the weights of {name} take {shown_size(weights)} of the {shown_size(recommended)} that macOS lets the GPU "
        f"keep in place: answers may be slow. Take fewer bits. {more}",
        Qwen35Warning,
        stacklevel=3,
    )


def _how_to_raise(size: int, there: int) -> str:
    """What to do for `size` bytes to be kept in place, if the system can spare them."""
    most = there - max(_LEAST_FOR_SYSTEM, there // 8)
    if size > most:
        return f"This Mac has {shown_size(there)}, and needs some for itself: more than {shown_size(most)} is not wise"
    return f"`sudo sysctl iogpu.wired_limit_mb={-(-size // 2**20)}` allows as much until the Mac is started again"


def _of_device() -> tuple[int, str] | None:
    if found := working_set():
        return found, "MLX's recommended working set on this Mac"
    if mx.default_device().type == mx.gpu and (found := gpu_memory()):
        return found, "the memory of this GPU"
    return None
