"""The face of a layer's experts that a pool knows; streamed.py has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import mlx.core as mx

from .residency import Residency


class Bank(Protocol):
    """The experts of one layer, some of which are in memory."""

    layer: int
    residency: Residency

    def had(self, expert_ids: mx.array) -> bool:
        """Whether all that was hoped for was there; then it counts as asked for, else nothing is changed."""
        ...

    def release(self) -> None:
        """Nothing waits to compute with what was demanded any more."""
        ...

    def forget(self) -> None:
        """After an error or interrupt, when all reads have ended: count no slot, their content is in doubt."""
        ...

    def drop_ahead(self) -> None:
        """Reads ahead that nobody asked for are not worth waiting for."""
        ...

    def warm(self, experts: Sequence[int]) -> int:
        """Read experts, the most valuable first, into free slots; in a turn. -> how many."""
        ...
