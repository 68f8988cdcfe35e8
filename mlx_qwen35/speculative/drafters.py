"""Who guesses the tokens to come: the MTP head of the model, or a small model beside it (or blocks.py's, of a block).

Knows what it has taken in of the tokens, and how to go back with the cache that it follows. Its guesses need not be
right, so nothing here has to be exact. Knows one sequence, and nothing of what becomes of the guesses.

A drafter lags behind the cache: tokens wait until it is asked, and then go through it together. The head takes a hidden
state with the token after it, so what the last hidden state is taken with is the token that was drawn from it:

    cache has    x0 x1 x2 x3           drawn, and not in the cache yet: x4
    head has     (h0 x1) (h1 x2)       waiting: h2 (with x3), h3 (with x4)
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Container, Iterable, Sequence
from copy import copy, deepcopy
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import mlx.core as mx

from mlx_qwen35.cache.copies import cache_at, copied, shrink, shrunk
from mlx_qwen35.layers.taps import Taps
from mlx_qwen35.model.mtp import PRIME_AT_ONCE, MTPHead
from mlx_qwen35.speculative.pace import Pace

if TYPE_CHECKING:
    from mlx_qwen35.blocks.drafter import BlockDraftModel
    from mlx_qwen35.cache import Cache, Follower, KVCache, Snapshot, StretchedKVCache
    from mlx_qwen35.model import Model

Choose = Callable[[mx.array], "mx.array | None"]  # logits [1, V] of a guess -> its token [1]; None: no more guesses
_FEW = 8  # tokens after each of which a draft model's state may be kept


class Taken(NamedTuple):
    """T tokens that the cache has taken. tokens [1, T], positions [3, 1, T]; hidden [1, T, H]: what came of them, or
    with taps what those layers gave, one beside the other."""

    tokens: mx.array
    hidden: mx.array
    positions: mx.array

    def cut(self, part: slice) -> Taken:
        # Contiguous: a plain slice of hidden would keep the whole chunk alive.
        return Taken(self.tokens[:, part], mx.contiguous(self.hidden[:, part]), self.positions[..., part])

    @staticmethod
    def joined(parts: tuple[Taken, ...]) -> Taken:
        if len(parts) == 1:
            return parts[0]
        tokens, hidden, positions = zip(*parts, strict=True)
        return Taken(mx.concatenate(tokens, axis=1), mx.concatenate(hidden, axis=1), mx.concatenate(positions, axis=2))


class Drafter:
    """What follows a cache and guesses how it goes on. covered: the tokens of the cache that it knows of.

    pace: how many guesses pay, of all answers that this cache was used for. taps: the layers whose outputs it is to be
    told of, in place of the model's own; none: it is not.
    """

    taps: Sequence[int] = ()

    def __init__(self, model: Model, cache: Cache, pace: Pace, draft_model: BlockDraftModel | MTPHead | Model) -> None:
        self.model, self.pace, self._draft_model = model, pace, draft_model
        self._cache = weakref.ref(cache)  # which holds this: in a circle both would outlive their use
        self.covered = cache.offset
        self._waiting: tuple[Taken, ...] = ()

    @property
    def cache(self) -> Cache:
        """That is followed."""
        return self._cache()

    def serves(self, draft_model: BlockDraftModel | MTPHead | Model, cache: Cache) -> bool:
        """Whether this is a drafter by that model, and knows all tokens of that cache."""
        return self._draft_model is draft_model and self.cache is cache and self.covered == cache.offset

    def follow(
        self, tokens: mx.array, hidden: mx.array, positions: mx.array | None = None, *, offset: int | None = None
    ) -> None:
        """The cache has just taken tokens [1, T], and hidden [1, T, H] came of it; with taps, what `Tapped.of` has.

        positions [3, 1, T]: where they stand, if there are images among them; None: one after the other. offset: how
        many tokens the cache held after them, where it has taken more since.
        """
        offset = self.cache.offset if offset is None else offset
        if positions is None:
            stop = offset + self.cache.rope_delta
            positions = mx.broadcast_to(mx.arange(stop - tokens.shape[1], stop), (3, *tokens.shape))
        self._waiting = (*self._waiting, Taken(tokens, hidden, positions))
        self.covered = offset

    def prime(
        self, tokens: mx.array, hidden: mx.array, positions: mx.array | None = None, *, offset: int | None = None
    ) -> None:
        """`follow`, and take in what can be: for a chunk of a prompt."""
        self.follow(tokens, hidden, positions, offset=offset)
        self._take_in()

    @property
    def waiting(self) -> int:
        """Calls that were followed and not taken in."""
        return len(self._waiting)

    def catch_up(self) -> None:
        """Take in what can be, where many tokens come without a guess."""
        self._take_in()

    def guess(self, token: mx.array, count: int, choose: Choose) -> None:
        """Let `choose` have the logits of the `count` tokens after `token` [1], which the cache does not have yet."""
        raise NotImplementedError

    def _take_in(self) -> None:
        raise NotImplementedError

    def mark(self) -> Any:
        return self._own_mark(), self._waiting, self.covered

    def go_back(self, mark: Any, offset: int) -> None:
        own, waiting, covered = mark
        drop = covered - offset  # tokens of the last call that do not count after all
        while drop > 0 and waiting:
            *rest, last = waiting
            kept = last.tokens.shape[1] - drop
            waiting = (*rest, last.cut(slice(kept))) if kept > 0 else tuple(rest)
            drop = max(-kept, 0)
        self._waiting, self.covered = waiting, offset
        self._own_back(own)

    def branched(self, cache: Cache) -> Drafter:
        """One that follows `cache`, a branch of its own, from the same past; what it has is shared as the caches'."""
        other = copy(self)
        other._cache, other.pace = weakref.ref(cache), deepcopy(self.pace)
        return other

    def copied(self, cache: Cache, mark: Any, offset: int) -> Drafter:
        other = copy(self)
        other._cache, other.pace = weakref.ref(cache), deepcopy(self.pace)
        other._own_copied(mark[0])
        other.go_back(self.as_copied(mark), offset)
        return other

    def _own_copied(self, mark: Any) -> None:
        """Takes arrays of its own in place of those it has, with what is held at `mark`."""
        raise NotImplementedError

    def as_copied(self, mark: Any) -> Any:
        return mark

    def shrink(self, shared: Container[int]) -> None:
        raise NotImplementedError

    def _own_mark(self) -> Any:
        raise NotImplementedError

    def _own_back(self, mark: Any) -> None:
        raise NotImplementedError

    def arrays(self) -> list[mx.array]:
        return [part.hidden for part in self._waiting]

    def marked(self, mark: Any) -> list[mx.array]:
        own, waiting, _ = mark
        return [part.hidden for part in waiting] + self._own_marked(own)

    def _own_marked(self, mark: Any) -> list[mx.array]:
        return []

    def detach(self) -> None:
        """As `Cache.detach`."""


