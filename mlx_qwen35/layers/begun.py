"""What a CPU computes while the rest of a step is still being queued.

Knows devices and arrays. Knows no layers. A step of a small model is a thousand operations of microseconds: to queue
them takes as long as to compute them, and the one goes on beside the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress

import mlx.core as mx

from ..kernels.few_rows import MOST_ROWS

_NARROW = 1024  # values of a row from which on all cores share products out, which are then most of the time


def begin(x: mx.array, made: Callable[[], Iterable[mx.array]]) -> None:
    """On a CPU and where x [B, T, H] is of a few tokens of a small model: have what `made` gives computed from now
    on."""
    width = x.shape[-1]
    if width < _NARROW and x.size <= MOST_ROWS * width and mx.default_device().type == mx.cpu:
        with suppress(ValueError):  # inside of mx.compile there is nothing to be computed
            mx.async_eval(*made())
