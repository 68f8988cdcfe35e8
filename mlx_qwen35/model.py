"""The text model: embedding, layers, norm, head.

Knows how the layers are joined and what a call needs to know about positions and padding.
Knows no files, no strings and no sampling.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from .cache import Cache, DeltaState, KVCache
from .config import ModelConfig, TextConfig
from .experts.resident import ResidentExperts
from .layers.attention import GatedAttention
from .layers.delta_net import GatedDeltaNet
from .layers.mlp import MLP
from .layers.moe import SparseMoE
from .layers.norm import RMSNorm
from .layers.rope import RotaryEmbedding


class DecoderLayer(nn.Module):
    """x += mixer(norm(x)); x += ffn(norm(x)). The mixer is attention or a delta net, the ffn dense or experts."""

    def __init__(self, config: TextConfig, kind: str):
        super().__init__()
        self.is_attention = kind == "full_attention"
        if self.is_attention:
            self.self_attn = GatedAttention(config)
        else:
            self.linear_attn = GatedDeltaNet(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = _feed_forward(config)

    def __call__(
        self,
        x: mx.array,
        rope: tuple[mx.array, mx.array],
        cache: KVCache | DeltaState | None,
        readable: mx.array | None,
        present: mx.array | None,
    ) -> mx.array:
        """x [B, T, H] -> [B, T, H]. Which positions are tokens and not padding (None: all), readable [B, S]: of all up
        to the last of x; present [B, T]: of those of x."""
        h = self.input_layernorm(x)
        if self.is_attention:
            x = x + self.self_attn(h, rope, cache, readable)
        else:
            x = x + self.linear_attn(h, cache, present)
        return x + self.mlp(self.post_attention_layernorm(x))


class Model(nn.Module):
    """A Qwen3.5 text model. Computes in the dtype of its weights; softmax and delta states are float32."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        text = config.text
        self.config = config
        self.embed_tokens = nn.Embedding(text.vocab_size, text.hidden_size)
        self.layers = [DecoderLayer(text, kind) for kind in text.layer_types]
        self.norm = RMSNorm(text.hidden_size, text.rms_norm_eps)
        if not text.tie_word_embeddings:
            self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self._rope = RotaryEmbedding(text.rope)

    def __call__(self, tokens: mx.array, cache: Cache | None = None) -> mx.array:
        """tokens [B, T] int -> logits [B, T, vocab]; with a cache the tokens follow those it has seen."""
        return self.head(self.hidden(tokens, cache))

    def hidden(self, tokens: mx.array, cache: Cache | None = None) -> mx.array:
        """tokens [B, T] int -> hidden states after the final norm [B, T, H]."""
        if tokens.ndim != 2 or tokens.shape[1] == 0:
            raise ValueError(f"tokens must be [batch, length] with at least one token, not {list(tokens.shape)}")
        length = tokens.shape[1]
        start = cache.offset if cache is not None else 0
        # [B, S], [B, T]: masks where there is padding to hide; text has one position per token: rope gets [B or 1, T].
        readable = present = None
        positions = mx.arange(start, start + length)[None]
        if cache is not None:
            positions = positions + cache.rope_delta
            if cache.left_padding is not None:
                padding = cache.left_padding[:, None]
                readable = mx.arange(start + length) >= padding
                if start < cache.longest_padding:
                    present = readable[:, start:]
                positions = mx.maximum(positions - padding, 0)
        rope = self._rope(positions)
        # An embedding in one of the mx modes comes out in bfloat16, whatever the model computes in.
        x = self.embed_tokens(tokens).astype(self.norm.weight.dtype)
        states = cache.layers if cache is not None else [None] * len(self.layers)
        for layer, state in zip(self.layers, states, strict=True):
            x = layer(x, rope, state, readable, present)
        if cache is not None:
            cache.offset += length
        return self.norm(x)

    def head(self, hidden: mx.array) -> mx.array:
        """Hidden states [.., H] -> logits [.., vocab]."""
        if self.config.text.tie_word_embeddings:
            return self.embed_tokens.as_linear(hidden)
        return self.lm_head(hidden)

    def make_cache(self, batch: int = 1, left_padding: Sequence[int] | None = None) -> Cache:
        """An empty cache for `batch` sequences; left_padding[b]: padding tokens at the start of row b."""
        if left_padding is not None and (len(left_padding) != batch or min(left_padding, default=0) < 0):
            raise ValueError(f"left_padding must give a count >= 0 for each of {batch} rows, not {left_padding}")
        kinds = self.config.text.layer_types
        layers = [KVCache() if kind == "full_attention" else DeltaState() for kind in kinds]
        return Cache(layers, left_padding=left_padding)


def _feed_forward(config: TextConfig) -> nn.Module:
    if config.moe is None:
        return MLP(config.hidden_size, config.intermediate_size)
    moe = config.moe
    return SparseMoE(
        config.hidden_size, moe, ResidentExperts(moe.num_experts, config.hidden_size, moe.intermediate_size)
    )
