"""Prompts on their way into caches, a piece at a time; pieces of several go in one call.

Knows how far each is, and where a piece has to end or a snapshot is wanted on the way. Knows nothing of who waits
meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, MutableMapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlx_qwen35.cache.ragged import RaggedCache
from mlx_qwen35.engine.allowed import check_covered
from mlx_qwen35.errors import ArgumentError
from mlx_qwen35.speculative import Tapped
from mlx_qwen35.vision.sight import Sight

if TYPE_CHECKING:
    from mlx_qwen35.cache import Cache, Snapshot
    from mlx_qwen35.model import Model
    from mlx_qwen35.vision.media import Media


LONG = 256  # tokens of a piece that can be left between layers


class Left(Exception):
    """A piece was left: the cache is as it was before."""


class _Between:
    """Looks between layers whether to leave. The layer before is waited for, so that a look is of that moment, while
    the newest is queued: what computes never waits for a look."""

    def __init__(self, leaves: Callable[[], bool]) -> None:
        self._leaves = leaves
        self._before: mx.array | None = None

    def __call__(self, x: mx.array) -> None:
        mx.async_eval(x)
        if self._before is not None:
            mx.eval(self._before)
        self._before = x
        if self._leaves():
            raise Left


class Prefill:
    """tokens [T] or [B, T], of which the cache holds the first `covered`; the rest is fed, chunk by chunk.

    media, features, chunk_size, on_progress: as in `generation.prefill`. stops: after how many fed tokens a piece ends,
    asked before each. places: after how many a snapshot is wanted, of one sequence without padding, asked before each
    too: a piece that goes on behind one leaves it, detached, with `on_place`. leaves: whether all is to end, asked
    between the layers of a long piece, which then raises Left. Raises ArgumentError or PromptError where the cache does
    not hold what is said.
    """

    def __init__(
        self,
        model: Model,
        tokens: mx.array | Sequence[int],
        cache: Cache,
        *,
        media: Sequence[Media] | Sequence[Sequence[Media]] | Sight = (),
        features: MutableMapping[str, mx.array] | None = None,
        covered: int = 0,
        chunk_size: int | None = None,
        stops: Callable[[], Iterable[int]] = tuple,
        places: Callable[[], Iterable[int]] = tuple,
        on_place: Callable[[Snapshot], None] | None = None,
        on_progress: Callable[[int, int], None] | None = None,
        leaves: Callable[[], bool] | None = None,
    ) -> None:
        self.chunk = model.prefill_chunk if chunk_size is None else chunk_size
        if self.chunk < 1:
            raise ArgumentError(f"chunk_size is {chunk_size}; it must be 1 or more")
        tokens = mx.array(tokens)
        tokens = tokens[None] if tokens.ndim == 1 else tokens
        check_covered(covered, tokens.shape[1], cache.offset)
        self.done, self.total = 0, tokens.shape[1] - covered
        self.begun, self.covered = False, covered
        self._model, self._cache = model, cache
        self._tokens, self._media, self._features = tokens, media, features
        self._stops, self._places = stops, places
        self._on_place, self._on_progress = on_place, on_progress
        self.leaves = leaves

    def begin(self) -> None:
        """Makes room, and tells of the beginning."""
        self.begun = True
        self._cache.reserve(self._cache.offset + self.total)
        if self._on_progress:
            self._on_progress(0, self.total)

    def piece(self, most: int | None = None, *, pausing: bool = False) -> mx.array | None:
        """Feeds the next piece, of `most` tokens at the most; -> logits of the last position [B, V] with the last one.

        pausing: it ends at the next of the `places`, too. An error or interrupt inside leaves the cache as it was
        before the piece. Pictures are encoded before the first.
        """
        piece = self.next(most, pausing=pausing)
        (logits,) = compute([piece])
        piece.tell()
        return logits

    def next(self, most: int | None = None, *, pausing: bool = False) -> Piece:
        """The next piece, for `compute`; arguments as above."""
        if self._media and not isinstance(self._media, Sight):
            seeing = {"known": self._features, "covered": self.covered}
            self._media = self._model.see(self._tokens, self._media, self._cache, **seeing)
        places = sorted(self._places())
        start, end = self.done, self._end(most, places if pausing else ())
        sight = self._media[start:end]
        tokens = self._tokens[:, self.covered + start : self.covered + end]
        inside = tuple(place - start for place in places if start < place < end)
        return Piece(self, self._model, self._cache, tokens, sight, inside, end == self.total)

    def computed(self, length: int, kept: Iterable[Snapshot]) -> None:
        """The cache has so many tokens more: tells of it."""
        for snapshot in kept:
            self._on_place(snapshot)
        self.done += length
        if self._on_progress:
            self._on_progress(self.done, self.total)

    def _end(self, most: int | None, places: Iterable[int]) -> int:
        """Of the next piece: a whole chunk's, a place to stop at, or what is left."""
        chunk = (self.done // self.chunk + 1) * self.chunk
        ends = [stop for stop in (*self._stops(), *places) if self.done < stop < self.total]
        if most is not None:
            ends.append(self.done + most)
        return min([chunk, self.total, *ends])


@dataclass(eq=False)
class Piece:
    """Tokens [B, T] of a prompt, which `compute` brings into its cache; then `tell` says so.

    places: after how many of them a snapshot is wanted, ascending; last: the prompt ends with them.
    """

    prefill: Prefill
    model: Model
    cache: Cache
    tokens: mx.array
    sight: Sight | tuple
    places: tuple[int, ...]
    last: bool
    kept: list[Snapshot] = field(default_factory=list)

    @property
    def length(self) -> int:
        return self.tokens.shape[1]

    def took(self, hidden: mx.array, kept: Sequence[Snapshot]) -> None:
        """What is read of it [B, T, H] is known to what drafts, and the snapshots that its cache kept on the way have
        what is not the cache's."""
        cache, sight = self.cache, self.sight
        held = cache.offset - self.length
        # cut at each place: what drafts goes back to where it was there
        for at, (begin, end) in enumerate(pairwise([0, *self.places, self.length])):
            part = slice(begin, end)
            if cache.draft is not None:
                positions = sight[part].positions if sight else None
                cache.draft.prime(self.tokens[:, part], hidden[:, part], positions, offset=held + end)
            if end < self.length:
                delta = sight[part].next_positions[0] - held - end if sight else cache.rope_delta
                self.kept.append(replace(kept[at], rope_delta=delta, draft=cache.draft_mark()))

    def detach(self) -> None:
        """The snapshots keep nothing else alive, and the cache nothing of theirs."""
        self.kept = [snapshot.detached() for snapshot in self.kept]
        if self.kept:
            self.cache.detach()

    def tell(self) -> None:
        """Whoever asked for it is told that it was computed."""
        self.prefill.computed(self.length, self.kept)


def compute(pieces: Sequence[Piece], *, queued: bool = False) -> list[mx.array | None]:
    """Computes pieces of prompts in one call of the model, each into its own cache; several have one sequence each,
    without padding and media. -> of each the logits of its last position [B, V], where the prompt ends there.

    queued: others' step is computed meanwhile, and nothing waits for it.
    An error or interrupt inside leaves all caches as they were. A long call is left, too, when all are to end.
    """
    model, befores = pieces[0].model, [piece.cache.snapshot() for piece in pieces]
    try:
        with nullcontext() if queued else model.computing(sum(piece.length for piece in pieces)):
            each = _through(pieces)
            ended = [own[:, -1:] for piece, own in zip(pieces, each, strict=True) if piece.last]
            logits = [] if not ended else [*model.head(mx.concatenate(ended, axis=1)).swapaxes(0, 1)]
            mx.eval(logits, [[piece.cache.arrays(), [one.arrays() for one in piece.kept]] for piece in pieces])
            for piece in pieces:
                piece.detach()
    except BaseException:
        for piece, before in zip(pieces, befores, strict=True):
            piece.cache.restore(before)
        raise
    mx.clear_cache()
    found = iter(logits)
    return [next(found) if piece.last else None for piece in pieces]


def _through(pieces: Sequence[Piece]) -> Sequence[mx.array]:
    """Pieces through the model and what drafts -> hidden states of each, [B, piece, H] or the last of them."""
    model, lengths = pieces[0].model, [piece.length for piece in pieces]
    tapped = Tapped(piece.cache.draft for piece in pieces)
    how: dict[str, Any] = {"more": any(not piece.last for piece in pieces), **tapped.asked}
    if sum(lengths) >= LONG and all(piece.prefill.leaves is not None for piece in pieces):
        how["between"] = _Between(lambda: all(piece.prefill.leaves() for piece in pieces))
    with ExitStack() as stack:
        kept = []
        for piece in pieces:
            offsets = [piece.cache.offset + place for place in piece.places]
            kept.append(stack.enter_context(piece.cache.each_step(offsets)) if offsets else [])
        ends = [*accumulate(lengths)][:-1]
        if len(pieces) == 1:
            (piece,) = pieces
            how["wanted"] = 1 if piece.cache.draft is None else None
            hidden = model.hidden(piece.tokens, piece.cache, piece.sight, **how)
        else:
            tokens = mx.concatenate([piece.tokens for piece in pieces], axis=1)
            hidden = model.hidden(tokens, RaggedCache([piece.cache for piece in pieces], lengths), **how)
    each = mx.split(hidden, ends, axis=1) if ends else [hidden]
    for number, (piece, own, snapshots) in enumerate(zip(pieces, each, kept, strict=True)):
        read, draft = own, piece.cache.draft
        if draft is not None and draft.taps:
            read = tapped.of(draft, hidden)
            read = mx.split(read, ends, axis=1)[number] if ends else read
        piece.took(read, snapshots)
    return each
