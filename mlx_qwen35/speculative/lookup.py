"""What was said before as a draft: the longest end of the text that it has seen already, and how that went on.

Knows token ids. Knows no model, no cache and not what becomes of a draft.
A suffix automaton (Blumer et al. 1985) that grows by a token at a time: its states are sets of substrings that end at
the same places, the link of a state is that of the longest end of its substrings that ends elsewhere too. So the link
of the last state is the longest end of the whole text that was there before:

    text   a b c x a b c       last: the whole text       its link: "a b c", which ended at place 2: x a b c follow

A state has one way on, as a rule; ways beyond the first are a chain, and of states with many a dictionary. All of it
lies in packed arrays, some 45 bytes a token.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from itertools import islice
from typing import NamedTuple

LIMIT = 2**18  # tokens that a Lookup holds; beyond, it forgets the older half
_LINKS = 32  # states of a chain of links that are told of a later end: in periodic text a chain is as long as the text
_CHAIN = 8  # ways beyond the first that are searched one by one


class Match(NamedTuple):
    """length: tokens at the end of the text that were there before. place: of the last of them, there."""

    length: int
    place: int


NO_MATCH = Match(0, -1)


class Lookup:
    """All tokens of a text so far, and where the end of it was before. limit: of tokens that it holds.

    A separator is a place that nothing matches and no draft goes over: a picture's placeholders, or where another text
    begins.
    """

    def __init__(self, tokens: Iterable[int] = (), *, limit: int = LIMIT) -> None:
        self._limit = limit
        self._forget()
        self.extend(tokens)

    def _forget(self) -> None:
        self.tokens = array("i")  # those held; below 0: a separator
        self._links, self._lengths, self._ends = array("i", [-1]), array("i", [0]), array("i", [-1])  # of each state
        self._token, self._to = array("i", [-1]), array("i", [0])  # the first way on of each state; to 0: none
        self._more = array("i", [-1])  # the chain of the others, by their number
        self._more_token, self._more_to, self._more_next = array("i"), array("i"), array("i")
        self._wide: dict[int, dict[int, int]] = {0: {}}  # state: {token: number of the way}, of states with many
        self._last, self._match, self._separators = 0, NO_MATCH, 0

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def nbytes(self) -> int:
        """About what it takes."""
        arrays = (each for each in vars(self).values() if isinstance(each, array))
        return sum(each.itemsize * len(each) for each in arrays) + 100 * sum(map(len, self._wide.values()))

    @property
    def match(self) -> Match:
        """The longest end of the text that was there before, and where it ended last, as far as that is known."""
        return self._match

    def extend(self, tokens: Iterable[int]) -> None:
        """`add`, one after the other."""
        for token in tokens:
            self.add(token)

    def separate(self) -> None:
        """Nothing that follows goes on from what there is."""
        if self.tokens and self.tokens[-1] >= 0:
            self._separators += 1
            self._take(-self._separators)

    def add(self, token: int) -> None:
        """The next token of the text."""
        if len(self.tokens) >= self._limit:
            kept = self.tokens[-(self._limit // 2) :]
            self._forget()
            for old in kept:
                self.separate() if old < 0 else self._take(old)
        self._take(token)

    def after(self, token: int) -> Match:
        """What `match` were if this token came next; it is not added."""
        if token < 0 or not self.tokens:
            return NO_MATCH
        state = self._links[self._last]
        while state >= 0:
            found = self._way(state, token)
            if found:
                return Match(self._lengths[state] + 1, self._ends[found])
            state = self._links[state]
        return NO_MATCH

    def draft(self, match: Match, count: int, token: int | None = None) -> list[int]:
        """Up to `count` tokens that followed at a match; token: the one that `after` was asked about. A match that
        reaches into its own copy goes on with that, round and round."""
        found: list[int] = []
        length, place = len(self.tokens), match.place + 1
        while len(found) < count and match.length:
            at = place - length
            if at < 0:
                following = self.tokens[place]
            elif token is not None:
                following = token if at == 0 else found[at - 1]
            else:
                following = found[at]
            if following < 0:
                break
            found.append(following)
            place += 1
        return found

    def _take(self, token: int) -> None:
        links, lengths, ends, to = self._links, self._lengths, self._ends, self._to
        place, state = len(self.tokens), self._last
        self.tokens.append(token)
        new = self._state(lengths[state] + 1, place, 0)
        while state >= 0:
            if to[state] == 0:
                self._token[state], to[state] = token, new
            else:
                found = self._way(state, token)
                if found:
                    break
                self._branch(state, token, new)
            state = links[state]
        else:
            found = 0
        if found and lengths[found] != lengths[state] + 1:
            found = self._split(state, token, found)
        links[new] = found
        self._last = new
        self._match = Match(lengths[found], ends[found]) if found else NO_MATCH
        for _ in range(_LINKS):
            if found <= 0:
                break
            ends[found] = place
            found = links[found]

    def _split(self, state: int, token: int, found: int) -> int:
        """A state for those substrings of `found` that also end here, to which `token` leads from `state` on."""
        links, lengths = self._links, self._lengths
        clone = self._state(lengths[state] + 1, self._ends[found], links[found])
        self._token[clone], self._to[clone] = self._token[found], self._to[found]
        way = self._more[found]
        while way >= 0:
            self._branch(clone, self._more_token[way], self._more_to[way])
            way = self._more_next[way]
        while state >= 0 and self._way(state, token) == found:
            self._redirect(state, token, clone)
            state = links[state]
        links[found] = clone
        return clone

    def _state(self, length: int, end: int, link: int) -> int:
        number = len(self._links)
        self._links.append(link)
        self._lengths.append(length)
        self._ends.append(end)
        self._token.append(-1)
        self._to.append(0)
        self._more.append(-1)
        return number

    def _way(self, state: int, token: int) -> int:
        """Where `token` leads from a state; 0: nowhere."""
        if self._token[state] == token and self._to[state]:
            return self._to[state]
        way = self._number(state, token)
        return self._more_to[way] if way >= 0 else 0

    def _number(self, state: int, token: int) -> int:
        """Of a way beyond the first; -1: there is none."""
        way = self._more[state]
        if way < 0:
            return way
        wide = self._wide.get(state)
        if wide is not None:
            return wide.get(token, -1)
        tokens, following = self._more_token, self._more_next
        while way >= 0 and tokens[way] != token:
            way = following[way]
        return way

    def _branch(self, state: int, token: int, to: int) -> None:
        """One more way beyond the first."""
        number, first = len(self._more_to), self._more[state]
        self._more_token.append(token)
        self._more_to.append(to)
        self._more_next.append(first)
        self._more[state] = number
        wide = self._wide.get(state)
        if wide is not None:
            wide[token] = number
        elif first >= 0 and self._is_long(first):
            self._wide[state] = dict(self._chain(number))

    def _is_long(self, way: int) -> bool:
        return sum(1 for _ in islice(self._chain(way), _CHAIN)) == _CHAIN

    def _chain(self, way: int) -> Iterable[tuple[int, int]]:
        while way >= 0:
            yield self._more_token[way], way
            way = self._more_next[way]

    def _redirect(self, state: int, token: int, to: int) -> None:
        if self._token[state] == token:
            self._to[state] = to
        else:
            self._more_to[self._number(state, token)] = to
