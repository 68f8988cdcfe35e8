"""Rotary positions: partial, interleaved over three axes (time, height, width), with YaRN.

Knows frequencies and angles. Knows no attention; text passes one position per token, pictures three.
"""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np

from ..config import Rope, Yarn
from ..kernels.angles import angles


class RotaryEmbedding:
    """Cosines and sines of positions; holds no parameters."""

    unfused = False  # MLX's operations take the kernel's place: it was found wrong here, or is not wanted

    def __init__(self, rope: Rope):
        self.half = half = rope.rotary_dim // 2  # pairs of values that turn
        inv_freq = rope.theta ** (-np.arange(half) / half)
        self.factor = 1.0
        if rope.yarn is not None:
            inv_freq = _yarn_frequencies(inv_freq, rope.yarn, rope)
            self.factor = _yarn_attention_factor(rope.yarn)
        self._inv_freq = mx.array(inv_freq.astype(np.float32))
        # Which axis turns frequency j, for sections (11, 11, 10):  j = 0 1 2 3 4 5 ... 30 31
        #                                                    axis = t h w t h w ...  t  h
        axis = np.zeros(half, np.int32)
        for dim in (1, 2):
            axis[dim : 3 * rope.mrope_section[dim] : 3] = dim
        self._axis = mx.array(axis)

    def __call__(self, positions: mx.array) -> tuple[mx.array, mx.array]:
        """positions [B, T], or [3, B, T] for (t, h, w) -> cos, sin [B, 1, T, rotary_dim / 2], float32."""
        return angles(positions, self._inv_freq, self._axis, self.factor, plain=self.unfused)


def _yarn_frequencies(inv_freq: np.ndarray, yarn: Yarn, rope: Rope) -> np.ndarray:
    """Frequencies that turn often are kept, slow ones divided by the factor, with a ramp between (transformers)."""

    def frequency_with(turns: float) -> float:
        """The (fractional) index of the frequency that makes `turns` turns over the original context."""
        wavelengths = math.log(yarn.original_max_position_embeddings / (turns * 2 * math.pi))
        return rope.rotary_dim * wavelengths / (2 * math.log(rope.theta))

    low, high = frequency_with(yarn.beta_fast), frequency_with(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.rotary_dim - 1)
    ramp = np.clip((np.arange(len(inv_freq)) - low) / (high - low if high != low else 0.001), 0, 1)
    return inv_freq * (1 - ramp) + inv_freq / yarn.factor * ramp


def _yarn_attention_factor(yarn: Yarn) -> float:
    """The factor on cosines and sines, that is on both queries and keys (transformers)."""

    def scale(m: float) -> float:
        return 1.0 if yarn.factor <= 1 else 0.1 * m * math.log(yarn.factor) + 1.0

    if yarn.attention_factor is not None:
        return yarn.attention_factor
    if yarn.mscale and yarn.mscale_all_dim:
        return scale(yarn.mscale) / scale(yarn.mscale_all_dim)
    return scale(1.0)
