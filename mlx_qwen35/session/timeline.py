"""A timeline: the tokens and media that were computed, their cache, and how a new prompt goes on from them.

Knows token ids, what stands behind placeholders, the cache and its snapshots. Knows nothing of messages
or text, nor of files: a Session (saving.py) is a timeline that goes into one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, TypeVar

import numpy as np

from mlx_qwen35 import checks
from mlx_qwen35.errors import SessionError
from mlx_qwen35.session.marks import Mark, Marks

if TYPE_CHECKING:
    from mlx_qwen35.cache import Cache, Snapshot
    from mlx_qwen35.model import Model
    from mlx_qwen35.processor import Processor, Prompt
    from mlx_qwen35.vision.media import Media

Shown = tuple[int, "Media"]  # where the placeholders of an image or video begin


_Self = TypeVar("_Self", bound="Timeline")


class Pool(Protocol):
    """Of several timelines: told which one was used last."""

    def used(self, session: Any) -> None: ...


class Timeline:
    """One cache and the tokens it covers, with marks to go back to. `stream_generate(..., session=)` goes on with it.

    Keys and values can be cut anywhere, the state of a delta layer cannot: it goes back to a snapshot only. A template
    writes an answer differently once it lies in the past (its reasoning is dropped), so the next prompt goes on from a
    mark before that:

        computed   system | user1 | <think> why </think> four          marks at each |
        prompt     system | user1 | four user2 | <think>               goes on from before the answer

    Two pictures of one size have the same tokens: what counts is the picture. One that the cache has the first half of
    is gone on with like anything else.
    """

    def __init__(
        self,
        model: Model,
        processor: Processor | None = None,
        *,
        snapshot_bytes: int | None = None,
        pool: Pool | None = None,
    ) -> None:
        """processor: that makes the prompts; a saved session then fits only that. snapshot_bytes: for snapshots, which
        then lie closer together or further apart (None: what the model says). pool: of which it is one.

        notes: what is saved with it: anything of JSON, with Media among it.
        """
        checks.model_and_processor("Session", model, processor, optional=True)
        checks.whole("snapshot_bytes", snapshot_bytes, 0, otherwise="for what the model says")
        self.model, self.processor = model, processor
        self._snapshot_bytes = model.snapshot_bytes if snapshot_bytes is None else snapshot_bytes
        self._pool = pool
        self._answers: dict[str, object] = {}  # the one that is being made, if any
        self.notes: Any = None
        self.forget()

    def forget(self) -> None:
        """Gives back all memory: nothing is computed. The session can be used as before."""
        self.tokens: list[int] = []  # of which the cache covers all, unless something is being computed
        self.cache: Cache = self.model.make_cache()
        self.marks = Marks(self._snapshot_bytes, self.model.prefill_chunk)
        self.shown: list[Shown] = []  # among the tokens, and perhaps beyond
        self._meetings: frozenset[int] = frozenset()
        self._asked: frozenset[int] = frozenset()
        self.course: Prompt | None = None  # that `go_on` was given last, until all is settled

    @property
    def nbytes(self) -> int:
        """Bytes held, what is shared with branches included."""
        return sum(array.nbytes for array in self.buffers().values())

    @property
    def spacing(self) -> int:
        """The most tokens that are computed again where a prompt parts from this one at a place of its own."""
        return self.marks.spacing(len(self.tokens))

    def buffers(self) -> dict[int, object]:
        """Every array held, by identity."""
        arrays = self.cache.arrays()
        for mark in self.marks:
            arrays += mark.snapshot.arrays()
        for drafter in {mark.snapshot.draft[0] for mark in self.marks if mark.snapshot.draft}:
            arrays += drafter.arrays()  # also of one that does not follow the cache now
        return {id(array): array for array in arrays}

    @property
    def in_use(self) -> bool:
        """Whether an answer is being made."""
        return bool(self._answers)

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Inside, an answer is made, by one at a time: raises SessionError if another is not done."""
        mine = object()
        try:
            try:
                if self._answers.setdefault("answer", mine) is not mine:  # one operation: threads cannot both have it
                    self._refuse("begin another")
                yield
            finally:
                self._done(mine)
        finally:
            self._done(mine)  # where an interrupt came in place of the first

    def _done(self, answer: object) -> None:
        if self._answers.get("answer") is answer:
            self._answers.clear()

    def _refuse(self, wanted: str) -> NoReturn:
        raise SessionError(
            f"the session is still answering: read that stream to its end or close it (stream.close()), then {wanted}"
        )

    def go_on(self, prompt: Prompt) -> int:
        """Makes the cache cover as much of the beginning of `prompt` as it can, and returns how many tokens that is.

        At least one token of the prompt is left to compute.
        """
        places, self.course = placed(self.model, prompt), None
        shared = min(_common(self.tokens, prompt.tokens), _first_other(self.shown, [(a, m) for a, _, m in places]))
        # Now the tokens are the beginning of this prompt, and stay it whatever interrupts what follows.
        length = self._go_back(min(shared, len(prompt.tokens) - 1))
        self.shown = [(start, medium) for start, _, medium in places]
        self._meetings = frozenset(at for at in {*meeting_places(prompt, places), *self._asked} if at > length)
        self.course = prompt
        return length

    def _go_back(self, most: int) -> int:
        """Makes the cache and the tokens end as late as possible, after `most` tokens or fewer; -> after how many."""
        if not most == len(self.tokens) == self.cache.offset:
            tokens, mark = self.tokens, self.marks.last(most)
            if mark is None:
                self.forget()
            else:
                self.tokens = []  # a cache that is halfway back, if this is interrupted, stands for nothing
                self.cache.restore(mark.snapshot)
                self.marks.cut(mark.offset)
                self.tokens = tokens[: mark.offset]
        return len(self.tokens)

    @property
    def meetings(self) -> list[int]:
        """Where the prompt that `go_on` was given has places, after what is covered, at which to take a snapshot."""
        return sorted(self._meetings)

    def meet(self, place: int) -> None:
        """Have a snapshot taken after `place` tokens of the prompt that is computed now, or is about to be: another
        prompt parts from it there."""
        self._asked |= {place}
        self._meetings |= {place}

    def due(self, ahead: int) -> bool:
        """Whether a snapshot is to be taken where the cache is, if the next chance comes `ahead` tokens later."""
        offset = self.cache.offset
        return offset in self._meetings or self.marks.due(offset, ahead)

    def reached(self, ahead: int) -> None:
        """The cache has come to the end of a chunk or token; the next end is at most `ahead` tokens away."""
        offset = self.cache.offset
        if self.due(ahead):
            self.cache.detach()
            self.marks.add(offset, self.cache.snapshot(), met=offset in self._meetings)

    def met(self, snapshot: Snapshot) -> None:
        """A snapshot that was taken on the way, at one of the meetings."""
        self.marks.add(snapshot.offset, snapshot, met=True)

    def settle(self, tokens: Sequence[int]) -> None:
        """After an answer: `tokens`, prompt and answer, of which the cache covers the first `cache.offset`."""
        self.tokens = list(tokens[: self.cache.offset])
        self._meetings = self._asked = frozenset()
        self.course = None
        if self._pool is not None:
            self._pool.used(self)

    def agree(self, then: str) -> None:
        """Goes back to where tokens and cache agree, if an interrupt left them apart.

        then: what is to be done with it, for the SessionError while an answer is made.
        """
        if self.in_use:
            self._refuse(then)
        self._go_back(len(self.tokens))

    def branch(self: _Self) -> _Self:
        """Another one with the same past, which is not copied: both go on from it, each its own way.

        Raises SessionError while an answer is made.
        """
        self.agree("branch it")
        other = type(self)(self.model, self.processor, snapshot_bytes=self._snapshot_bytes, pool=self._pool)
        if self.tokens:
            other.cache, snapshots = self.cache.branch(mark.snapshot for mark in self.marks)
            other.tokens, other.shown = list(self.tokens), list(self.shown)
            for mark, snapshot in zip(self.marks, snapshots, strict=True):
                other.marks.add(mark.offset, snapshot, met=mark.met)
        if self._pool is not None:
            self._pool.used(other)
        return other

    def begin_with(self, tokens: Sequence[int], shown: Sequence[Shown], cache: Cache, marks: Iterable[Mark]) -> None:
        """Takes a past that was computed elsewhere in place of its own: `cache` covers `tokens`, which show `shown`."""
        self.forget()
        for mark in marks:
            self.marks.add(mark.offset, mark.snapshot, met=mark.met)
        self.cache, self.shown = cache, list(shown)
        self.tokens = list(tokens)  # last: an interrupt before leaves a cache that stands for nothing


