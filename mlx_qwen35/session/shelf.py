"""Paths on the disk: which there are, how far they go, and how one comes back.

Knows a folder of session files (behind.py has how they come there) and the beginnings they hold. Knows nothing of who
asks. What cannot be read, written or gone on with is said in one line, and is as if it were not there.
"""

from __future__ import annotations

import os
import secrets
import time
import warnings
from bisect import bisect_right
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mlx_qwen35.errors import Qwen35Error, Qwen35Warning
from mlx_qwen35.session import file, reading
from mlx_qwen35.session.behind import SUFFIX, Behind, Job, names_of
from mlx_qwen35.session.fingerprint import fingerprint, hash_of
from mlx_qwen35.session.reading import Reading
from mlx_qwen35.session.saving import check_fit, cut_to, form_of, packed, unpack
from mlx_qwen35.session.timeline import Timeline
from mlx_qwen35.session.tree import Tree, key_of

if TYPE_CHECKING:
    from mlx_qwen35.model import Model
    from mlx_qwen35.processor import Processor
    from mlx_qwen35.session.marks import Mark

MARGIN = 1 << 16  # bytes that a header is taken to have
_SETTLED = 10**9  # nanoseconds after which a folder that changes again has another time of its last change


@dataclass(frozen=True, eq=False)
class Filed:
    """A file that is whole. points: where its past can be gone on from, in their order."""

    path: Path
    key: np.ndarray
    points: tuple[int, ...]
    nbytes: int

    def point(self, most: int) -> int:
        """The furthest that is not beyond `most`; 0: there is none."""
        at = bisect_right(self.points, most)
        return self.points[at - 1] if at else 0


