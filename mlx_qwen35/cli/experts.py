"""What streaming experts from the disk did: as a line that lives below an answer, and as a table under it.

Knows parts, their statistics and terminals. Knows nothing of how experts are read.
"""

from __future__ import annotations

import shutil
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlx_qwen35.experts.pool import ExpertStats
    from mlx_qwen35.text.parts import Part

REDRAW_SECONDS = 0.1
# Move down, which scrolls at the bottom of the screen, and up again: there is a line below now. Remember the place, go
# there, and come back when it is written.
_TO_LINE_BELOW, _BACK = "\x1bD\x1b[A\x1b7\x1b[B\r\x1b[K", "\x1b8"
_CLEAR_BELOW = "\x1b[J"


class ExpertLine:
    """One line on standard error below what is being written; a file gets it once, at the end.

    Does nothing for parts without expert statistics, or where it is not asked for.
    """

    def __init__(self, asked: bool) -> None:
        self._asked = asked
        self._live = asked and sys.stderr.isatty()
        self._drawn = False
        self._when, self._text = 0.0, ""

    def before(self) -> None:
        """The answer goes on: take the line away, which is where its text may come."""
        if self._drawn:
            sys.stderr.write(_CLEAR_BELOW)
            sys.stderr.flush()
            self._drawn = False

    def after(self, part: Part) -> None:
        """A part was written. Its figures change ten times a second at most, to be read."""
        if not self._live or part.experts is None:
            return
        now = time.perf_counter()
        if now - self._when >= REDRAW_SECONDS:
            self._when, self._text = now, f"Experts: {part.experts}"
        line = self._text[: shutil.get_terminal_size().columns - 1]
        sys.stderr.write(f"{_TO_LINE_BELOW}{line}{_BACK}")
        sys.stderr.flush()
        self._drawn = True

    def end(self, part: Part | None) -> None:
        """The answer has ended, and the screen is at the start of a line. part: its last."""
        self.before()
        if self._asked and part is not None and part.experts is not None:
            print(f"Experts: {part.experts}", file=sys.stderr)


def table(part: Part) -> str:
    """What streaming did for the prompt and for the answer of which `part` is the last."""
    if part.prompt_experts is None or part.experts is None:
        return "Experts: all are in memory"
    rows = [("experts", "prompt", "answer"), ("tokens", f"{part.prompt_tokens:,}", f"{part.generation_tokens:,}")]
    rows += [(name, told(part.prompt_experts), told(part.experts)) for name, told in _ROWS.items()]
    if part.generation_tokens:
        rows.append(("read a token", "", f"{part.experts.bytes_read / part.generation_tokens / 1e6:.1f} MB"))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(f"  {a:{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}" for a, b, c in rows)


def _asked(stats: ExpertStats) -> str:
    return f"{stats.hits + stats.misses:,}"


def _in_memory(stats: ExpertStats) -> str:
    return f"{stats.hits:,} ({stats.hit_rate:.1%})" if stats.hits + stats.misses else "-"


_ROWS = {
    "asked for one token at a time": _asked,
    "  of them in memory": _in_memory,
    "read ahead, and then asked for": lambda stats: f"{stats.prefetch_hits:,} of {stats.prefetched:,}",
    "read for many tokens at once": lambda stats: f"{stats.swept:,}",
    "read in all": lambda stats: f"{stats.records:,}",
    "bytes read": lambda stats: f"{stats.bytes_read / 1e9:.2f} GB",
    "while reading": lambda stats: f"{stats.read_speed / 1e9:.2f} GB/s",
    "reads at once": lambda stats: f"{stats.depth:.1f}",
    "waited for the disk": lambda stats: f"{stats.wait_seconds:.2f} s ({stats.wait_share:.1%})",
}
