"""What a model sees between the words: placed tokens, and the features that stand for their pixels.

Knows which rows of features go where among the embeddings. Knows neither pixels nor how features come about.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from .positions import Placement


@dataclass(frozen=True)
class Sight:
    """B rows of T tokens with their images and videos; sight[start:stop] is that of some of the tokens, cut anywhere.

    features: of each row, for each image or video that the tokens need: the number of its first feature among those of
    the row, as `placement` counts them, and the features [placeholders, H].
    """

    placement: Placement
    features: Sequence[Sequence[tuple[int, mx.array]]]

    def __getitem__(self, part: slice) -> Sight:
        return Sight(self.placement[part], self.features)

    @property
    def shape(self) -> tuple[int, ...]:
        """(B, T)."""
        return self.placement.features.shape

    @property
    def positions(self) -> mx.array:
        """Time, row and column of each token, [3, B, T] int32."""
        return mx.array(self.placement.positions[:, :, :-1])

    @property
    def next_positions(self) -> list[int]:
        """Where a text token after the last would stand, one a row; after a cut inside an image, where that began."""
        return self.placement.positions[0, :, -1].tolist()

    def written_into(self, x: mx.array) -> mx.array:
        """Embeddings x [B, T, H] with features in place of the placeholders'."""
        width = x.shape[-1]
        places, values = [], []
        for row, media in enumerate(self.features):
            taken = self.placement.features[row]
            for first, features in media:
                at = np.flatnonzero((taken >= first) & (taken < first + len(features)))
                if len(at):
                    places.append(row * len(taken) + at)
                    values.append(features[int(taken[at[0]]) - first : int(taken[at[-1]]) - first + 1])
        if not places:
            return x
        flat = x.reshape(-1, width)
        flat[mx.array(np.concatenate(places).astype(np.int32))] = mx.concatenate(values).astype(x.dtype)
        return flat.reshape(x.shape)
