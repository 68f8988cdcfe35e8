"""One path of the store: a timeline, the places where others can go on from it, and how it becomes smaller.

Knows a session's tokens, marks and arrays. Knows nothing of the other paths but which arrays they hold.

    system, tools | user ........ | answer              points: both marks, and the end of what is settled
                 mark            mark     end
"""

from __future__ import annotations

import weakref
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from mlx_qwen35.cache import StretchedKVCache
from mlx_qwen35.cache_copy import cache_at, freeze, shrink, slack
from mlx_qwen35.session.marks import Mark
from mlx_qwen35.session.timeline import Session, Shown

if TYPE_CHECKING:
    from mlx_qwen35.processor import Prompt
    from mlx_qwen35.session.behind import Job
    from mlx_qwen35.session.shelf import Filed

SHARE_FROM = 8192  # positions from which on keys and values are shared and not copied (docs/SESSIONS.md)
_SLACK = 8  # one part in so many may be room that nothing is in


@dataclass(frozen=True)
class Asked:
    """A prompt as the store looks at it: key as tree.key_of makes it, and what it shows."""

    prompt: Prompt
    key: np.ndarray
    shown: tuple[Shown, ...]


class Path:
    """A timeline in the store. asked: what is being computed on it; None: it is settled, and nobody uses it.

    guest: the session is a caller's own. While it is in use the path holds no session alive: when a caller loses it,
    that is gone.
    """

    def __init__(self, session: Session, *, guest: bool = False) -> None:
        self._session = weakref.ref(session)
        self._kept: Session | None = session
        self.asked: Asked | None = None
        self.guest = guest
        self.used: dict[int, int] = {}  # point: when it was gone on from
        self.since = 0  # when it was settled
        self.filed: Filed | None = None  # a file of it or of a shorter self, which may be still to be written
        self.filed_before: Filed | None = None  # that `job` is to take the place of
        self.job: Job | None = None  # that writes it as it is
        self._buffers: dict[int, int] | None = None

    @property
    def session(self) -> Session | None:
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
        self._buffers, self._kept = {}, None

    def buffers(self) -> dict[int, int]:
        """Bytes of every array held, by identity."""
        if self._buffers is not None:
            return self._buffers
        session = self.session
        held = {} if session is None else {key: array.nbytes for key, array in session.buffers().items()}
        if self.asked is None:
            self._buffers = held
        return held

    def point(self, most: int) -> int:
        """The furthest place to go on from that is not beyond `most`; 0: only the beginning."""
        session = self.session
        if session is None:
            return 0
        if self.asked is None and len(session.tokens) <= most:
            return len(session.tokens)
        mark = session.marks.last(most)
        return 0 if mark is None else mark.offset

    def points(self) -> list[int]:
        session = self.session
        marks = [mark.offset for mark in session.marks]
        return sorted({*marks, len(session.tokens)} if self.asked is None else marks)

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

    def give(self, other: Session, point: int, tokens: Sequence[int], shown: Iterable[Shown], room: int = 0) -> None:
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
        self.shrink(shared)
        return worth[-1]

    def shrink(self, shared: Container[int] = (), *, loosely: bool = False) -> None:
        """Leave no room behind what is held. loosely: only where that is more than an eighth."""
        cache = self.session.cache
        if not loosely or slack(cache) * _SLACK > sum(array.nbytes for array in cache.arrays()):
            self._buffers = None
            shrink(cache, shared)
            mx.eval(cache.arrays())
