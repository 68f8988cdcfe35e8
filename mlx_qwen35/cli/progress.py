"""How far a long step is, on standard error. Knows counts and terminals, not what is counted."""

from __future__ import annotations

import sys
import time

REDRAW_SECONDS = 0.1


class Progress:
    """Called with (done, total). A terminal sees one line that changes, a file one line at the end."""

    def __init__(self, doing: str, unit: str) -> None:
        self._doing, self._unit = doing, unit
        self._started = time.perf_counter()
        self._drawn = 0.0

    def __call__(self, done: int, total: int) -> None:
        now = time.perf_counter()
        if done == 0:
            self._started = now
        finished = done >= total
        live = sys.stderr.isatty()
        if not finished and not (live and now - self._drawn >= REDRAW_SECONDS):
            return
        self._drawn = now
        line = f"{self._doing}: {_count(done, self._unit)} of {_count(total, self._unit)}"
        if finished:
            line += f", {now - self._started:.1f} s"
        begin, end = ("\r\x1b[K", "\n" if finished else "") if live else ("", "\n")
        print(begin + line, end=end, file=sys.stderr, flush=True)


def _count(number: int, unit: str) -> str:
    if unit != "bytes":
        return f"{number:,} {unit}"
    return f"{number / 1e9:.2f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"
