"""Rows that take their steps together: one call of the model, one draw, and each row's token.

Knows when a step is computed, and whose state is where. Knows nothing of prompts, text or whose turn it is.

A step is queued before the token of the one before is read, so that the GPU goes on while Python looks at it:

    queued   forward(t1) draw t2 | forward(t2) draw t3 | ...
    read                      t1 |                  t2 | ...          the cache covers a token when it is handed out

Where a grammar decides what may come, the token is read while the forward pass runs, and the mask made meanwhile.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlx_qwen35.cache.rows import RowsCache
from mlx_qwen35.sampling.largest import top_logprobs
from mlx_qwen35.sampling.rows import RowsSampler
from mlx_qwen35.speculative import Tapped
from mlx_qwen35.speculative.step import Drawn, Step

if TYPE_CHECKING:
    from mlx_qwen35.cache import Cache
    from mlx_qwen35.grammar import Matcher
    from mlx_qwen35.model import Model
    from mlx_qwen35.sampling import History, Sampler
    from mlx_qwen35.speculative import Drafter, Text
    from mlx_qwen35.text.parts import Told

CLEAR_EVERY = 256  # steps between two returns of MLX's spare buffers, which grow with the KV cache
CATCH_UP = 64  # calls that a drafter may lag behind while its row goes on without it


@dataclass(eq=False)
class Seat:
    """What one row brings: its cache, how its tokens are drawn, and the one that was drawn last, which the cache does
    not have yet (token [1], logprobs [1, V]; None before the first).

    text: what copies are made from. top: how many of the likeliest tokens are told with each; None: nothing is told.
    While it sits in a Group its delta states, history and drawn token may be there.
    """

    cache: Cache
    sampler: Sampler
    history: History
    drafter: Drafter | None = None
    matcher: Matcher | None = None
    top: int | None = None
    drawn: Drawn | None = None
    text: Text | None = None

    @property
    def drafts(self) -> bool:
        """Whether it drafts where it goes on alone."""
        return self.drafter is not None or self.text is not None

    def draw_first(self, logits: mx.array) -> None:
        """The first token, from the logits [1, V] of the prompt's last."""
        words = None if self.matcher is None else self.matcher.mask()
        token, logprobs = self.sampler(logits, self.history, *([] if words is None else [words]))
        self.history.append(token)
        mx.async_eval(token)
        self.drawn = token, logprobs


