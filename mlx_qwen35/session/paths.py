"""One path of the store: a timeline, the places where others can go on from it, and how it becomes smaller.

Knows a session's tokens, marks and arrays. Knows nothing of the other paths but which arrays they hold.

    system, tools | user ........ | answer              points: both marks, and the end of what is settled
                 mark            mark     end
"""

from __future__ import annotations

import weakref
from collections.abc import Container, Iterable, Sequence
from typing import TYPE_CHECKING

import mlx.core as mx

from mlx_qwen35.cache import StretchedKVCache
from mlx_qwen35.cache.copies import cache_at, freeze, shrink, slack
from mlx_qwen35.session.file import media_bytes
from mlx_qwen35.session.marks import Mark
from mlx_qwen35.session.timeline import Shown, Timeline

if TYPE_CHECKING:
    from mlx_qwen35.session.asked import Asked
    from mlx_qwen35.session.behind import Job
    from mlx_qwen35.session.shelf import Filed

SHARE_FROM = 8192  # positions from which on keys and values are shared and not copied (docs/SESSIONS.md)
_SLACK = 8  # one part in so many may be room that nothing is in


class Path:
    """A timeline in the store. asked: what is being computed on it; None: it is settled, and nobody uses it.

    guest: the session is a caller's own. While it is in use the path holds no session alive: when a caller loses it,
    that is gone.
    """

    def __init__(self, session: Timeline, *, guest: bool = False) -> None:
        self._session = weakref.ref(session)
        self._kept: Timeline | None = session
        self.asked: Asked | None = None
        self.guest = guest
        self.used: dict[int, int] = {}  # point: when it was gone on from
        self.since = 0  # when it was settled
        self.filed: Filed | None = None  # a file of it or of a shorter self, which may be still to be written
        self.filed_before: Filed | None = None  # that `job` is to take the place of
        self.job: Job | None = None  # that writes it as it is
        self._buffers: dict[int, int] | None = None
        self._of_marks: tuple[list[Mark], dict[int, int]] | None = None

    @property
    def session(self) -> Timeline | None:
        """None: it was in use, and its user has lost it."""
        return self._session()

    def lend(self, asked: Asked) -> None:
        """It is in use from now on, for what was asked."""
        self._buffers = None
        self.asked, self._kept = asked, None

    def settle(self, now: int) -> bool:
        """Nobody uses it any more; whether there is anything in it."""
        session = self.session
        self._buffers = None
        session.settle(session.tokens)
        if session.cache.offset != len(session.tokens):  # an interrupt left them apart
            session._go_back(len(session.tokens))
        if session.tokens:
            session.cache.detach()
            self.shrink(loosely=True)
        self.since, self._kept, self.asked = now, session, None
        return bool(session.tokens)

    def end(self) -> None:
        """It holds nothing any more."""
        self._buffers, self._of_marks, self._kept = {}, None, None

    def buffers(self) -> dict[int, int]:
        """Bytes of every array held, pixels too, by identity; the same dictionary as long as nobody uses it."""
        if self._buffers is not None:
            return self._buffers
        session = self.session
        held = {} if session is None else self._counted(session)
        if self.asked is None:
            self._buffers = held
        return held

    def _counted(self, session: Timeline) -> dict[int, int]:
        """As `Timeline.buffers`, and pixels; between two marks only what grows is looked at."""
        marks, cache = session.marks.kept, session.cache
        if self._of_marks is None or self._of_marks[0] is not marks:
            snapshots = {id(array): array.nbytes for mark in marks for array in mark.snapshot.arrays()}
            self._of_marks = marks, snapshots
        held = {**self._of_marks[1], **{id(array): array.nbytes for array in cache.arrays()}}
        for drafter in {mark.snapshot.draft[0] for mark in marks if mark.snapshot.draft} - {cache.draft}:
            held |= {id(array): array.nbytes for array in drafter.arrays()}
        return held | {id(medium): media_bytes([medium]) for _, medium in session.shown}

    @property
    def is_sound(self) -> bool:
        """Whether others can go on from it: an interrupt may have left it halfway back, or a caller's own session, the
        end of whose answer was never told, may go other ways."""
        session = self.session
        if session is None:
            return False
        if self.asked is None:
            return len(session.tokens) == session.cache.offset
        return session.course is self.asked.prompt

    def point(self, most: int) -> int:
        """The furthest place to go on from that is not beyond `most`; 0: only the beginning."""
        return next((point for point in reversed(self.points()) if point <= most), 0)

    def points(self) -> list[int]:
        if not self.is_sound:
            return []
        session = self.session
        marks = [mark.offset for mark in session.marks]
        if self.asked is None and len(session.tokens) > (marks[-1] if marks else 0):
            marks.append(len(session.tokens))
        return marks

    def gone_on_from(self, point: int, now: int) -> None:
        self.used[point] = now

    def last_used(self, point: int) -> int:
        """When a point, or one behind it, was used."""
        return max([self.since, *(when for place, when in self.used.items() if place >= point)])

    def can_share(self, point: int) -> bool:
        """Whether keys and values up to a point lie where others can have them without a copy."""
        return point > SHARE_FROM and any(
            isinstance(layer, StretchedKVCache) and layer.stretches and layer.stretches[0].frozen
            for layer in self.session.cache.layers
        )

    def give(self, other: Timeline, point: int, tokens: Sequence[int], shown: Iterable[Shown], room: int = 0) -> None:
        """Give another session this one's past up to a point, which `tokens` and `shown` are of or go beyond.

        One that is in use is not touched: its keys and values are copied, or shared where they are others' already. If
        it is not, it shares from `SHARE_FROM` on what it has.
        """
        session = self.session
        share = point > SHARE_FROM
        if share and self.asked is None and not self.guest:
            self._buffers = None
            freeze(session.cache)
        marks = [mark for mark in session.marks if mark.offset <= point]
        at = next((mark.snapshot for mark in marks if mark.offset == point), None) or session.cache.snapshot()
        cache, snapshots = cache_at(session.cache, at, [mark.snapshot for mark in marks], room=room, share=share)
        marks = [Mark(mark.offset, taken, mark.met) for mark, taken in zip(marks, snapshots, strict=True)]
        shown = [(start, medium) for start, medium in shown if start < point]
        other.begin_with(tokens[:point], shown, cache, marks)

    def thin(self) -> bool:
        """Drop the marks on the way that nobody went on from; whether there were any. What stays is where prompts met,
        and where they are most likely to meet again: the first such place, the last, and those that were used."""
        session = self.session
        met = [mark.offset for mark in session.marks if mark.met]
        keep = {*met[:1], *met[-1:], *self.used}
        return self._keep([mark for mark in session.marks if mark.offset in keep])

    def worth_writing(self) -> list[Mark]:
        """The marks that a file is to have: the first, the last two where prompts meet, and those that were used."""
        met = [mark.offset for mark in self.session.marks if mark.met]
        keep = {*met[:1], *met[-2:], *self.used}
        return [mark for mark in self.session.marks if mark.offset in keep]

    def _keep(self, marks: list[Mark]) -> bool:
        session = self.session
        if len(marks) == len(session.marks):
            return False
        self._buffers = None
        session.marks.keep(marks)
        return True

    def cut(self, known: Container[int], shared: Container[int]) -> int:
        """Give up what lies beyond the last mark that is worth it; -> how many tokens are left, 0: none is.

        known: points that other paths have too. shared: ids of arrays that others hold.
        """
        session = self.session
        worth = [
            mark.offset
            for mark in session.marks
            if mark.offset < len(session.tokens) and mark.offset not in known and (mark.met or mark.offset in self.used)
        ]
        if not worth:
            return 0
        self._buffers = None
        session._go_back(worth[-1])
        session.shown = [(start, medium) for start, medium in session.shown if start < worth[-1]]
        self.shrink(shared)
        return worth[-1]

    def shrink(self, shared: Container[int] = (), *, loosely: bool = False) -> None:
        """Leave no room behind what is held. loosely: only where that is more than an eighth."""
        cache = self.session.cache
        if not loosely or slack(cache) * _SLACK > sum(array.nbytes for array in cache.arrays()):
            self._buffers = None
            shrink(cache, shared)
            mx.eval(cache.arrays())