class Shelf:
    """The paths of one model in a folder, which other processes and other models may use too."""

    def __init__(self, folder: str | Path, model: Model, processor: Processor | None, most_bytes: int) -> None:
        """Reads headers and tokens of all files that are this model's."""
        self._folder, self._most_bytes = Path(folder).expanduser(), most_bytes
        self._model, self._processor = model, processor
        self._whose = fingerprint(model, processor)
        self._prefix = hash_of([self._whose, form_of(model)])[:12]
        self._tree: Tree[Filed] = Tree()
        self._names: dict[str, Filed | None] = {}  # None: of no use
        self._seen = -1  # when the folder had changed last
        self._behind: Behind | None = None
        self._jobs: list[tuple[Job, Filed]] = []
        try:
            self._folder.mkdir(0o700, parents=True, exist_ok=True)  # what was said is nobody else's business
            self._behind = Behind(self._folder.resolve(), most_bytes)
        except OSError as error:
            self._say(f"{folder} cannot be used ({error.strerror}): what is computed is kept in memory alone")
        self.look()
        self._drop_repeated()

    def look(self) -> None:
        """Finds what has come, and forgets what has gone; costs one call of the system where nothing has changed."""
        try:
            changed = os.stat(self._folder).st_mtime_ns
        except OSError:
            changed = -1
        if changed == self._seen:
            return
        names = set(names_of(self._folder, self._prefix))
        for name in self._names.keys() - names:
            self._forget(name)
        refused = []
        for name in sorted(names - self._names.keys()):
            try:
                self._add(name)
            except Qwen35Error as error:
                self._names[name] = None
                if (self._folder / name).exists():
                    refused.append(str(error))
        if refused:
            more = f" (and {len(refused) - 1} more of {self._folder})" if len(refused) > 1 else ""
            self._say(f"{refused[0]}{more}. It is ignored")
        self._seen = changed if time.time_ns() - changed > _SETTLED else -1

    def best(self, key: np.ndarray, most: int) -> tuple[Filed | None, int]:
        """The file with the furthest point of a beginning that is not beyond `most`, and the point; of several the
        smallest."""
        best, furthest = None, 0
        for filed, shared in self._tree.meeting(key):
            if min(shared, most) < max(furthest, 1):
                break
            point = filed.point(min(shared, most))
            if point > furthest or (best is not None and point == furthest and filed.nbytes < best.nbytes):
                best, furthest = filed, point
        return best, furthest

    def read(self, filed: Filed, point: int, session: Timeline, ahead: Reading | None = None) -> bool:
        """Give a new session the past of a file up to one of its points, or all of it; whether that could be done.
        ahead: where it was read before."""
        try:
            found = reading.read(filed.path, point) if ahead is None else ahead.result()
            description, arrays, part = found[0], file.as_arrays(found[1]), found[2]
            check_fit(filed.path, description, self._whose, self._model)
            count, first = len(description["marks"]) + 1, None
            if part is not None:
                cut_to(description, arrays, point)
                first = len(description["marks"])
            points = self._model.pasts.load(filed.path, description.get("share"), count, first)
            unpack(description, arrays, session, points)
        except Qwen35Error as error:
            if filed.path.exists():  # or another process has just made room
                self._say(f"{error}. It is ignored")
            self._names[filed.path.name] = None
            self._tree.remove(filed)
            session.forget()
            return False
        self.used(filed)
        return True

    def used(self, filed: Filed) -> None:
        """It is the one that was used last, for other processes and later ones too."""
        with suppress(OSError):
            os.utime(filed.path)

    def put(
        self, session: Timeline, marks: Iterable[Mark], key: np.ndarray, shorter: Filed | None
    ) -> tuple[Job, Filed] | None:
        """Have a settled session written with these marks; -> the job, and the file that there will be. None: not to
        this folder. shorter: a file, written or to be written before, that it says all of, and more."""
        if self._behind is None:
            return None
        marks = list(marks)
        description, arrays = packed(session, self._whose, marks)
        description |= {"notes": None, "shown": [pair for pair in session.shown if pair[0] < len(key)]}
        arrays = {name: file.held(array) for name, array in arrays.items()}
        path = self._folder.resolve() / f"{self._prefix}-{secrets.token_hex(8)}{SUFFIX}"
        job = Job(path, description, arrays, None if shorter is None else shorter.path)
        job.nbytes += file.media_bytes(medium for _, medium in description["shown"]) + MARGIN
        if job.nbytes > self._most_bytes:
            return None
        points = [*(mark.snapshot.point for mark in marks), session.cache.snapshot().point]
        try:
            name = self._model.pasts.put(path, points, job.replaced, self._most_bytes)
        except Qwen35Error as error:
            self._behind = None
            self._say(f"{error}. What is computed is kept in memory alone")
            return None
        description["share"] = name
        self._behind.put(job)
        points = tuple(sorted({*(mark["offset"] for mark in description["marks"]), len(key)}))
        self._jobs.append((job, Filed(path, key, points, job.nbytes)))
        return self._jobs[-1]

    @property
    def jobs(self) -> list[Job]:
        """What is not written yet, in its order."""
        return [job for job, _ in self._jobs if not job.ended]

    def cancel(self, job: Job) -> bool:
        """Whether a job had not begun, and never will."""
        cancelled = self._behind is not None and self._behind.cancel(job)
        if cancelled:
            self._jobs = [pair for pair in self._jobs if pair[0] is not job]
        return cancelled

    def collect(self) -> list[Job]:
        """What has ended since; says what could not be written, once."""
        ended, self._jobs = [p for p in self._jobs if p[0].ended], [p for p in self._jobs if not p[0].ended]
        for job, filed in ended:
            if job.done:
                self._names[filed.path.name] = filed
                self._tree.put(filed, filed.key)
                if job.replaced is not None:
                    self._forget(job.replaced.name)
            elif job.failed and self._behind is not None:
                self._behind = None
                self._say(f"{job.failed}. What is computed is kept in memory alone")
        return [job for job, _ in ended]

    def close(self) -> None:
        """Waits until all is written."""
        if self._behind is not None:
            self._behind.wait()
            with suppress(Qwen35Error):  # of ranks that are gone already
                self._model.pasts.written()

    def _add(self, name: str) -> None:
        path = self._folder / name
        found = file.read_beginning(path)
        check_fit(path, found.description, self._whose, self._model)
        key = key_of(found.tokens, found.shown)
        filed = Filed(path, key, found.points, path.stat().st_size)
        self._names[name] = filed
        self._tree.put(filed, key)

    def _drop_repeated(self) -> None:
        """Deletes files whose every point another has: a process was killed before it could."""
        for filed in self._tree:
            for other, shared in self._tree.meeting(filed.key):
                if shared < len(filed.key):
                    break
                if other is not filed and {*filed.points} <= {*other.points}:
                    self._forget(filed.path.name)
                    with suppress(OSError):
                        filed.path.unlink()
                    break

    def _forget(self, name: str) -> None:
        filed = self._names.pop(name, None)
        if filed is not None:
            self._tree.remove(filed)

    def _say(self, line: str) -> None:
        warnings.warn(line, Qwen35Warning, stacklevel=5)
