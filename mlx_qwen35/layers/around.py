"""What a layer is told of the tokens of a call beside what they hold: where they stand, and which are none."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx


@dataclass(frozen=True)
class Around:
    """rope: cosines and sines of the call's T positions, [.., T, rotary]. Which positions are tokens and not padding
    (None: all), readable [B, S]: of all up to the last of the call; present [B, T]: of those of the call."""

    rope: tuple[mx.array, mx.array]
    readable: mx.array | None = None
    present: mx.array | None = None

    def part(self, start: int, stop: int) -> Around:
        """That of the call's tokens `start` to `stop`."""
        readable = self.readable
        if readable is not None:
            readable = readable[:, : readable.shape[1] - self.rope[0].shape[-2] + stop]
        return Around(
            (self.rope[0][..., start:stop, :], self.rope[1][..., start:stop, :]),
            readable,
            None if self.present is None else self.present[:, start:stop],
        )
