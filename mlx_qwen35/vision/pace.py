"""When the frames of a video are shown: at an even rate, or each at a time of its own.

Knows numbers and seconds. Knows nothing of files or pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

_NTSC = Fraction(1001, 1000)  # how much slower than its round number a rate of television is


@dataclass(frozen=True)
class Pace:
    """fps: frames a second, of an uneven video its mean. times: seconds of each frame since the first; None: frame i is
    shown at i / fps."""

    fps: float
    times: tuple[float, ...] | None = None

    def at(self, index: int) -> float:
        """The seconds from the first frame to this one."""
        return index / self.fps if self.times is None else self.times[index]


def read_pace(times: Sequence[Fraction], stated: Fraction | None, tick: Fraction) -> Pace | None:
    """The pace of frames that are shown at `times` (seconds, rising), in a file that states a mean rate (None: it does
    not) and counts time in ticks.

    What a file states is often wrong: recordings of a screen have no even rate, and the rate of a transport stream is
    guessed. So the rate counts where the frames keep it, within a tick; so does a usual one that they keep without
    being told. Frames that keep none have their own times, and the mean rate of these. No times: the rate that is
    stated, or None.
    """
    if len(times) < 2:
        return None if stated is None and not times else Pace(float(stated or 1))
    since = [time - times[0] for time in times]
    mean = (len(since) - 1) / since[-1]
    for rate in (stated, Fraction(round(mean)), round(mean * _NTSC) / _NTSC):
        if rate and all(abs(time - number / rate) <= tick for number, time in enumerate(since)):
            return Pace(float(rate))
    return Pace(float(mean), tuple(map(float, since)))
