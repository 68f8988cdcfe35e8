"""Points of a timeline to go back to: which snapshots are kept, and which go when there are too many.

Knows offsets and snapshots. Knows no tokens and no arrays.

A snapshot holds the states of the delta layers at one point, 20 to 190 MB for the published models, so there may be
only so many. Some are taken where prompts are known to meet again (`met`), and others on the way, so that what lies
between two is never longer than the spacing, which grows with the timeline:

    system, tools | user ........ | answer | user | image | user | answer |
                  met      way    met             met            met
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlx_qwen35.cache import Snapshot

FEWEST, MOST = 4, 64


@dataclass(frozen=True)
class Mark:
    """met: taken where prompts meet; else on the way."""

    offset: int
    snapshot: Snapshot
    met: bool


class Marks:
    """The marks of one timeline, in the order of their offsets.

    most_bytes: of all snapshots, though never fewer than 4 are kept, nor more than 64. step: the smallest spacing.
    """

    def __init__(self, most_bytes: int, step: int) -> None:
        self._most_bytes, self._step = most_bytes, step
        self._marks: list[Mark] = []
        self._largest = 0  # snapshot seen, in bytes

    def __iter__(self) -> Iterator[Mark]:
        return iter(self._marks)

    def __len__(self) -> int:
        return len(self._marks)

    @property
    def kept(self) -> list[Mark]:
        """All of them: another list whenever they change."""
        return self._marks

    @property
    def nbytes(self) -> int:
        return sum(mark.snapshot.nbytes for mark in self._marks)

    @property
    def most(self) -> int:
        """How many are kept."""
        return min(max(self._most_bytes // self._largest, FEWEST), MOST) if self._largest else MOST

    def spacing(self, length: int) -> int:
        """The most tokens between two marks, or before the first, of a timeline of `length` tokens.

        A power of two times the step, so that half of the marks would do for all of the way.
        """
        spacing = self._step
        while length > spacing * (self.most // 2):
            spacing *= 2
        return spacing

    def due(self, offset: int, ahead: int) -> bool:
        """Whether one has to be taken on the way, at `offset`, if the next chance comes `ahead` tokens later."""
        last = self._marks[-1].offset if self._marks else 0
        return offset > last and offset + ahead - last > self.spacing(offset)

    def add(self, offset: int, snapshot: Snapshot, *, met: bool) -> None:
        """The mark at the end of the timeline."""
        marks = [*(mark for mark in self._marks if mark.offset < offset), Mark(offset, snapshot, met)]
        self._largest = max(self._largest, snapshot.nbytes)
        self._marks = marks
        while len(self._marks) > self.most:
            out = self._least_useful()
            self._marks = [mark for at, mark in enumerate(self._marks) if at != out]

    def cut(self, offset: int) -> None:
        """Forget all beyond `offset`."""
        self._marks = [mark for mark in self._marks if mark.offset <= offset]

    def keep(self, marks: Sequence[Mark]) -> None:
        """Forget all but these."""
        self._marks = list(marks)

    def last(self, offset: int) -> Mark | None:
        """The furthest mark that is not beyond `offset`."""
        return next((mark for mark in reversed(self._marks) if mark.offset <= offset), None)

    def _least_useful(self) -> int:
        """Which to drop: the oldest on the way, then the oldest where prompts meet, if what it leaves is no longer than
        the spacing; else the one that leaves least. Never the first, where all prompts meet, nor the last two."""
        spacing, offsets = self.spacing(self._marks[-1].offset), [0, *(mark.offset for mark in self._marks)]
        gaps = {at: offsets[at + 2] - offsets[at] for at in range(1, len(self._marks) - 2)}
        narrow = [at for at, gap in gaps.items() if gap <= spacing]
        if narrow:
            return min(narrow, key=lambda at: (self._marks[at].met, at))
        return min(gaps, key=lambda at: (gaps[at], at))
