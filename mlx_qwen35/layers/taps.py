"""Outputs of some layers of a model, as a call leaves them: what a block drafter reads. Knows numbers of layers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import mlx.core as mx


class Taps:
    """Of one call. layers: whose outputs are wanted, from 0."""

    def __init__(self, layers: Iterable[int]) -> None:
        self.layers = frozenset(layers)
        self._found: dict[int, mx.array] = {}

    def met(self, number: int, x: mx.array, added: mx.array | None) -> None:
        """What came out of layer `number`, as two parts of a sum [B, T, H]; in place of what did before."""
        if number in self.layers:
            self._found[number] = x if added is None else x + added

    def of(self, layers: Sequence[int]) -> mx.array:
        """Side by side, [B, T, len(layers) * H]; all were wanted."""
        return mx.concatenate([self._found[number] for number in layers], axis=-1)
