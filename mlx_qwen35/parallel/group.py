"""The places where ranks meet: a sum, a message to a neighbour; and what that came to.

Knows MLX's groups. Knows no layers.

A few rows are left lazy; many are computed before they are sent and are waited for, so that a rank's progress says
what it is at (progress.py).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import mlx.core as mx

from mlx_qwen35.parallel.progress import Progress

_TRIES = 12
FEW = 64  # rows, which are summed in float32 whatever is computed in


@dataclass
class Traffic:
    """Sums and sends that were asked for, and the bytes of their arrays; a send counts where it is sent."""

    sums: int = 0
    sends: int = 0
    nbytes: int = 0

    @property
    def messages(self) -> int:
        return self.sums + self.sends


class Group:
    """`size` ranks, of which this is one. alike: all have the same chip, and so make the same bits of the same numbers.
    """

    def __init__(self, group: mx.distributed.Group, progress: Progress) -> None:
        self._group, self.progress = group, progress
        self.rank, self.size = group.rank(), group.size()
        self.traffic = Traffic()
        self.alike = True

    def sum(self, x: mx.array) -> mx.array:
        """Of all ranks' arrays of one shape; the same bits on each."""
        self.traffic.sums += 1
        self.traffic.nbytes += x.nbytes
        many = x.size > FEW * x.shape[-1]
        if many:
            self.computed(x)
        self.progress.meet()
        total = mx.distributed.all_sum(x, group=self._group)
        if many:
            with self.progress.waiting():
                mx.eval(total)
        return total

    def send(self, x: mx.array, to: int) -> None:
        """Computed and sent on return. to: a neighbour; the last rank's is the first."""
        self.traffic.sends += 1
        self.traffic.nbytes += x.nbytes
        self.computed(x)
        with self.progress.waiting():
            mx.eval(mx.distributed.send(x, to, group=self._group))

    def receive(self, shape: Sequence[int], dtype: mx.Dtype, source: int) -> mx.array:
        """Computed on return."""
        x = mx.distributed.recv(list(shape), dtype, source, group=self._group)
        with self.progress.waiting():
            mx.eval(x)
        return x

    def computed(self, x: mx.array) -> None:
        """Compute it, which is progress."""
        mx.eval(x)
        self.progress.step()

    @contextmanager
    def led_by_rank_0(self) -> Iterator[None]:
        """Inside, all take rank 0's choice of experts."""
        before, self.alike = self.alike, False
        try:
            yield
        finally:
            self.alike = before

    def from_rank_0(self, expert_ids: mx.array, weights: mx.array) -> tuple[mx.array, mx.array]:
        """Who was chosen: where chips differ, and may choose differently where two tie, rank 0's choice."""
        if self.alike:
            return expert_ids, weights
        both = mx.concatenate([expert_ids.astype(mx.float32), weights.astype(mx.float32)], axis=-1)
        both = self.sum(both if self.rank == 0 else mx.zeros_like(both))
        ids, chosen = mx.split(both, 2, axis=-1)
        return ids.astype(expert_ids.dtype), chosen.astype(weights.dtype)

    def latency(self, nbytes: int) -> float:
        """Seconds that a sum of so many bytes takes: the median of some; all ranks have to ask for it."""
        x = mx.zeros((max(1, nbytes // 4),), mx.float32)
        found = []
        for _ in range(_TRIES):
            self.progress.meet()
            start = time.perf_counter()
            mx.eval(mx.distributed.all_sum(x, group=self._group))
            found.append(time.perf_counter() - start)
        return sorted(found)[len(found) // 2]
