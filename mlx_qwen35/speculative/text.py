"""What was said in a conversation, kept from one answer to the next: what copies are made from.

Knows the tokens of prompts and answers, and which of them a Lookup has. Knows no sessions: a text is found again by its
own beginning, whichever session or file it came with.
"""

from __future__ import annotations

import weakref
from array import array
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np

from mlx_qwen35.speculative.copying import Copying
from mlx_qwen35.speculative.lookup import LIMIT, Lookup, Match

if TYPE_CHECKING:
    from mlx_qwen35.model import Model

_FREE = 4  # texts that are kept for the next answer
_FREE_TOKENS = 2 * LIMIT  # of all of them
_AGAIN = 64  # tokens before a place where a text parts from what was said, that are said again
_Kept = tuple["Lookup", array, Copying]


class Text:
    """A prompt and what was said after it. gaps: tokens that stand for something else, as a picture's placeholders do.

    fresh: nothing that was said in other answers is known, so that copies hang on these tokens alone.
    """

    def __init__(
        self, model: Model, tokens: Sequence[int], gaps: Collection[int] = (), *, fresh: bool = False
    ) -> None:
        self._kept = Texts.of(model)
        self._tokens, self._gaps, self._fresh = tokens, frozenset(gaps), fresh
        self._new: list[int] = []  # said, and not in the lookup yet
        self._whole: array | None = None  # of the prompt and what the lookup has of the answer; None: nothing yet
        self._lookup, self.copying = Lookup(), Copying(steady=fresh)

    def is_known(self, most: int) -> bool:
        """Whether `match` takes in no more than so many tokens of the prompt."""
        return self._whole is not None or len(self._tokens) <= most

    def add(self, token: int) -> None:
        """The next token of the answer, which is certain."""
        self._new.append(token)

    @property
    def match(self) -> Match:
        """The longest end that was there before."""
        return self._taken_in().match

    def after(self, token: int) -> Match:
        """What `match` were with one more token."""
        return self._taken_in().after(token)

    def draft(self, match: Match, count: int, token: int | None = None) -> list[int]:
        """As Lookup.draft."""
        return self._lookup.draft(match, count, token)

    def close(self) -> None:
        """The answer has ended: the next one finds what was said."""
        if self._whole is not None and not self._fresh:
            self._taken_in()
            self._kept.keep((self._lookup, self._whole, self.copying))
        self._whole, self._tokens, self._new, self._lookup = None, (), [], Lookup()

    def _taken_in(self) -> Lookup:
        if self._whole is None:
            self._begin()
        if self._new:
            new, self._new = self._new, []
            self._whole.extend(new)
            self._say(new)
        return self._lookup

    def _begin(self) -> None:
        whole, again = array("i", self._tokens), 0
        found = None if self._fresh else self._kept.take(whole)
        if found is not None:
            self._lookup, before, self.copying = found
            common = common_length(before, whole)
            if common < len(before):  # it went on otherwise there
                self._lookup.separate()
                again = max(0, common - _AGAIN)
            else:
                again = common
        self._whole, self._tokens = whole, ()
        self._say(whole[again:].tolist())

    def _say(self, tokens: list[int]) -> None:
        if self._gaps.isdisjoint(tokens):
            self._lookup.extend(tokens)
            return
        for token in tokens:
            self._lookup.separate() if token in self._gaps else self._lookup.add(token)


class Texts:
    """What a model's answers left. Not for two threads at once, as the model itself."""

    _of: dict[int, Texts] = {}

    @classmethod
    def of(cls, model: Model) -> Texts:
        """Those of a model, as long as there is one."""
        key = id(model)
        if key not in cls._of:
            cls._of[key] = cls()
            weakref.finalize(model, cls._of.pop, key, None)
        return cls._of[key]

    def __init__(self) -> None:
        self._free: list[_Kept] = []

    def clear(self) -> None:
        """What was said before is not known any more."""
        self._free = []

    def keep(self, text: _Kept) -> None:
        self._free = [*self._free, text][-_FREE:]
        while len(self._free) > 1 and sum(len(lookup) for lookup, _, _ in self._free) > _FREE_TOKENS:
            del self._free[0]

    def take(self, tokens: array) -> _Kept | None:
        """The one that has most of how these begin, if that is most of it; it is another's no more."""
        best = max(self._free, key=lambda kept: common_length(kept[1], tokens), default=None)
        if best is None or 2 * common_length(best[1], tokens) < len(best[1]):
            return None
        self._free = [kept for kept in self._free if kept is not best]
        return best


def common_length(left: array, right: array) -> int:
    """How many tokens at the beginning are the same."""
    least = min(len(left), len(right))
    different = np.flatnonzero(np.frombuffer(left, np.int32, least) != np.frombuffer(right, np.int32, least))
    return int(different[0]) if different.size else least
