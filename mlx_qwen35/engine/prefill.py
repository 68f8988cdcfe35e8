"""A prompt on its way into a cache, a piece at a time.

Knows how far it is, and where a piece has to end. Knows nothing of who waits meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, MutableMapping, Sequence
from typing import TYPE_CHECKING

import mlx.core as mx

from mlx_qwen35.errors import ArgumentError
from mlx_qwen35.request import check_covered
from mlx_qwen35.vision.sight import Sight

if TYPE_CHECKING:
    from mlx_qwen35.cache import Cache
    from mlx_qwen35.model import Model
    from mlx_qwen35.vision.media import Media


class Prefill:
    """tokens [T] or [B, T], of which the cache holds the first `covered`; the rest is fed, chunk by chunk.

    media, features, chunk_size, on_progress: as in `generation.prefill`. stops: after how many fed tokens a piece ends,
    asked before each. Raises ArgumentError or PromptError where the cache does not hold what is said.
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
        on_progress: Callable[[int, int], None] | None = None,
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
        self._stops, self._on_progress = stops, on_progress

    def begin(self) -> None:
        """Makes room, and tells of the beginning."""
        self.begun = True
        self._cache.reserve(self._cache.offset + self.total)
        if self._on_progress:
            self._on_progress(0, self.total)

    def piece(self, most: int | None = None) -> mx.array | None:
        """Feeds the next piece, of `most` tokens at the most; -> logits of the last position [B, V] with the last one.

        An error or interrupt inside leaves the cache as it was before the piece. Pictures are encoded before the first.
        """
        model, cache = self._model, self._cache
        if self._media and not isinstance(self._media, Sight):
            seeing = {"known": self._features, "covered": self.covered}
            self._media = model.see(self._tokens, self._media, cache, **seeing)
        start, end = self.done, self._end(most)
        before = cache.snapshot()
        logits = None
        try:
            part = self._tokens[:, self.covered + start : self.covered + end]
            sight = self._media[start:end]
            hidden = model.hidden(part, cache, sight, more=end < self.total)  # [B, piece, H]
            if cache.draft is not None:
                cache.draft.prime(part, hidden, sight.positions if sight else None)
            if end == self.total:
                logits = model.head(hidden[:, -1:])[:, -1]  # [B, V]
                mx.eval(logits)
            mx.eval(cache.arrays())
        except BaseException:
            cache.restore(before)
            raise
        mx.clear_cache()
        self.done = end
        if self._on_progress:
            self._on_progress(end, self.total)
        return logits

    def _end(self, most: int | None) -> int:
        """Of the next piece: a whole chunk's, a place to stop at, or what is left."""
        chunk = (self.done // self.chunk + 1) * self.chunk
        ends = [stop for stop in self._stops() if self.done < stop < self.total]
        if most is not None:
            ends.append(self.done + most)
        return min([chunk, self.total, *ends])
