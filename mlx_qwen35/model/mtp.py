"""The multi-token-prediction head: from a token and the hidden state before it to a guess at the token after it.

Knows its own layers. Embedding and output head are the main model's; when it is asked, and what becomes of its guesses,
is speculative/'s business.

    h [B, T, H]   of the main model after its final norm, at positions i
    e [B, T, H]   embeddings of the tokens at positions i + 1

    x = fc([norm(e) | norm(h)]);   x through one attention layer, at rotary positions i;   h' = norm(x)

and the main model's head makes of h' the logits of the tokens at i + 2. To guess further, h' takes the place of h.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from mlx_qwen35.cache import KVCache, StretchedKVCache
from mlx_qwen35.config import TextConfig
from mlx_qwen35.layers.around import Around
from mlx_qwen35.layers.linear import Linear
from mlx_qwen35.layers.norm import RMSNorm
from mlx_qwen35.layers.rope import RotaryEmbedding

from .decoder import DecoderLayer

PRIME_AT_ONCE = 512  # tokens of a prompt that are best given to a head in one call


class MTPHead(nn.Module):
    """Attention layers (published models have one) between a joint of embedding and hidden state and a norm."""

    def __init__(self, config: TextConfig, layers: int = 1):
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.fc = Linear(2 * hidden, hidden, bias=False)
        self.pre_fc_norm_embedding = RMSNorm(hidden, eps)
        self.pre_fc_norm_hidden = RMSNorm(hidden, eps)
        self.layers = [DecoderLayer(config, "full_attention") for _ in range(layers)]
        self.norm = RMSNorm(hidden, eps)
        self._rope = RotaryEmbedding(config.rope)

    def __call__(
        self,
        embeddings: mx.array,
        hidden: mx.array,
        positions: mx.array,
        caches: Sequence[KVCache | StretchedKVCache] | None = None,
    ) -> mx.array:
        """embeddings, hidden [B, T, H] as above -> h' [B, T, H]. positions [B, T] or [3, B, T]: of the hidden states.

        caches: one a layer, from `make_caches` or branched from those; what they hold comes before these T.
        """
        joined = mx.concatenate([self.pre_fc_norm_embedding(embeddings), self.pre_fc_norm_hidden(hidden)], axis=-1)
        x, added, rope = self.fc(joined), None, self._rope(positions)
        for layer, cache in zip(self.layers, caches or [None] * len(self.layers), strict=True):
            x, added = layer(x, Around(rope), cache, added)
        return self.norm.after(x, added)[1]

    def make_caches(self) -> list[KVCache]:
        return [KVCache() for _ in self.layers]
