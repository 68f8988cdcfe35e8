"""How much memory there is, and what "24GB", "60%" or nothing means of it.

Knows what devices and the system say. Knows nothing of models.
"""

from __future__ import annotations

import re

import mlx.core as mx

from mlx_qwen35.library.plan import parse_size
from mlx_qwen35.machine.gpu import gpu_memory, working_set
from mlx_qwen35.machine.system import free_memory, installed_memory

_PERCENT = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*%")


def memory_size(memory: int | str | None) -> tuple[int, str]:
    """(bytes, where they are from) of bytes, "24GB", "60%" of what this machine has for models, or None: what is free.

    Raises ValueError for anything else.
    """
    if memory is None:
        return available_memory()
    percent = _PERCENT.fullmatch(memory.strip()) if isinstance(memory, str) else None
    if percent is None:
        return parse_size(memory), "given"
    part = float(percent["number"]) / 100
    if not 0 < part <= 1:
        raise ValueError(f"{memory!r} is no share of memory: give more than 0% and at most 100%")
    size, source = _of_device() or (installed_memory(), "the memory of this machine")
    return int(part * size), f"{memory.strip()} of {source}"


def available_memory() -> tuple[int, str]:
    """(bytes, where they were found): what MLX recommends on a Mac, a GPU's memory, or the memory that is free."""
    return _of_device() or (free_memory(), "free on this machine")


def _of_device() -> tuple[int, str] | None:
    if found := working_set():
        return found, "MLX's recommended working set on this Mac"
    if mx.default_device().type == mx.gpu and (found := gpu_memory()):
        return found, "the memory of this GPU"
    return None
