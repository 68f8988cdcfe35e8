"""Features of pictures and videos that were encoded before, so that no later turn encodes them again.

Knows keys, arrays and a number of bytes. Knows neither pixels nor how features come about.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, MutableMapping

import mlx.core as mx

MOST_BYTES = 512 << 20  # 260,000 placeholders of the smallest model in 16 bits, 65,000 of the largest


class FeatureStore(MutableMapping[str, mx.array]):
    """Features [placeholders, H] by `Media.key`, at most `most_bytes` of them: what was used longest ago goes first.

    For one model: the key says nothing of the weights. What alone is larger than most_bytes is not kept, so that a key
    that was just set may be missing.
    """

    def __init__(self, *, most_bytes: int = MOST_BYTES) -> None:
        if most_bytes < 0:
            raise ValueError(f"most_bytes is {most_bytes}; give 0 (keep nothing) or more")
        self.most_bytes = most_bytes
        self.nbytes = 0
        self._kept: OrderedDict[str, mx.array] = OrderedDict()  # the one used last is the last

    def __getitem__(self, key: str) -> mx.array:
        features = self._kept[key]
        self._kept.move_to_end(key)
        return features

    def __setitem__(self, key: str, features: mx.array) -> None:
        if features.nbytes > self.most_bytes:
            self.pop(key, None)
            return
        # Features of pictures that were encoded together share one buffer: a part of it would keep all of it.
        features = mx.contiguous(features)
        mx.eval(features)
        self.pop(key, None)
        self._kept[key] = features
        self.nbytes += features.nbytes
        self.give_up(self.nbytes - self.most_bytes)

    def give_up(self, amount: int) -> None:
        """Frees `amount` bytes, or all there are: what was used longest ago goes first."""
        left = self.nbytes - amount
        while self._kept and self.nbytes > left:
            del self[next(iter(self._kept))]

    def __delitem__(self, key: str) -> None:
        self.nbytes -= self._kept.pop(key).nbytes

    def __contains__(self, key: object) -> bool:
        """Does not count as a use."""
        return key in self._kept

    def __iter__(self) -> Iterator[str]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)
