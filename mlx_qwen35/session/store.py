"""What was computed, for all requests: a prefix tree whose paths are timelines and whose inner points are their marks.

Knows tokens, pictures, and which path was used when. Knows nothing of messages, and not when things are computed: its
user calls it between steps, from the thread that computes.

    system, tools ─┬─ user: what is ... ── answer                        a path that goes on from there
                   └─ user: how many ─┬─ answer                          has the first 8,192 positions as a copy,
                                      └─ answer, user: and ...           and from then on shares them

A prompt begins where it parts from what was computed, or at the last mark before. Where a row is on its way to a place
that more of the prompt has in common, the prompt waits for it, and the row takes a snapshot there.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Sequence
from itertools import count
from pathlib import Path as FilePath
from typing import TYPE_CHECKING

from mlx_qwen35 import checks
from mlx_qwen35.session.asked import Asked, Prompts
from mlx_qwen35.session.beginnings import WORTH, best, coming, known, may_be_taken, partings
from mlx_qwen35.session.held import Held, Total, union
from mlx_qwen35.session.paths import Path
from mlx_qwen35.session.reading import Reading
from mlx_qwen35.session.shelf import Filed, Shelf
from mlx_qwen35.session.timeline import Timeline
from mlx_qwen35.session.tree import Tree, common, key_of

if TYPE_CHECKING:
    import numpy as np

    from mlx_qwen35.model import Model
    from mlx_qwen35.processor import Processor, Prompt
    from mlx_qwen35.session.behind import Job

_READ = 16  # tokens, fewer of which are sooner computed than written and read
AT_ONCE = 8 << 20  # bytes of a file, fewer of which are read without a thread
_PARTING = 10.0  # seconds that `close` waits for a thread that reads for nobody: a disk may have failed
DISK_BYTES = 32 << 30


class Store:
    """Sessions that are this store's, and give each other what they have computed. One thread calls it.

    Between `begin` and `settled` or `drop` a session is in use: it is computed on, and never taken away. Afterwards it
    is a path of the tree. Above `most_bytes` paths give up what was used longest ago, from their ends.
    """

    def __init__(
        self,
        model: Model,
        processor: Processor | None = None,
        *,
        most_bytes: int,
        directory: str | FilePath | None = None,
        most_disk_bytes: int = DISK_BYTES,
    ) -> None:
        """most_bytes: 0 or more; what is in use is kept however large it is. processor: as in Session.

        directory: where paths are kept too, for later processes and others, in at most `most_disk_bytes`. Whatever is
        wrong with it is said in one Qwen35Warning, and the store goes on without.
        """
        checks.model_and_processor("Store", model, processor, optional=True)
        if directory is not None:
            checks.path("directory", directory)
        checks.whole("most_bytes", most_bytes, 0)
        checks.path("directory", directory, optional=True)
        checks.whole("most_disk_bytes", most_disk_bytes, 0)
        self.most_bytes = most_bytes
        self.model, self._processor = model, processor
        self._tree: Tree[Path] = Tree()
        self._lent: dict[int, Path] = {}  # by id of the session
        self._total = Total()
        self._clock = count(1)
        self._prompts = Prompts(model)
        self._awaited: weakref.ref[Timeline] | weakref.ref[Reading] | None = None
        self._readings: dict[tuple[FilePath, int], Reading] = {}  # files, and up to where
        self._dropped: list[Reading] = []  # that end soon
        self._shelf = None if directory is None else Shelf(directory, model, processor, most_disk_bytes)

    def __len__(self) -> int:
        """How many paths there are."""
        return len(self._tree)

    def begin(self, prompt: Prompt, *, wait: bool = True, behind: bool = False) -> Timeline | None:
        """A session of the store whose past begins as `prompt`, as far as there is such a past. `answering` and
        `go_on(prompt)` are called on it as on any, and `settled` or `drop` at the end.

        None: a row that is computing its prompt will soon have more of this one's beginning, and takes a snapshot there
        (`session.meetings` has the place; `awaited` is the session). Go on computing, and ask again. wait=False: it is
        not waited for, which is right where nobody is going to compute it. behind: None, too, while a large file is
        read on another thread (`awaited` is the Reading); with wait=False it is then computed again.
        """
        self._catch_up()
        asked = self._prompts.of(prompt)
        path, point = best(self._tree, asked)
        filed, further = self._on_disk(asked, point)
        if wait and self._is_coming(asked, max(point, further)):
            return None
        if filed is not None and behind and not self._is_read(filed, further, wait):
            if wait:
                return None
            filed = None
        if filed is not None:
            session = self._read(filed, further)
            if session is None:
                return self.begin(prompt, wait=wait, behind=behind)
            path = Path(session)
            path.filed = filed
        elif path is not None and may_be_taken(path, point):
            session = path.session
            if path.job is not None and self._shelf.cancel(path.job):  # a longer one will be written
                path.job, path.filed = None, path.filed_before
        else:
            session = Timeline(self.model, self._processor, snapshot_bytes=self._snapshot_bytes)
            if path is not None:
                self._give(path, point, session, asked)
            path = Path(session)
        self._lend(path, session, asked)
        if filed is not None:
            path.shrink(loosely=True)
        self._make_room()
        return session

    def seed(self, session: Timeline, prompt: Prompt, *, wait: bool = True, behind: bool = False) -> bool:
        """Give a caller's own session the store's beginning of `prompt`, if it has less of it. It is in use from then
        on, as one that `begin` gave, and goes its own way after `settled` or `drop`. Nobody else may be answering with
        it. False: as None of `begin`."""
        self._catch_up()
        asked = self._prompts.of(prompt)
        guest = Path(session, guest=True)
        own = 0
        if session.tokens:
            own = guest.point(min(common(key_of(session.tokens, session.shown), asked.key), len(asked.key) - 1))
        path, point = best(self._tree, asked)
        filed, further = self._on_disk(asked, max(own, point))
        if wait and self._is_coming(asked, max(own, point, further)):
            return False
        if filed is not None and behind and not self._is_read(filed, further, wait):
            if wait:
                return False
            filed = None
        if filed is not None:
            read = self._read(filed, further)
            if read is None:
                return self.seed(session, prompt, wait=wait, behind=behind)
            session.begin_with(read.tokens, read.shown, read.cache, read.marks)
        elif path is not None and path.session is not session and point - own >= WORTH:
            self._give(path, point, session, asked)
        self._lend(guest, session, asked)
        return True

    @property
    def awaited(self) -> Timeline | Reading | None:
        """For whose prompt, or for which file, `begin` or `seed` said last to wait."""
        return None if self._awaited is None else self._awaited()

    def keep_readings(self, wanted: Collection[Reading]) -> None:
        """Files that are read for others than these are read no further."""
        if not self._readings:
            return
        for key, reading in list(self._readings.items()):
            if reading not in wanted:
                reading.drop()
                del self._readings[key]
                self._dropped = [*(other for other in self._dropped if not other.done), reading]

    def settled(self, session: Timeline) -> None:
        """The answer of a session has ended: it is a path of the tree from now on, and others make room for it."""
        path = self._lent_to(session)
        if path is None:
            return
        if path.guest:
            self._remove(path)
            self._learn_from(session)
        elif path.settle(next(self._clock)) and not self._is_known(path, key_of(session.tokens, session.shown)):
            self._tree.put(path, key_of(session.tokens, session.shown))
            self._lent.pop(id(session), None)
            self._put_down(path)
        else:
            self._remove(path)
        self._make_room()

    def drop(self, session: Timeline) -> None:
        """What was computed on a session has failed: forget it. A caller's own keeps what it has."""
        path = self._lent_to(session)
        if path is not None:
            self._remove(path)
            if not path.guest:
                session.forget()

    def give_up(self, amount: int) -> int:
        """Frees `amount` bytes if that many are not in use; -> how many it were."""
        checks.whole("amount", amount, 0)
        self._catch_up()
        before = self.nbytes
        while (missing := amount - (before - self.nbytes)) > 0:
            freed = self._free(missing)
            for job in self._waiting_for_disk():  # nobody has room for what is to be written
                if before - self.nbytes < amount:
                    self._shelf.cancel(job)
            if not freed:
                break
        return before - self.nbytes

    def clear(self) -> None:
        """Forgets all that is not in use."""
        for path in self._idle():
            self._remove(path)
            path.end()

    @property
    def nbytes(self) -> int:
        """Bytes held by all paths, those in use included: what several share once, snapshots, free room and the pixels
        of what was shown; and by what is being written. What callers' own sessions hold is theirs."""
        written = sum(job.nbytes for job in self._waiting_for_disk())
        return self._held() + written + self._being_read

    @property
    def pinned_bytes(self) -> int:
        """Those of paths in use."""
        return self.in_use()[0]

    def in_use(self) -> tuple[int, dict[int, int]]:
        """Bytes of paths in use, what several share once, and of what is being read; and those of each path, by the id
        of its session."""
        used = [path for path in self._lent.values() if path.asked is not None and not path.guest]
        buffers = {id(path.session): path.buffers() for path in used}
        each = {key: sum(held.values()) for key, held in buffers.items()}
        return sum(union(buffers.values()).values()) + self._being_read, each

    @property
    def _being_read(self) -> int:
        return sum(reading.nbytes for reading in self._readings.values())

    def close(self) -> None:
        """Waits for what is being written; what is being read nobody waits for any more."""
        self.keep_readings(())
        for reading in self._dropped:
            reading.wait(_PARTING)
        if self._shelf is not None:
            self._shelf.close()
            self._catch_up()

    @property
    def _snapshot_bytes(self) -> int:
        return min(self.model.snapshot_bytes, self.most_bytes // 8)

    def _is_coming(self, asked: Asked, held: int) -> bool:
        """Whether more than what is held of this beginning is worth waiting for, and for whom."""
        session = coming(self._tree, asked, held)
        if session is not None:
            self._awaited = weakref.ref(session)
        return session is not None

    def _on_disk(self, asked: Asked, held: int) -> tuple[Filed | None, int]:
        """The file that has enough more of a beginning than what is held, and how much; (None, 0): there is none."""
        if self._shelf is None:
            return None, 0
        self._shelf.look()
        filed, point = self._shelf.best(asked.key, len(asked.key) - 1)
        return (filed, point) if filed is not None and point - held >= _READ else (None, 0)

    def _is_read(self, filed: Filed, point: int, wait: bool) -> bool:
        """Whether a file can be had without waiting for the disk; if not, it is being read from now on. wait: whether
        it will be waited for."""
        nbytes = filed.nbytes * point // len(filed.key)
        if nbytes < AT_ONCE:
            return True
        reading = self._readings.get((filed.path, point))
        if reading is None and not wait:
            return False
        if reading is None:
            self._make_room(nbytes)
            reading = self._readings[filed.path, point] = Reading(filed.path, point, nbytes)
        self._awaited = weakref.ref(reading)
        return reading.done

    def _read(self, filed: Filed, point: int) -> Timeline | None:
        """A session with the past of a file, no shorter than up to a point; None: it cannot be had."""
        ahead = self._readings.pop((filed.path, point), None)
        if ahead is None:
            self._make_room(filed.nbytes * point // len(filed.key))
        session = Timeline(self.model, self._processor, snapshot_bytes=self._snapshot_bytes)
        return session if self._shelf.read(filed, point, session, ahead) else None

    def _put_down(self, path: Path) -> None:
        """Have a path written that has just been settled, if the disk has less of it."""
        session, key = path.session, self._tree.key(path)
        if self._shelf is None or len(key) < WORTH:
            return
        filed, point = self._shelf.best(key, len(key))
        if len(key) - point < _READ:
            self._shelf.used(filed)
            return
        waiting = self._waiting_for_disk()
        while len(waiting) > 1 and sum(job.nbytes for job in waiting) > self.most_bytes:
            self._shelf.cancel(waiting.pop(0))
        shorter = path.filed if path.filed is not None and common(path.filed.key, key) == len(path.filed.key) else None
        put = self._shelf.put(session, path.worth_writing(), key, shorter)
        if put is not None:
            path.filed_before = shorter
            path.job, path.filed = put

    def _waiting_for_disk(self) -> list[Job]:
        """What is to be written of paths that hold it no more."""
        if self._shelf is None:
            return []
        held = {id(path.job) for path in self._tree if path.asked is None}
        return [job for job in self._shelf.jobs if id(job) not in held]

    def _give(self, path: Path, point: int, session: Timeline, asked: Asked) -> None:
        path.gone_on_from(point, next(self._clock))
        if path.filed is not None:
            self._shelf.used(path.filed)
        path.give(session, point, asked.prompt.tokens, asked.shown, len(asked.key))

    def _lend(self, path: Path, session: Timeline, asked: Asked) -> None:
        before = self._lent_to(session)
        if before is not None:  # nobody said that its answer had ended
            self._remove(before)
        path.lend(asked)
        session.go_on(asked.prompt)  # so that it has no marks of another past, and says where it will stop
        for place in partings(self._tree, asked):
            if place - len(session.tokens) >= WORTH:
                session.meet(place)
        self._lent[id(session)] = path
        self._tree.put(path, asked.key)
        self._prompts.begun(asked.prompt)

    def _lent_to(self, session: Timeline) -> Path | None:
        path = self._lent.get(id(session))
        return path if path is not None and path.session is session else None

    def _is_known(self, path: Path, key: np.ndarray) -> bool:
        """Whether other paths have every point that this one has."""
        return {*path.points()} <= known(self._tree, path, key)

    def _learn_from(self, session: Timeline) -> None:
        """Keep the first place where prompts meet of a caller's own session: system message and tools."""
        mark = next((mark for mark in session.marks if mark.met and mark.offset >= WORTH), None)
        if mark is None or not self.most_bytes:
            return
        key = key_of(session.tokens[: mark.offset], session.shown)
        if any(path.point(shared) == mark.offset for path, shared in self._tree.meeting(key)):
            return
        shown = tuple((start, medium) for start, medium in session.shown if start < mark.offset)
        own = Timeline(self.model, self._processor, snapshot_bytes=self._snapshot_bytes)
        Path(session, guest=True).give(own, mark.offset, session.tokens, shown)
        path = Path(own)
        path.settle(next(self._clock))
        self._tree.put(path, key)

    def _remove(self, path: Path) -> None:
        self._tree.remove(path)  # first: while it is in both, it can be removed again
        self._lent = {key: other for key, other in self._lent.items() if other is not path}

    def _catch_up(self) -> None:
        """Forget paths in use that nobody can settle any more, and learn what was written."""
        ended = [] if self._shelf is None else self._shelf.collect()
        for path in self._tree if ended else ():
            if path.job in ended:
                path.job = None
        for path in self._tree:
            if path.session is None:
                self._remove(path)

    def _held(self) -> int:
        return self._total.of(path for path in self._tree if not path.guest)

    def _idle(self) -> list[Path]:
        return [path for path in self._tree if path.asked is None]

    def _make_room(self, more: int = 0) -> None:
        over = self._held() + more - self.most_bytes
        if over > 0:
            self._free(over)

    def _free(self, amount: int) -> int:
        """Gives up marks on the way first, then ends of paths, those used longest ago first."""
        held = Held(path for path in self._tree if not path.guest)
        idle = sorted(self._idle(), key=lambda path: path.since)
        for path in idle:
            if held.freed >= amount:
                return held.freed
            with held.changing(path):
                path.thin()
        while idle and held.freed < amount:
            path = min(idle, key=lambda path: path.last_used(len(path.session.tokens)))
            key = self._tree.key(path)
            with held.changing(path):
                left = path.cut(known(self._tree, path, key), held.shared(path))
                path.job = None
                if left:
                    self._tree.put(path, key[:left])
                else:
                    self._remove(path)
                    idle.remove(path)
                    path.end()
        return held.freed


def worth_sharing(prompts: Sequence[Prompt]) -> bool:
    """Whether two of them begin alike for long enough."""
    tokens = sorted(list(prompt.tokens) for prompt in prompts)
    return any(a[:WORTH] == b[:WORTH] and len(a) > WORTH for a, b in zip(tokens, tokens[1:], strict=False))
