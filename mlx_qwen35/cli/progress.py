"""How far a long step is, on standard error. Knows counts, clocks and terminals, not what is counted."""

from __future__ import annotations

import sys
import time
from collections import deque

from mlx_qwen35.text.screen import columns

REDRAW_SECONDS = 0.1
LINE_SECONDS = 60.0  # between lines of a file
_LOOK_BACK = 10.0  # seconds over which a rate is taken: what was fast at first says nothing of the rest
_SOONEST = 1.0  # seconds before a rate is shown


class Progress:
    """Called with (done, total). A terminal sees one line that changes, a file a line each minute and one at the end.

    What is done at the first call was done before, and counts for no rate.
    """

    def __init__(self, doing: str, unit: str) -> None:
        self._doing, self._unit = doing, unit
        self._drawn = 0.0
        self._seen: deque[tuple[float, int]] = deque()  # (when, done) of the last seconds, the oldest a little older
        self._begin = (time.perf_counter(), 0)

    def __call__(self, done: int, total: int) -> None:
        now = time.perf_counter()
        live = sys.stderr.isatty()
        if done == 0 or not self._seen:
            self._seen.clear()
            self._begin = (now, done)
            self._drawn = 0.0 if live else now
        self._seen.append((now, done))
        while len(self._seen) > 2 and now - self._seen[1][0] > _LOOK_BACK:
            self._seen.popleft()
        finished = done >= total
        if not finished and now - self._drawn < (REDRAW_SECONDS if live else LINE_SECONDS):
            return
        self._drawn = now
        line = f"{self._doing}: {_count(done, self._unit)} of {_count(total, self._unit)}"
        line += self._spent(now, done) if finished else self._left(now, done, total)
        if live and not finished:  # a line that the terminal breaks could not be taken back
            line = line[: columns(sys.stderr) - 1]
        begin, end = ("\r\x1b[K", "\n" if finished else "") if live else ("", "\n")
        print(begin + line, end=end, file=sys.stderr, flush=True)
        if finished:
            self._seen.clear()

    def _spent(self, now: float, done: int) -> str:
        seconds, count = now - self._begin[0], done - self._begin[1]
        rate = f", {_rate(count / seconds)}" if self._unit == "bytes" and seconds > 0 and count else ""
        return f", {_time(seconds) if seconds >= 60 else f'{seconds:.1f} s'}{rate}"

    def _left(self, now: float, done: int, total: int) -> str:
        line = f", {100 * done // total} %"
        since, before = self._seen[0]
        if self._unit != "bytes" or now - self._begin[0] < _SOONEST or done <= before:
            return line
        rate = (done - before) / (now - since)
        return f"{line}, {_rate(rate)}, {_time((total - done) / rate)} left"


def _count(number: int, unit: str) -> str:
    if unit != "bytes":
        return f"{number:,} {unit}"
    return f"{number / 1e9:.2f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"


def _rate(rate: float) -> str:
    return f"{rate / 1e9:.2f} GB/s" if rate >= 1e9 else f"{rate / 1e6:.0f} MB/s"


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d} h" if hours else f"{minutes}:{rest:02d} min"
