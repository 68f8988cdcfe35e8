"""A progress bar for `on_progress`, in a notebook or a terminal. Knows counts, not what is counted."""

from __future__ import annotations

import time
from html import escape
from typing import Any

from mlx_qwen35.notebook import shell

REDRAW_SECONDS = 0.1


class ProgressBar:
    """`load(ref, on_progress=ProgressBar("Loading"))`: called with (done, total), it draws itself.

    A notebook gets a bar of its own, without widgets; anything else gets tqdm's on standard error. One that is called
    with 0 begins anew. unit: "bytes" are counted in MB and GB, anything else as it is.
    """

    def __init__(self, doing: str = "Working", unit: str = "bytes") -> None:
        self._doing, self._unit = doing, unit
        self._bar: Any = None
        self._handle: Any = None
        self._started = self._drawn = 0.0
        self._total = 0

    def __call__(self, done: int, total: int) -> None:
        now = time.perf_counter()
        begins = done == 0 or total != self._total
        if begins:
            self._started, self._total = now, total
        if shell.is_rich():
            if begins or done >= total or now - self._drawn >= REDRAW_SECONDS:
                self._draw(done, total, now, anew=begins)
        else:
            self._advance(done, total, anew=begins)

    def _draw(self, done: int, total: int, now: float, *, anew: bool) -> None:
        line = f"{self._doing}: {self._count(done)} of {self._count(total)}, {self._times(done, total, now)}"
        html = f'<progress value="{done}" max="{max(total, 1)}"></progress> {escape(line)}'
        bundle = {"text/plain": line, "text/html": html}
        if anew or self._handle is None:
            self._handle = shell.show(bundle, updatable=True)
        else:
            shell.update(self._handle, bundle)
        self._drawn = now

    def _times(self, done: int, total: int, now: float) -> str:
        gone = now - self._started
        return f"{gone:.1f} s" if done >= total or not done else f"{gone * (total - done) / done:.0f} s left"

    def _count(self, number: int) -> str:
        if self._unit != "bytes":
            return f"{number:,} {self._unit}"
        return f"{number / 1e9:.2f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"

    def _advance(self, done: int, total: int, *, anew: bool) -> None:
        from tqdm import tqdm

        if anew or self._bar is None:
            if self._bar is not None:
                self._bar.close()
            scale = {"unit": "B", "unit_scale": True} if self._unit == "bytes" else {"unit": f" {self._unit}"}
            self._bar = tqdm(total=total, desc=self._doing, **scale)
        self._bar.update(done - self._bar.n)
        if done >= total:
            self._bar.close()
            self._bar = None
            self._total = 0
