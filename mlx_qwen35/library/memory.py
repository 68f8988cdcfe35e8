"""How much memory there is, and what "24GB", "60%" or nothing means of it.

Knows what devices and the system say. Knows nothing of models.
"""

from __future__ import annotations

import os
import re

import mlx.core as mx

from mlx_qwen35.library.plan import parse_size

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
    size, source = _of_device() or (_installed(), "the memory of this machine")
    return int(part * size), f"{memory.strip()} of {source}"


def available_memory() -> tuple[int, str]:
    """(bytes, where they were found): what MLX recommends on a Mac, a GPU's memory, or the memory that is free."""
    return _of_device() or (_free(), "free on this machine")


def _of_device() -> tuple[int, str] | None:
    if mx.metal.is_available():
        return int(mx.device_info()["max_recommended_working_set_size"]), "MLX's recommended working set on this Mac"
    if mx.default_device().type == mx.gpu:
        info = mx.device_info()
        found = next((int(info[key]) for key in ("memory_size", "total_memory") if info.get(key)), 0)
        if found:
            return found, "the memory of this GPU"
    return None


def _free() -> int:
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return _installed()


def _installed() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