class HeadDrafter(Drafter):
    """The model's MTP head, on its own keys and values: `caches`, one a layer, or those it begins with."""

    def __init__(
        self,
        model: Model,
        cache: Cache,
        pace: Pace,
        head: MTPHead,
        caches: Sequence[KVCache | StretchedKVCache] | None = None,
    ) -> None:
        super().__init__(model, cache, pace, head)
        self.head = head
        self._caches = head.make_caches() if caches is None else list(caches)
        self._held = self._caches[0].offset  # pairs in the caches that are of the cache's tokens; guesses lie behind

    def guess(self, token: mx.array, count: int, choose: Choose) -> None:
        taken = Taken.joined(self._waiting)
        tokens = mx.concatenate([taken.tokens[:, 1:], token[None].astype(taken.tokens.dtype)], axis=1)
        h, position = self._pairs(tokens, taken.hidden, taken.positions), taken.positions[..., -1:]
        self._held += tokens.shape[1]
        self._waiting = ()
        for number in range(1, count + 1):
            h = h[:, -1:]
            token = choose(self.model.head(h)[:, -1])
            if token is None:
                return
            if number < count:
                position = position + 1
                h = self._through(token[None], h, position)

    def _take_in(self) -> None:
        taken = Taken.joined(self._waiting)
        length = taken.tokens.shape[1]
        for start in range(0, length - 1, PRIME_AT_ONCE):
            stop = min(start + PRIME_AT_ONCE, length - 1)
            tokens, part = taken.tokens[:, start + 1 : stop + 1], slice(start, stop)
            self._pairs(tokens, taken.hidden[:, part], taken.positions[..., part])
            self._held += stop - start
            mx.eval(self.arrays())  # so that one piece at a time takes memory
        self._waiting = (taken.cut(slice(length - 1, length)),)

    def _pairs(self, tokens: mx.array, hidden: mx.array, positions: mx.array) -> mx.array:
        """Pairs that are no guesses go in place of those that were."""
        self.settled()
        return self._through(tokens, hidden, positions)

    def settled(self) -> list[KVCache | StretchedKVCache]:
        """Its caches, one a layer, without guesses."""
        for cache in self._caches:
            cache.rewind(self._held)
        return self._caches

    def _through(self, tokens: mx.array, hidden: mx.array, positions: mx.array) -> mx.array:
        embeddings = self.model.embed_tokens(tokens).astype(hidden.dtype)
        return self.head(embeddings, hidden, positions, self._caches)

    def _own_mark(self) -> int:
        return self._held

    def _own_back(self, mark: int) -> None:
        self._held = mark

    def branched(self, cache: Cache) -> HeadDrafter:
        other, pairs = super().branched(cache), [held.branched() for held in self.settled()]
        self._caches, other._caches = [own for own, _ in pairs], [theirs for _, theirs in pairs]
        return other

    def _own_copied(self, mark: int) -> None:
        self._caches = [copied(held, mark) for held in self._caches]

    def shrink(self, shared: Container[int]) -> None:
        self._caches = [shrunk(held, self._held, shared) for held in self._caches]

    def arrays(self) -> list[mx.array]:
        return super().arrays() + [array for cache in self._caches for array in cache.arrays()]


