"""How far a download of several files is, and how whoever watches it can end it.

Knows the part of tqdm that huggingface_hub calls, and threads. Knows no file and no network.
"""

from __future__ import annotations

import _thread
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Progress = Callable[[int, int], None]


@contextmanager
def reporting(on_progress: Progress | None, name: str) -> Iterator[Progress]:
    """What was asked to be called, or a bar of its own."""
    if on_progress is not None:
        yield on_progress
        return
    from huggingface_hub.utils import tqdm  # which HF_HUB_DISABLE_PROGRESS_BARS keeps silent

    with tqdm(desc=name, unit="B", unit_scale=True) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show


class Watch:
    """Counts bytes for a callback, and carries what it raises to the thread that waits for the download."""

    def __init__(self, total: int, report: Progress) -> None:
        self._total, self._report = total, report
        self._done = self._here = 0  # of the files before, of this one
        self._thread = threading.current_thread()
        self._said = 0
        self.raised: BaseException | None = None
        report(0, total)

    def end(self, size: int) -> None:
        """A file of `size` bytes is here, whether it was fetched or had been here before."""
        self._done, self._here = self._done + size, 0
        self._say()

    @property
    def bar(self) -> type[Bar]:
        """What huggingface_hub takes in place of the class tqdm."""
        return type("BarOfThis", (Bar,), {"watch": self})

    def add(self, count: int) -> None:
        self._here += count
        if self.raised is None:
            self._say()

    def _say(self) -> None:
        done = min(self._done + self._here, self._total)
        if done == self._said:  # the last bytes of a file, and its end
            return
        self._said = done
        try:
            self._report(done, self._total)
        except BaseException as error:
            self.raised = error
            if threading.current_thread() is self._thread:
                raise
            # A thread of the downloader would swallow it: interrupt the one that waits, as Ctrl-C does.
            if self._thread is threading.main_thread():
                _thread.interrupt_main()


class Bar:
    """The part of tqdm that huggingface_hub calls; only `update` says something, and only to a watch."""

    watch: Watch | None = None
    total: int | None = None
    n = 0

    def __init__(self, *args: Any, **options: Any) -> None:
        pass

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *raised: object) -> None:
        pass

    def update(self, count: float | None = 1) -> None:
        if self.watch is not None:
            self.watch.add(int(count or 0))

    def _nothing(self, *args: Any, **options: Any) -> None:
        pass

    close = refresh = reset = clear = update_transfer = _nothing
    set_description = set_postfix = set_postfix_str = set_transfer_postfix_str = _nothing
