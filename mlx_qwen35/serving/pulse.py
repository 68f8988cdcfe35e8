"""When a client has to hear something, whatever it is. Knows a clock."""

from __future__ import annotations

import time

from mlx_qwen35.serving.exchange import ALIVE_EVERY


class Pulse:
    """Of one stream. While a long call is written there are Parts, and nothing of them can be told yet."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def due(self) -> bool:
        """Whether nothing was told for ALIVE_EVERY seconds."""
        return time.monotonic() - self._last >= ALIVE_EVERY

    def beat(self) -> None:
        """Something is told now."""
        self._last = time.monotonic()
