"""Rank 0: its calls of the model are told to the others before they are made.

Knows caches' points, pictures' embeddings and the others' wires. What is computed is model.py's, who watches over the
others ranks.py's.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from mlx_qwen35.cache import Cache
from mlx_qwen35.cache.rows import RowsCache
from mlx_qwen35.errors import ArgumentError
from mlx_qwen35.machine.interrupt import undisturbed
from mlx_qwen35.parallel.call import NONE, ONE, ROWS, Call, Past
from mlx_qwen35.parallel.model import RanksModel
from mlx_qwen35.parallel.pasts import RanksPasts
from mlx_qwen35.parallel.plan import Plan
from mlx_qwen35.parallel.points import Names, Point
from mlx_qwen35.parallel.progress import allowed
from mlx_qwen35.vision.sight import Sight

if TYPE_CHECKING:
    from mlx_qwen35.parallel.ranks import Ranks


class LeaderModel(RanksModel):
    """Rank 0's share. To whoever calls it a Model like any other; caches are those of `make_cache`."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._others: tuple[Ranks, ...] = ()
        self._names: tuple[Names, ...] = ()
        self.context_length: int | None = None
        self._whose: dict[str, str] = {}

    def lead(self, ranks: Ranks, plan: Plan, context_length: int | None, whose: Mapping[str, str]) -> None:
        """From now on these follow. context_length: the most tokens that all of them have room for; None: no bound.
        whose: hashes of what all ranks have read, of which this one may have little."""
        self._others, self._names, self._plan = (ranks,), (Names(),), (plan,)
        self._whose = dict(whose)
        self.pasts = RanksPasts(ranks, self._names[0])
        self.context_length = context_length
        atexit.register(ranks.close)  # a program that ends without a word is no lost rank

    @property
    def ranks_told(self) -> dict[str, str]:
        return {"ranks": f"{self.plan.ranks} {self.plan.kind} {list(self.plan.shares)}", **self._whose}

    @property
    def ranks(self) -> Ranks:
        return self._others[0]

    def hidden(
        self,
        tokens: mx.array,
        cache: Cache | RowsCache | list[Any] | None = None,
        media: Any = None,
        *,
        more: bool = False,
        between: Callable[[mx.array], None] | None = None,
        wanted: int | None = None,
        best: tuple[int, int] | None = None,
    ) -> mx.array:
        """As Model.hidden; computed on return. between is not asked: a call that was begun is one of all ranks.

        best: how many of the largest logits of the last position all ranks are to find, of the first how many tokens;
        where the model `cuts_head`. `model.best` has them then: values and ids, [B, count] each.
        Raises RankLostError where a rank is gone: the model is then of no use any more.
        """
        if isinstance(cache, list):
            raise ArgumentError("a model on several ranks takes no caches of mlx-lm: give what model.make_cache() made")
        sight = media if isinstance(media, Sight) or not media else self.see(tokens, media, cache)
        ranks, (names,) = self.ranks, self._names
        length = tokens.shape[1]
        with ranks.calling(), undisturbed():
            call, points, each = self._call(tokens, cache, sight or None, more, wanted, names)
            call.best = best
            ranks.send_call(call)
            self._returned = length if wanted is None else min(wanted, length)
            with ranks.together(allowed(tokens.size)):
                x = self.computed(tokens, cache, sight or (), more=more, wanted=wanted, best=best)
            for held, point in zip(_caches(cache), points, strict=True):
                held.point = point
            if each is not None:
                cache.points = each
        return x

    def _call(
        self, tokens: mx.array, cache: Any, sight: Sight | None, more: bool, wanted: int | None, names: Names
    ) -> tuple[Call, list[Point], dict[int, Point] | None]:
        ids, caches = np.array(tokens), _caches(cache)
        points, each, offsets, numbers = [names.new() for _ in caches], None, None, []
        if isinstance(cache, Cache) and cache.each is not None:
            offsets = list(cache.each)
            stop = cache.offset + tokens.shape[1]
            ends = range(cache.offset + 1, stop + 1) if not offsets else [at for at in offsets if at <= stop]
            each = {at: names.new() for at in ends}
            for point in each.values():
                point.kept = True
            numbers = [point.number for point in each.values()]
            if stop in each:
                points = [each[stop]]
        pasts = []
        for held, point in zip(caches, points, strict=True):
            deltas = [held.rope_delta] if isinstance(held.rope_delta, int) else list(held.rope_delta)
            before: Point | None = held.point
            if before is None and held.offset:
                raise ArgumentError("this cache was filled by a model that is not on these ranks: begin with a new one")
            padding = [] if held.left_padding is None else held.left_padding.tolist()
            number, kept = (0, False) if before is None else (before.number, before.kept)
            pasts.append(Past(number, kept, point.number, deltas, padding))
        embedded = None
        if sight is not None:
            x = None
            if self.plan.kind != "pipeline":
                x = sight.written_into(self.embed_tokens(tokens).astype(self.norm.weight.dtype))
            embedded = (x, sight.positions)
        kind = NONE if cache is None else ONE if isinstance(cache, Cache) else ROWS
        said = Call(ids, kind, pasts, more, wanted or -1, offsets, numbers, names.dropped(), embedded)
        return said, points, each

    def unload(self) -> None:
        ranks = self.ranks if self._others else None
        super().unload()
        if ranks is not None:
            ranks.close()


def _caches(cache: Cache | RowsCache | None) -> list[Cache]:
    return [] if cache is None else [cache] if isinstance(cache, Cache) else cache.rows
