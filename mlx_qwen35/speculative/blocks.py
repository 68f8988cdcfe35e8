"""A block drafter beside a cache: it reads what layers of the model say, and guesses a whole block in one pass.

Knows what of the context its windows have. Only the context is kept, never a block, so that what becomes of guesses is
no matter to it.

    cache has     x0 x1 x2 x3          drawn, and not in the cache yet: x4
    windows have  x0 x1                waiting: x2, x3;  a block: x4 mask mask ..

Guesses of a DFlash are drawn row by row, those of a DFlash2 along a path. Either way each is drawn from the
distribution that is told of it, given those before, which is all that rejection sampling needs.
"""

from __future__ import annotations

from collections.abc import Container
from typing import TYPE_CHECKING

import mlx.core as mx

from mlx_qwen35.blocks.drafter import BlockDraftModel
from mlx_qwen35.speculative.drafters import Choose, Drafter, Taken
from mlx_qwen35.speculative.pace import Pace

if TYPE_CHECKING:
    from mlx_qwen35.cache import Cache
    from mlx_qwen35.model import Model


_MOST_WAITING = 256  # tokens that wait for a guess


class BlockDrafter(Drafter):
    """`blocks` for `model`, from where the cache is now: what came before it does not know."""

    def __init__(self, model: Model, cache: Cache, pace: Pace, blocks: BlockDraftModel) -> None:
        super().__init__(model, cache, pace, blocks)
        self.blocks = blocks
        self.taps = blocks.config.taps
        self._windows = blocks.make_windows(cache.offset)
        self._held = cache.offset  # tokens of the cache that the windows have had

    def follow(
        self, tokens: mx.array, hidden: mx.array, positions: mx.array | None = None, *, offset: int | None = None
    ) -> None:
        # Outputs of several layers are large. What waits is certain; what comes may not be.
        if sum(part.tokens.shape[1] for part in self._waiting) >= _MOST_WAITING:
            self._take_in()
        super().follow(tokens, hidden, positions, offset=offset)

    def guess(self, token: mx.array, count: int, choose: Choose) -> None:
        self._take_in()
        block = mx.concatenate([token, mx.full((count,), self.blocks.config.mask, token.dtype)])
        hidden = self.blocks(self.model.embed_tokens(block[None]), self._windows)[:, 1:]
        self.blocks.walk(token, hidden, self.blocks.logits(self.model.head(hidden)), choose)

    def _take_in(self) -> None:
        for window in self._windows:
            window.rewind(self._held)
        if not self._waiting:
            return
        taken = Taken.joined(self._waiting)
        self.blocks.remember(taken.hidden, self._windows)
        self._held += taken.tokens.shape[1]
        self._waiting = ()

    def _own_mark(self) -> int:
        return self._held

    def _own_back(self, mark: int) -> None:
        self._held = mark

    def branched(self, cache: Cache) -> BlockDrafter:
        other = super().branched(cache)
        other._windows = [window.copied() for window in self._windows]
        return other

    def _own_copied(self, mark: int) -> None:
        self._windows = [window.copied() for window in self._windows]
        for window in self._windows:
            window.rewind(mark)

    def shrink(self, shared: Container[int]) -> None:
        for window in self._windows:
            window.rewind(self._held)
            window.shrink()

    def arrays(self) -> list[mx.array]:
        return super().arrays() + [array for window in self._windows for array in window.arrays()]
