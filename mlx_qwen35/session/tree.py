"""Which sequences begin alike: a radix tree over what prompts are made of.

Knows keys: arrays of whole numbers that stand for tokens and pictures. Knows nothing of caches or of what lies where a
sequence ends.

    system, tools ─┬─ user: what is ... ── answer
                   └─ user: how many ─┬─ answer
                                      └─ answer, user: and ...
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np

if TYPE_CHECKING:
    from mlx_qwen35.vision.media import Media

Owner = TypeVar("Owner", bound=Hashable)


def key_of(tokens: Sequence[int] | np.ndarray, shown: Sequence[tuple[int, Media | str]] = ()) -> np.ndarray:
    """What tells one beginning from another, [T] int64: token ids, and a number below zero where the placeholders of an
    image or video begin, which stands for its pixels. shown: where each begins, and the medium or its key."""
    key = np.array(tokens, np.int64)
    for start, medium in shown:
        if start < len(key):
            key[start] = -1 - int((medium if isinstance(medium, str) else medium.key)[:15], 16)
    return key


def common(left: np.ndarray, right: np.ndarray) -> int:
    """How many numbers at the beginning are the same."""
    length = min(len(left), len(right))
    other = left[:length] != right[:length]
    first = int(other.argmax()) if length else 0
    return first if length and other[first] else length


class _Node:
    """edge: the numbers from the node above to here; ends: whose sequence ends here."""

    __slots__ = ("edge", "children", "ends")

    def __init__(self, edge: np.ndarray) -> None:
        self.edge = edge
        self.children: dict[int, _Node] = {}
        self.ends: dict[Hashable, None] = {}


class Tree(Generic[Owner]):
    """The sequences of some owners, one each. Every change of shape is one assignment, so that an interrupt leaves it
    whole."""

    def __init__(self) -> None:
        self._root = _Node(np.empty(0, np.int64))
        self._keys: dict[Owner, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[Owner]:
        return iter(list(self._keys))

    def __contains__(self, owner: Owner) -> bool:
        return owner in self._keys

    def key(self, owner: Owner) -> np.ndarray:
        return self._keys[owner]

    def put(self, owner: Owner, key: np.ndarray) -> None:
        """The sequence of an owner, in place of the one it may have."""
        self.remove(owner)
        self._keys[owner] = key
        node, at = self._root, 0
        while at < len(key):
            child = node.children.get(int(key[at]))
            if child is None:
                leaf = _Node(key[at:].copy())
                leaf.ends[owner] = None
                node.children[int(key[at])] = leaf
                return
            same = common(child.edge, key[at:])
            if same < len(child.edge):
                upper, lower = _Node(child.edge[:same].copy()), _Node(child.edge[same:].copy())
                lower.children, lower.ends = child.children, child.ends
                upper.children[int(lower.edge[0])] = lower
                node.children[int(key[at])] = child = upper
            node, at = child, at + same
        node.ends[owner] = None

    def remove(self, owner: Owner) -> None:
        """Forget an owner, if it is there."""
        key = self._keys.get(owner)
        if key is None:
            return
        way, at = [self._root], 0
        while at < len(key) and (child := way[-1].children.get(int(key[at]))) is not None:
            way.append(child)
            at += len(child.edge)
        way[-1].ends.pop(owner, None)
        self._keys.pop(owner, None)
        for above, node in zip(way[-2::-1], way[:0:-1], strict=True):  # from the end to the root
            first = int(node.edge[0])
            if node.ends or len(node.children) > 1:
                break
            if not node.children:
                del above.children[first]
                continue
            (lower,) = node.children.values()  # one way on, and nobody ends here: one edge
            joined = _Node(np.concatenate([node.edge, lower.edge]))
            joined.children, joined.ends = lower.children, lower.ends
            above.children[first] = joined
            break

    def meeting(self, key: np.ndarray) -> Iterator[tuple[Owner, int]]:
        """Every owner, and with how many numbers its sequence begins as `key` does; those with most come first."""
        node, at, groups = self._root, 0, []
        while True:
            child = node.children.get(int(key[at])) if at < len(key) else None
            groups.append((at, list(node.ends), [other for other in node.children.values() if other is not child]))
            if child is None:
                break
            same = common(child.edge, key[at:])
            at += same
            if same < len(child.edge):
                groups.append((at, [], [child]))
                break
            node = child
        for shared, ends, below in reversed(groups):
            for owner in ends:
                yield owner, shared
            while below:
                node = below.pop()
                below += node.children.values()
                for owner in list(node.ends):
                    yield owner, shared