def placed(model: Model, prompt: Prompt) -> list[tuple[int, int, Media]]:
    """Where the placeholders of each image and video begin and end, in the order of the tokens."""
    if not prompt.media:
        return []
    taken = model.placement([prompt.tokens], [prompt.media]).features[0]
    places, first = [], 0
    for medium in prompt.media:
        own = np.flatnonzero((taken >= first) & (taken < first + medium.tokens))
        places.append((int(own[0]), int(own[-1]) + 1, medium))
        first += medium.tokens
    return sorted(places, key=lambda place: place[0])


def meeting_places(prompt: Prompt, places: Iterable[tuple[int, int, Media]]) -> set[int]:
    """Where other prompts are likely to part from this one: after the system message and tools, where the answer
    begins, and after each image and video of `places`."""
    return {*prompt.turns[1:2], *prompt.turns[-1:], *(end for _, end, _ in places)}


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens at the beginning are the same."""
    least = min(len(left), len(right))
    if left[:least] == right[:least]:
        return least
    for at, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return at
    return least


def _first_other(left: Sequence[Shown], right: Sequence[Shown]) -> float:
    """Where the first image or video begins that the other does not have; infinity: nowhere."""
    for a, b in zip_longest(left, right):
        # The key is a hash of all pixels; a chat keeps its media, and then the object is the same.
        if a is None or b is None or not (a[1] is b[1] or a[1].key == b[1].key):
            return min(place[0] for place in (a, b) if place is not None)
    return float("inf")