class ModelDrafter(Drafter):
    """A model of its own, which reads the same tokens; what pictures show it does not see."""

    def __init__(self, model: Model, cache: Cache, pace: Pace, small: Model) -> None:
        super().__init__(model, cache, pace, small)
        self.small = small
        self._own = small.make_cache()
        self._held = self._own.snapshot()  # without guesses

    def guess(self, token: mx.array, count: int, choose: Choose) -> None:
        if sum(taken.tokens.shape[1] for taken in self._waiting) >= _FEW:
            self._take_in()
        known = [taken.tokens for taken in self._waiting]
        tokens = mx.concatenate([*known, token[None].astype(known[0].dtype)], axis=1) if known else token[None]
        self._own.restore(self._held)
        with self._own.each_step() as after:
            h = self.small.hidden(tokens, self._own)
        if known:
            self._held = after[-2]
        self._waiting = ()
        for number in range(1, count + 1):
            token = choose(self.small.head(h[:, -1:])[:, -1])
            if token is None:
                return
            if number < count:
                h = self.small.hidden(token[None], self._own)

    def _take_in(self) -> None:
        tokens = mx.concatenate([taken.tokens for taken in self._waiting], axis=1)
        self._own.restore(self._held)
        self.small.hidden(tokens, self._own)
        self._held, self._waiting = self._own.snapshot(), ()

    def _own_mark(self) -> Any:
        return self._held

    def _own_back(self, mark: Any) -> None:
        self._held = mark

    def _own_marked(self, mark: Any) -> list[mx.array]:
        return mark.arrays()

    def detach(self) -> None:
        self._held = self._held.detached()
        self._own.restore(self._held)

    def branched(self, cache: Cache) -> ModelDrafter:
        other = super().branched(cache)
        other._own, _ = self._own.branch()
        return other

    def _own_copied(self, mark: Snapshot) -> None:
        self._own, (self._held,) = cache_at(self._own, mark, [mark])

    def as_copied(self, mark: Any) -> Any:
        own, waiting, covered = mark
        return replace(own, rewinds=0), waiting, covered

    def shrink(self, shared: Container[int]) -> None:
        self._own.restore(self._held)
        shrink(self._own, shared)

    def arrays(self) -> list[mx.array]:
        return super().arrays() + self._own.arrays()


class Tapped:
    """What one call of a model is to be asked for, for those who follow its caches."""

    def __init__(self, followers: Iterable[Follower | None]) -> None:
        layers = {layer for follower in followers if follower is not None for layer in follower.taps}
        self._taps = Taps(layers) if layers else None

    @property
    def asked(self) -> dict[str, Taps]:
        """Arguments of `Model.hidden`: none, where nobody reads more than comes of it anyway."""
        return {} if self._taps is None else {"taps": self._taps}

    def of(self, follower: Follower, hidden: mx.array) -> mx.array:
        """What one of them reads of a call that gave `hidden` [B, T, H]: that, or its layers' [B, T, N H]."""
        return self._taps.of(follower.taps) if follower.taps else hidden
