"""What the first maps of half a layer meet: a sum of two, and its norm, made by whoever asks for it first.

Knows a norm and two arrays. Does not know what the maps mean.
"""

from __future__ import annotations

import mlx.core as mx

from ..kernels.backend import on_gpu
from ..kernels.norm_matmul import MOST_ROWS, norm_matmul
from ..kernels.weights import Weights
from .norm import RMSNorm


class Summed:
    """x + added, and norm(x + added). A few rows on a GPU have both from the launch of the product that meets them
    (`through`), and anything else from `norm.after`."""

    def __init__(self, norm: RMSNorm, x: mx.array, added: mx.array | None):
        """x, added (None: nothing) [B, T, H]."""
        self._norm, self._x, self._added = norm, x, added
        self._made: tuple[mx.array, mx.array] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self._x.shape

    @property
    def total(self) -> mx.array:
        """x + added."""
        return self._x if self._added is None else self._both()[0]

    @property
    def normed(self) -> mx.array:
        return self._both()[1]

    def through(self, gate: Weights | None, up: Weights | None = None, *, gated: bool = False) -> mx.array | None:
        """The norm through a matrix, or where it is to be `gated` silu(gate norm) * (up norm), [B, T, out].

        None where no kernel does that; then `normed` goes through MLX's products.
        """
        rows, width = self._x.size // self._x.shape[-1], self._x.shape[-1]
        if not on_gpu() or rows > MOST_ROWS or gate is None or (gated and up is None) or not self._norm.meets_products:
            return None
        flat = [None if a is None else a.reshape(rows, width) for a in (self._x, self._added)]
        *both, made = norm_matmul(*flat, self._norm.weight, gate, up if gated else None, eps=self._norm.eps)
        if self._made is None:
            self._made = tuple(a.reshape(self._x.shape) for a in both)
        return made.reshape(*self._x.shape[:-1], -1)

    def _both(self) -> tuple[mx.array, mx.array]:
        if self._made is None:
            self._made = self._norm.after(self._x, self._added)
        return self._made


def array_of(x: mx.array | Summed) -> mx.array:
    """What a layer's maps meet, as an array."""
    return x.normed if isinstance(x, Summed) else x
