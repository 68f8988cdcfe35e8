"""Work shared out among the cores of a CPU: MLX runs an operation there on one core, but each stream on another.

Knows streams and how to cut a range. Knows no operation.
A lane is a stream; the first is the default one. What a lane computes has the bits that one core alone would give,
because only independent rows are shared out.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext

import mlx.core as mx

# Quantized weights, times rows, that are worth a lane of their own: 0.2 ms, where handing over takes 0.02 ms.
LEAST_SHARED = 2**18
_MOST = 16  # lanes; a decode step has no more work to share out


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# Unique per thread, as MLX's default streams are; without a thread of their own until something runs in them.
_OTHERS = [mx.new_thread_local_stream(mx.cpu) for _ in range(min(_cores(), _MOST) - 1)]


def in_lanes(compute: Callable[[slice], mx.array], count: int, *, least: int = 1) -> list[mx.array]:
    """compute(rows) for slices that cut `count` rows into about equal parts of at least `least`, each in its lane.

    compute has to make everything it needs of a slice itself, slices of weights too: what another lane makes is waited
    for. Returns one array a part, lazy as ever, in order.
    """
    parts = max(1, min(len(_OTHERS) + 1, count // max(least, 1)))
    cuts = [count * part // parts for part in range(parts + 1)]
    made = []
    for lane, (start, stop) in enumerate(zip(cuts, cuts[1:], strict=False)):
        with mx.stream(_OTHERS[lane - 1]) if lane else nullcontext():
            made.append(compute(slice(start, stop)))
    return made
