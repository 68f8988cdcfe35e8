"""How much of a prompt is computed already or soon will be, and by which path of the tree.

Knows paths, their points and tokens. Keeps nothing, and computes nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlx_qwen35.session.paths import SHARE_FROM, Path
from mlx_qwen35.session.tree import Tree

if TYPE_CHECKING:
    import numpy as np

    from mlx_qwen35.session.asked import Asked
    from mlx_qwen35.session.timeline import Timeline

WORTH = 64  # tokens, fewer of which are sooner computed than waited for, copied or read
_WAIT = 4  # times as many tokens may be waited for as there are to gain


def best(tree: Tree[Path], asked: Asked) -> tuple[Path | None, int]:
    """The path with the furthest point of this beginning, and the point; of several the one that costs least."""
    found, furthest, rank = None, 0, -1
    for path, shared in tree.meeting(asked.key):
        most = min(shared, len(asked.key) - 1)
        if most < max(furthest, 1):
            break
        point = path.point(most)
        cheap = 0 if not point else 2 if may_be_taken(path, point) else int(path.can_share(point))
        if (point, cheap) > (furthest, rank) and point:
            found, furthest, rank = path, point, cheap
    return found, furthest


def may_be_taken(path: Path, point: int) -> bool:
    """Whether a path may go on from a point in place of a copy: nobody uses it, and nothing would be lost, or
    nothing but an answer of a path that is too long to be copied."""
    if path.asked is not None or path.session.in_use:
        return False
    if point == len(path.session.tokens):
        return True
    met = [mark.offset for mark in path.session.marks if mark.met]
    return point > SHARE_FROM and met[-1:] == [point]


def coming(tree: Tree[Path], asked: Asked, held: int) -> Timeline | None:
    """The session of a row that will soon have so much more of this beginning than what is held that it is worth
    waiting; it takes a snapshot there. None: there is none."""
    for path, shared in tree.meeting(asked.key):
        if shared - held < WORTH:
            return None
        if path.asked is None or not path.is_sound:
            continue
        offset, length = path.session.cache.offset, len(path.asked.key)
        most = min(shared, len(asked.key) - 1)
        if offset >= min(most, length):
            continue
        place = max((at for at in path.session.meetings if offset < at <= most), default=0)
        asking = most - place >= WORTH
        place = most if asking else place
        gain = place - held
        if gain >= WORTH and gain * _WAIT >= place - offset:
            if asking:
                path.session.meet(place)
            return path.session
    return None


def partings(tree: Tree[Path], asked: Asked) -> list[int]:
    """Where others may go on from this prompt that it has no turn for: where it parts from what was computed, as
    the next one may, and where the answer begins to a prompt that came as ids."""
    last = len(asked.key) - 1
    shared = next((shared for _, shared in tree.meeting(asked.key)), 0)
    return [min(shared, last)] + ([] if asked.prompt.turns else [last])


def known(tree: Tree[Path], path: Path, key: np.ndarray) -> set[int]:
    """Points of a key that other paths have."""
    return {
        point
        for other, shared in tree.meeting(key)
        if other is not path and not other.guest
        for point in other.points()
        if point <= shared
    }
