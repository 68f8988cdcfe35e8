"""Reads experts into memory: what of which file goes where, and what is under way.

Knows layouts and memory to be filled. Knows neither who is in memory nor why an expert is wanted. With crew.py, whose
threads do the reading, and handles.py, whose files they read, this is the only code that reads experts' bytes.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ..machine.system import is_mac
from .crew import Crew, Read, ReadStats, Target
from .handles import open_all
from .layout import LayerLayout

__all__ = ["Read", "ReadStats", "Reader", "Target"]

JOB_BYTES = 2 << 20


class Reader:
    """Reads experts into memory, several at a time; to be closed, though what is forgotten closes itself."""

    def __init__(
        self,
        layouts: Mapping[int, LayerLayout],
        *,
        threads: int = 8,
        bounce: bool | None = None,
        job_bytes: int = JOB_BYTES,
    ):
        """Open the files of all layers; raises ExpertReadError if one cannot be opened or is too short.

        bounce: read into aligned memory of the thread's own and copy from there; None: on macOS. job_bytes: what one
        thread reads at a time, give or take: an expert of twice as many is shared by two threads.
        """
        if threads < 1:
            raise ValueError(f"threads is {threads}: at least one has to read")
        self._layouts = dict(layouts)
        self._job_bytes = job_bytes
        ends: dict[Path, int] = {}
        for layout in self._layouts.values():
            for file in layout.files:
                ends[file] = max(ends.get(file, 0), layout.end(file))
        self._crew = Crew(open_all(ends.items()), threads, is_mac() if bounce is None else bounce)
        self._finalizer = weakref.finalize(self, self._crew.end)

    def submit(
        self, layer: int, expert: int, targets: Sequence[Target], *, urgent: bool = True, helped: bool = False
    ) -> Read:
        """Begin to read an expert; targets: one for each tensor of the layer's layout.

        The memory must not be read or written by others until the Read is done. Raises ExpertReadError if the reader
        is closed, ValueError if targets do not fit. helped: the caller calls `help` before it waits.
        """
        layout = self._layouts[layer]
        if len(targets) != len(layout.tensors):
            raise ValueError(f"{len(targets)} targets for {len(layout.tensors)} tensors")
        for target, size, tensor in zip(targets, layout.sizes, layout.tensors, strict=True):
            if target.convert is None and target.view.nbytes != size:
                raise ValueError(f"{tensor.name} has {size} bytes, its target {target.view.nbytes}")
        jobs = layout.jobs(expert, self._job_bytes)
        read = Read(self._crew, layer, expert, targets, layout.sizes, jobs)
        self._crew.queue(read, urgent=urgent, helped=helped)
        return read

    def help(self) -> None:
        """Read what is urgent on this thread, as long as there is any that nobody has begun."""
        self._crew.help()

    def wait(self, reads: Sequence[Read]) -> None:
        """Return when all these experts are there; raises what the first that is not there would raise.

        The last is waited for first: by then the others have ended, mostly, and who waits was woken once.
        """
        for read in reversed(reads):
            read.settle()
        for read in reads:
            read.wait()

    def settle(self, reads: Iterable[Read] | None = None) -> None:
        """Wait until none of the reads touches memory any more, whatever becomes of them; None: of all there are.

        Raises nothing but KeyboardInterrupt: a first one when all have ended, a second one at once. After that second
        one settle() is to be called again before the memory is used.
        """
        waiting = self._crew.alive() if reads is None else list(reads)
        interrupt: KeyboardInterrupt | None = None
        for read in waiting:
            while not read.done:
                try:
                    read.settle()
                except KeyboardInterrupt as error:
                    if interrupt is not None:
                        raise
                    interrupt = error
        if interrupt is not None:
            raise interrupt

    def abandon(self) -> None:
        """After an error or interrupt: cancel what has not begun, and settle the rest; also reads nobody knows of,
        because submit() was interrupted."""
        for read in self._crew.alive():
            read.cancel()
        self.settle()

    @property
    def stats(self) -> ReadStats:
        """Counts up to now."""
        return self._crew.stats()

    def close(self) -> None:
        """End the threads, and close the files; reads that have not begun fail. A second call does nothing."""
        self._finalizer()
        self._crew.join()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
