"""Which Mac is large enough: what macOS lets the GPU keep of a Mac's memory, where nobody has changed that.

Knows sizes and shares. Asks no machine: a Mac says its own working set (memory.py).

Apple gives no rule for Metal's recommendedMaxWorkingSetSize. Reported are 5.3 of 8 GB and 10.7 of 16 GB (two thirds),
and three quarters of more than 36 GB; newer systems give more, 11.8 of 16 and 107.5 of 128 GB. Taken is the least.
"""

from __future__ import annotations

import re

from mlx_qwen35.errors import ArgumentError

SIZES = (8, 16, 18, 24, 32, 36, 48, 64, 96, 128, 192, 256, 512)  # GB as Apple counts them, 2^30 bytes
_TWO_THIRDS_UP_TO = 36
_MAC = re.compile(r"(\d{1,4})\s*(?:gi?b?)?", re.IGNORECASE)


def kept_by_gpu(gigabytes: int) -> int:
    """Bytes of a Mac with so much memory that a model may take."""
    memory = gigabytes << 30
    return memory * 2 // 3 if gigabytes <= _TWO_THIRDS_UP_TO else memory * 3 // 4


def mac_for(size: int) -> int | None:
    """The smallest Mac, in GB, whose GPU may keep `size` bytes; None: there is none."""
    return next((gigabytes for gigabytes in SIZES if kept_by_gpu(gigabytes) >= size), None)


def mac_memory(mac: int | str) -> tuple[int, str]:
    """(bytes for a model, in words what they are) of a Mac of `mac` GB: 24, or "24GB". Raises ArgumentError."""
    told = _MAC.fullmatch(str(mac).strip()) if isinstance(mac, (int, str)) and not isinstance(mac, bool) else None
    if told is None or not int(told[1]):
        raise ArgumentError(f"mac is {mac!r}; give the memory of a Mac, such as 24GB")
    gigabytes = int(told[1])
    return kept_by_gpu(gigabytes), f"what macOS lets the GPU keep of a Mac's {gigabytes} GB, or more"
