"""How many layers a few tokens go through before anybody looks whether their experts were there.

Knows chances and seconds. Knows no experts, no arrays and no device.

To look takes a stop: what is queued is waited for, and nothing computes until the next layer is queued. Where experts
lie in memory there was no need to. So layers are queued in windows, with the slots that experts have, and looked at
afterwards; what lies behind a layer that lacked one was computed in vain, and is computed again:

    layer      0   1   2   3 | 4   5   6   7          4 lay in memory, 5 lacked an expert:
                                   x              ->  5's experts once more, then from 6 on
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

STOP = 2e-4  # seconds that a stop takes, about: measured on two Linux machines, not on a Mac
_NEWEST = 1 / 16  # how much of a chance the newest look is
_NEWEST_TIME = 1 / 8


class Chances:
    """What layers lacked lately, how long one takes, and how many are best queued at once."""

    def __init__(self, streamed: Iterable[int] = ()):
        """streamed: numbers of layers; others lack nothing, ever."""
        self._chances = dict.fromkeys(streamed, 0.0)  # that a layer lacks nothing
        self._layer_seconds = 0.0

    def looked(self, layer: int, lacked: bool) -> None:
        """At a layer, before or after it was computed."""
        before = self._chances.get(layer, 0.0)
        self._chances[layer] = before + ((not lacked) - before) * _NEWEST

    def took(self, seconds: float, layers: int) -> None:
        """So long for so many layers of a few tokens, not counting what was waited for."""
        newest = seconds / layers
        self._layer_seconds += (newest - self._layer_seconds) * (_NEWEST_TIME if self._layer_seconds else 1.0)

    def length(self, layers: Sequence[int], stop: float = STOP) -> int:
        """How many of these layers, the next ones in their order, are best queued before a look: one at least.

        A further one saves a stop if those before it lacked nothing; else it is computed in vain.
        """
        together, count = 1.0, 1
        for layer in layers[:-1]:
            together *= self._chances.get(layer, 1.0)
            if together * stop <= (1 - together) * self._layer_seconds:
                break
            count += 1
        return count
