"""Earlier answers by their id, in memory, so that a request can go on from one: as many as there is room for.

Knows which answer went on from which, how many there are and how many bytes they take. Knows nothing of what is kept.
For one thread.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

MOST, MOST_BYTES = 2000, 256 * 2**20

_Value = TypeVar("_Value")


@dataclass
class _Entry(Generic[_Value]):
    """before: the id that it went on from. asked_for: whether its own id may still be asked for."""

    value: _Value
    nbytes: int
    before: str | None
    asked_for: bool = True


class Kept(Generic[_Value]):
    """What was used longest ago is dropped where there is no room. A conversation is used as a whole, and dropped from
    its end: what an answer went on from is there as long as it is."""

    def __init__(self, most: int = MOST, most_bytes: int = MOST_BYTES) -> None:
        """most: answers; most_bytes: of all together, as `add` was told."""
        self._most, self._most_bytes = most, most_bytes
        self._entries: OrderedDict[str, _Entry[_Value]] = OrderedDict()  # of a conversation the last answer first
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, name: str, value: _Value, nbytes: int, before: str | None = None) -> None:
        """Keeps an answer by an id that no other has. before: the id of the one that it goes on from; where that is
        gone, nothing is kept."""
        if before is not None and before not in self._entries:
            return
        self._entries[name] = _Entry(value, nbytes, before)
        self.nbytes += nbytes
        self._use(name)
        while self._entries and (len(self._entries) > self._most or self.nbytes > self._most_bytes):
            self._forget(next(iter(self._entries)))

    def get(self, name: str) -> _Value | None:
        """The answer of that id, None if it is not there (any more)."""
        entry = self._entries.get(name)
        return entry.value if entry is not None and entry.asked_for else None

    def until(self, name: str) -> list[_Value] | None:
        """All of a conversation up to the answer of that id, the first one first; None if that is not there."""
        if self.get(name) is None:
            return None
        self._use(name)
        return [self._entries[each].value for each in self._back(name)][::-1]

    def drop(self, name: str) -> bool:
        """Whether there was such an answer: it cannot be asked for any more. What goes on from it does not lose it."""
        if self.get(name) is None:
            return False
        self._entries[name].asked_for = False
        while not (entry := self._entries[name]).asked_for and not self._is_gone_on_from(name):
            self._forget(name)
            if entry.before is None:
                break
            name = entry.before
        return True

    def _is_gone_on_from(self, name: str) -> bool:
        return any(entry.before == name for entry in self._entries.values())

    def _back(self, name: str | None) -> Iterator[str]:
        while name is not None:
            yield name
            name = self._entries[name].before

    def _use(self, name: str) -> None:
        for each in list(self._back(name)):
            self._entries.move_to_end(each)

    def _forget(self, name: str) -> None:
        entry = self._entries.pop(name, None)
        self.nbytes -= 0 if entry is None else entry.nbytes
