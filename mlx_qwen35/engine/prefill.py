"""A prompt on its way into a cache, a piece at a time.

Knows how far it is, and where a piece has to end or a snapshot is wanted on the way. Knows nothing of who waits
meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, MutableMapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlx_qwen35.errors import ArgumentError
from mlx_qwen35.request import check_covered
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
        self._leaves = leaves

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
        model, cache = self._model, self._cache
        if self._media and not isinstance(self._media, Sight):
            seeing = {"known": self._features, "covered": self.covered}
            self._media = model.see(self._tokens, self._media, cache, **seeing)
        places = sorted(self._places())
        start, end = self.done, self._end(most, places if pausing else ())
        places = [place for place in places if start < place < end]
        before = cache.snapshot()
        logits = None
        try:
            sight = self._media[start:end]
            part = self._tokens[:, self.covered + start : self.covered + end]
            hidden, kept = self._through(part, sight, places)  # [B, piece, H]
            if end == self.total:
                logits = model.head(hidden[:, -1:])[:, -1]  # [B, V]
                mx.eval(logits)
            mx.eval(cache.arrays(), [snapshot.arrays() for snapshot in kept])
            kept = [snapshot.detached() for snapshot in kept]
            if kept:
                cache.detach()
        except BaseException:
            cache.restore(before)
            raise
        mx.clear_cache()
        for snapshot in kept:
            self._on_place(snapshot)
        self.done = end
        if self._on_progress:
            self._on_progress(end, self.total)
        return logits

    def _through(self, tokens: mx.array, sight: Sight | tuple, places: list[int]) -> tuple[mx.array, list[Snapshot]]:
        """The next tokens [B, piece] through the model and what drafts -> hidden states, a snapshot at each place."""
        cache, start, length = self._cache, self.done, tokens.shape[1]
        how: dict[str, Any] = {"more": start + length < self.total}
        if self._leaves is not None and length >= LONG:
            how["between"] = _Between(self._leaves)
        if cache.draft is None:
            how["wanted"] = 1
        if not places:
            hidden = self._model.hidden(tokens, cache, sight, **how)
            if cache.draft is not None:
                cache.draft.prime(tokens, hidden, sight.positions if sight else None)
            return hidden, []
        held = cache.offset
        with cache.each_step([held + place - start for place in places]) as kept:
            hidden = self._model.hidden(tokens, cache, sight, **how)
        found = []
        # cut at each place: what drafts goes back to where it was there
        for at, (begin, end) in enumerate(pairwise([0, *(place - start for place in places), length])):
            part = slice(begin, end)
            if cache.draft is not None:
                positions = sight[part].positions if sight else None
                cache.draft.prime(tokens[:, part], hidden[:, part], positions, offset=held + end)
            if end < length:
                delta = sight[part].next_positions[0] - held - end if sight else cache.rope_delta
                found.append(replace(kept[at], rope_delta=delta, draft=cache.draft_mark()))
        return hidden, found

    def _end(self, most: int | None, places: Iterable[int]) -> int:
        """Of the next piece: a whole chunk's, a place to stop at, or what is left."""
        chunk = (self.done // self.chunk + 1) * self.chunk
        ends = [stop for stop in (*self._stops(), *places) if self.done < stop < self.total]
        if most is not None:
            ends.append(self.done + most)
        return min([chunk, self.total, *ends])