class Group:
    """Seats whose rows take their steps together; one alone has the calls that a single sequence has."""

    def __init__(self, model: Model) -> None:
        self.seats: list[Seat] = []
        self._model = model
        self._rows: RowsCache | None = None  # of two rows or more
        self._sampler: RowsSampler | None = None  # likewise
        self._drawn: Drawn | None = None
        self._steps = 0

    def change(self, leaving: Iterable[Seat] = (), joining: Iterable[Seat] = ()) -> None:
        """Who leaves has everything back, and goes on alone; who joins has a drawn token."""
        leaving, joining = [seat for seat in leaving if seat in self.seats], list(joining)
        if not leaving and not joining:
            return
        self._apart()
        if leaving and self._rows is not None:
            self._rows.leave([self.seats.index(seat) for seat in leaving])
        self.seats = [seat for seat in self.seats if seat not in leaving]
        before = len(self.seats)
        self.seats += joining
        if len(self.seats) < 2:
            if self._rows is not None and before == 1:
                self._rows.leave([0])
            self._rows = None
        elif self._rows is None:
            self._rows = RowsCache([seat.cache for seat in self.seats])
        elif joining:
            self._rows.join([seat.cache for seat in joining])
        self._join()

    def settle(self, seat: Seat) -> None:
        """The row's cache is whole, as if it were alone."""
        if self._rows is not None and seat in self.seats:
            self._rows.settle([self.seats.index(seat)])

    def step(self, *, drawing: bool = True) -> list[Step]:
        """The drawn token of each row, which its cache takes, while the next is drawn; drawing False: none is.

        An error or interrupt leaves all caches as they were.
        """
        tokens, logprobs = self._drawn
        cache = self.seats[0].cache if self._rows is None else self._rows
        before = cache.snapshot() if self._rows is None else cache.mark()
        try:
            tapped = Tapped(seat.drafter for seat in self.seats)
            wanted = self._best_wanted() if drawing else {}
            hidden = self._model.hidden(tokens[:, None], cache, **tapped.asked, **wanted)  # [B, 1, H]
            self._follow(tokens, hidden, tapped)
            told = self._told(tokens, logprobs)
            if drawing:
                logits = self._model.head(hidden)[:, -1]
                best = self._model.best if wanted else None
                self._drawn = self._draw(logits, self._words(tokens, logits), best)
                mx.async_eval(self._drawn[0], cache.arrays(), *(told or ()))
            else:  # nothing is drawn from it, but the cache has to cover it
                mx.async_eval(cache.arrays(), *(told or ()))
            said = tokens.tolist()
        except BaseException:
            cache.restore(before) if self._rows is None else cache.go_back(before)
            self._drawn = tokens, logprobs
            raise
        self._steps += 1
        if self._steps % CLEAR_EVERY == 0:
            mx.clear_cache()
        kept = before if self._rows is None else None
        tops = [seat.top for seat in self.seats]
        telling = [None] * len(said) if told is None else _read(told, tops)
        return [
            Step(token, logprobs[row], kept, told=tells)
            for row, (token, tells) in enumerate(zip(said, telling, strict=True))
        ]

    def _follow(self, tokens: mx.array, hidden: mx.array, tapped: Tapped) -> None:
        for row, seat in enumerate(self.seats):
            if seat.drafter is not None:
                one = slice(row, row + 1)
                seat.drafter.follow(tokens[one, None], tapped.of(seat.drafter, hidden)[one])
                if self._rows is not None and seat.drafter.waiting >= CATCH_UP:
                    seat.drafter.catch_up()

    def _words(self, tokens: mx.array, logits: mx.array) -> list[Any] | None:
        """Which tokens may come next, a row each; None: any in all rows."""
        matchers = [seat.matcher for seat in self.seats]
        if not any(matchers):
            return None
        mx.async_eval(logits)
        for matcher, token in zip(matchers, tokens.tolist(), strict=True):
            if matcher is not None:
                matcher.advance(token)
        return [None if matcher is None else matcher.mask() for matcher in matchers]

    def _best_wanted(self) -> dict[str, Any]:
        """What to ask of a model that finds the largest logits without all of them (parallel/head.py); nothing where
        all are needed, or it is none."""
        if not getattr(self._model, "cuts_head", False):
            return {}
        if any(seat.matcher is not None or seat.history.budget is not None for seat in self.seats):
            return {}
        sampler = self.seats[0].sampler if self._sampler is None else self._sampler
        best = sampler.best_wanted(self._model.config.text.vocab_size)
        return {} if best is None else {"best": best}

    def _draw(self, logits: mx.array, words: list[Any] | None, best: tuple[mx.array, mx.array] | None) -> Drawn:
        """The logits are lazy: where the best of them are known, nobody may need them."""
        if self._sampler is not None:
            return self._sampler(logits, words) if best is None else self._sampler(logits, None, best)
        (seat,) = self.seats
        known = () if words is None or words[0] is None else (words[0],)
        few = {} if best is None else {"best": best}
        token, logprobs = seat.sampler(logits, seat.history, *known, **few)
        seat.history.append(token)
        return token, logprobs

    def _told(self, tokens: mx.array, logprobs: mx.array) -> tuple[mx.array, ...] | None:
        tops = [seat.top for seat in self.seats if seat.top is not None]
        return top_logprobs(logprobs, tokens, max(tops)) if tops else None

    def _apart(self) -> None:
        """Histories and drawn tokens go back to their seats."""
        if self._drawn is None:
            return
        tokens, logprobs = self._drawn
        for row, seat in enumerate(self.seats):
            seat.drawn = tokens[row : row + 1], logprobs[row : row + 1]
        if self._sampler is not None:
            for seat, history in zip(self.seats, self._sampler.leave(), strict=True):
                seat.history = history

    def _join(self) -> None:
        """They come from the seats."""
        self._sampler = self._drawn = None
        if len(self.seats) > 1:
            self._sampler = RowsSampler([(seat.sampler, seat.history) for seat in self.seats])
        if self.seats:
            tokens, logprobs = zip(*(seat.drawn for seat in self.seats), strict=True)
            alone = len(self.seats) == 1
            self._drawn = (tokens[0], logprobs[0]) if alone else (mx.concatenate(tokens), mx.concatenate(logprobs))


def tell(tokens: mx.array, logprobs: mx.array, most: int) -> list[Told]:
    """Of tokens [B] and logprobs [B, V]: each one's log probability, and the `most` likeliest with theirs."""
    return _read(top_logprobs(logprobs, tokens, most), [most] * tokens.shape[0])


def _read(told: Sequence[mx.array], tops: Sequence[int | None]) -> list[Told | None]:
    own, ids, values = (part.tolist() for part in told)
    found: list[Told | None] = []
    for row, top in enumerate(tops):
        likeliest = zip(ids[row][:top], values[row][:top], strict=True)
        # (those that a grammar or a bias forbids could not have come)
        kept = tuple(one for one in likeliest if one[1] > -math.inf)
        found.append(None if top is None else (own[row], kept))
    return found
