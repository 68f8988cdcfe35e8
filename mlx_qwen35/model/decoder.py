"""One layer of the model: a mixer of tokens and a feed-forward block, each behind a norm and beside the residual.

Knows how the two halves are joined. Knows neither other layers nor where positions come from.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlx_qwen35.cache import DeltaState, KVCache, StretchedKVCache
from mlx_qwen35.config import TextConfig
from mlx_qwen35.experts.resident import ResidentExperts
from mlx_qwen35.layers.around import Around
from mlx_qwen35.layers.attention import GatedAttention
from mlx_qwen35.layers.begun import begin
from mlx_qwen35.layers.delta_net import GatedDeltaNet
from mlx_qwen35.layers.mlp import MLP
from mlx_qwen35.layers.moe import SparseMoE
from mlx_qwen35.layers.norm import RMSNorm
from mlx_qwen35.layers.summed import Summed

LayerCache = KVCache | StretchedKVCache | DeltaState


class DecoderLayer(nn.Module):
    """x += mixer(norm(x)); x += ffn(norm(x)). The mixer is attention or a delta net, the ffn dense or experts.

    The last sum is left to whoever comes next, which is a norm: a layer takes and gives x in two parts, whose sum it
    is, and a GPU adds them where it takes the norm. `together` is that sum where nothing follows.
    """

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
        self, x: mx.array, around: Around, cache: LayerCache | None, added: mx.array | None = None
    ) -> tuple[mx.array, mx.array]:
        """x and added (None: nothing) [B, T, H] -> two such parts."""
        return self.fed(self.met(x, around, cache, added))

    def met(self, x: mx.array, around: Around, cache: LayerCache | None, added: mx.array | None) -> Summed:
        """What the feed-forward block meets; arguments as above."""
        met = Summed(self.post_attention_layernorm, *self._mixed(x, around, cache, added))
        if not self.training:
            begin(x, lambda: (met.total, met.normed))
        return met

    def fed(self, met: Summed) -> tuple[mx.array, mx.array]:
        """From there to the layer's two parts; may be done again."""
        made = self.mlp(met)
        if not self.training:
            begin(made, lambda: (made,))
        return met.total, made

    def mix(self, x: mx.array, around: Around, cache: LayerCache | None) -> mx.array:
        """The first half: x [B, T, H] -> [B, T, H]; arguments as above."""
        return together(*self._mixed(x, around, cache, None))

    def _mixed(
        self, x: mx.array, around: Around, cache: LayerCache | None, added: mx.array | None
    ) -> tuple[mx.array, mx.array]:
        met = Summed(self.input_layernorm, x, added)
        if self.is_attention:
            made = self.self_attn(met, around.rope, cache, around.readable)
        else:
            made = self.linear_attn(met, cache, around.present)
        return met.total, made

    def feed(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """The second half: x [B, T, H] -> two parts of the same shape."""
        return x, self.mlp(self.post_attention_layernorm(x))

    def join(self) -> None:
        """Put weights that meet the same input side by side in memory; lazy."""
        (self.self_attn if self.is_attention else self.linear_attn).join()
        if isinstance(self.mlp, MLP):
            self.mlp.join()


def together(x: mx.array, added: mx.array | None) -> mx.array:
    """The sum of what a layer takes or gives in two parts."""
    return x if added is None else x + added


def _feed_forward(config: TextConfig) -> nn.Module:
    if config.moe is None:
        return MLP(config.hidden_size, config.intermediate_size)
    moe = config.moe
    return SparseMoE(
        config.hidden_size, moe, ResidentExperts(moe.num_experts, config.hidden_size, moe.intermediate_size)
    )
