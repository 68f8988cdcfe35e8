"""The module of a block drafter: what a target's layers say of the context, and a block of masks, in one pass.

Knows its own layers. Embedding and head are the target's; when it is asked, and what becomes of its guesses, is
speculative/'s business.

    tapped [1, T, N H]   outputs of N layers of the target at T positions that follow one another
    c = norm(fc(tapped));   of each layer keys(c) and values(c), at the rotary positions of these T, kept in a Window

    x [1, L, H]          embeddings of the last token and of L - 1 masks, at the positions behind the context
    x += attention(norm(x)), over the context and the block;   x += mlp(norm(x));   and norm(x) after all layers

The target's head makes of row j >= 1 the logits of the j-th token to come. A DFlash2 has a short convolution, whose
kernel hangs on its input, on both sides of attention and MLP, and chooses along the block among a few candidates:

    score(c) = logit(c) + sum(before[token before] * (W x) * after[c])
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn

from mlx_qwen35.blocks.config import BlockConfig
from mlx_qwen35.blocks.window import Window
from mlx_qwen35.layers.embedding import Embedding
from mlx_qwen35.layers.linear import Linear
from mlx_qwen35.layers.mlp import MLP
from mlx_qwen35.layers.norm import RMSNorm

Choose = Callable[[mx.array], "mx.array | None"]  # logits [1, V] of a guess -> its token [1]; None: no more guesses


class BlockAttention(nn.Module):
    """Attention of a block over its context and itself; keys and values of both come from the same maps."""

    def __init__(self, config: BlockConfig, window: int | None):
        super().__init__()
        hidden, dim = config.hidden_size, config.head_dim
        self.q_proj = Linear(hidden, config.heads * dim, bias=False)
        self.k_proj = Linear(hidden, config.kv_heads * dim, bias=False)
        self.v_proj = Linear(hidden, config.kv_heads * dim, bias=False)
        self.o_proj = Linear(config.heads * dim, hidden, bias=False)
        self.q_norm, self.k_norm = RMSNorm(dim, config.eps), RMSNorm(dim, config.eps)
        if config.sinks:
            self.attention_sink_bias = mx.zeros((config.heads,))
        self._dim, self._theta, self._causal, self._window = dim, config.rope_theta, config.causal, window

    def remember(self, context: mx.array, window: Window, skipped: int) -> None:
        """context [1, T, H] of the next positions into a window; skipped: as `Window.append` has it."""
        window.append(*self._keys(context, window.stop + skipped), skipped)

    def __call__(self, x: mx.array, window: Window) -> mx.array:
        """x [1, L, H] of a block that follows the context -> [1, L, H]."""
        queries = self._turned(self.q_norm(self._heads(self.q_proj(x))), window.stop)
        keys, values = self._keys(x, window.stop)
        context = window.read()
        if context is not None:
            keys, values = (mx.concatenate(pair, axis=2) for pair in zip(context, (keys, values), strict=True))
        mixed = mx.fast.scaled_dot_product_attention(
            queries,
            keys,
            values,
            scale=self._dim**-0.5,
            mask=self._mask(x.shape[1], keys.shape[2]) if self._causal else None,
            sinks=self.attention_sink_bias.astype(queries.dtype) if "attention_sink_bias" in self else None,
        )
        return self.o_proj(mixed.swapaxes(1, 2).reshape(*x.shape[:2], -1))

    def _keys(self, x: mx.array, position: int) -> tuple[mx.array, mx.array]:
        """Of x [1, T, H] that stands from `position` on: both [1, heads, T, D]."""
        keys = self._turned(self.k_norm(self._heads(self.k_proj(x))), position)
        return keys, self._heads(self.v_proj(x)).swapaxes(1, 2)

    def _heads(self, x: mx.array) -> mx.array:
        return x.reshape(*x.shape[:2], -1, self._dim)

    def _turned(self, x: mx.array, position: int) -> mx.array:
        """x [1, T, heads, D] -> [1, heads, T, D] at its rotary positions."""
        how = {"traditional": False, "base": self._theta, "scale": 1.0, "offset": position}
        return mx.fast.rope(x.swapaxes(1, 2), self._dim, **how)

    def _mask(self, rows: int, keys: int) -> mx.array:
        """[L, S]: which keys a row sees, those up to its own, and of a sliding layer no more than that looks back."""
        back = mx.arange(keys - rows, keys)[:, None] - mx.arange(keys)[None]
        seen = back >= 0
        return seen if self._window is None else seen & (back <= self._window)


class GroupedConvolution(nn.Module):
    """Two convolutions along a block, one before and one behind what lies between: their kernels are a part of the
    weights and a part that hangs on the input, the same for all channels of a group."""

    def __init__(self, hidden: int, length: int, group: int):
        super().__init__()
        self.base_kernel = mx.zeros((2, length, hidden))
        self.kernel_projection = Linear(hidden, 2 * length * (hidden // group), bias=False)
        self._length, self._group = length, group

    def around(self, x: mx.array, between: Callable[[mx.array], mx.array]) -> mx.array:
        """x [1, L, H] -> [1, L, H]."""
        kernels = self.kernel_projection(x).reshape(*x.shape[:2], 2, self._length, -1, 1)  # of each group
        return self._convolved(between(self._convolved(x, kernels, 0)), kernels, 1)

    def _convolved(self, x: mx.array, kernels: mx.array, which: int) -> mx.array:
        groups = x.reshape(*x.shape[:2], -1, self._group)
        total = 0
        for back in range(min(self._length, x.shape[1])):
            fixed = self.base_kernel[which, back].reshape(-1, self._group).astype(x.dtype)
            product = (fixed + kernels[:, back:, which, back]) * groups[:, : x.shape[1] - back]
            total = total + mx.pad(product, [(0, 0), (back, 0), (0, 0), (0, 0)])
        return total.reshape(x.shape)


class BlockLayer(nn.Module):
    """x += attention(norm(x)); x += mlp(norm(x)); each between convolutions in a DFlash2."""

    def __init__(self, config: BlockConfig, window: int | None):
        super().__init__()
        self.self_attn = BlockAttention(config, window)
        self.mlp = MLP(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.eps)
        if config.convolution is not None:
            self.attention_conv = GroupedConvolution(config.hidden_size, *config.convolution)
            self.mlp_conv = GroupedConvolution(config.hidden_size, *config.convolution)

    def __call__(self, x: mx.array, window: Window) -> mx.array:
        attend, feed = lambda block: self.self_attn(block, window), self.mlp
        if "attention_conv" not in self:
            x = x + attend(self.input_layernorm(x))
            return x + feed(self.post_attention_layernorm(x))
        x = x + self.attention_conv.around(self.input_layernorm(x), attend)
        return x + self.mlp_conv.around(self.post_attention_layernorm(x), feed)


class CandidateSelector(nn.Module):
    """Scores of the likeliest tokens of a row, by the token before."""

    def __init__(self, config: BlockConfig):
        super().__init__()
        rank, self._count = config.selector
        self.predecessor_codebook = Embedding(config.vocab_size, rank)
        self.successor_codebook = Embedding(config.vocab_size, rank)
        self.hidden_projection = Linear(config.hidden_size, rank, bias=False)

    def candidates(self, hidden: mx.array, logits: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """hidden [R, H] and logits [R, V] of the rows of a block -> ids [R, K], their logits [R, K], and what their
        successors are weighed with [R, K, rank]; float32."""
        ids = mx.argpartition(logits, -self._count, axis=-1)[:, -self._count :]
        weighed = self.hidden_projection(hidden).astype(mx.float32)[:, None] * self.successor_codebook(ids)
        return ids, mx.take_along_axis(logits, ids, axis=-1).astype(mx.float32), weighed

    def scores(self, before: mx.array, logits: mx.array, weighed: mx.array) -> mx.array:
        """before [1], logits [K], weighed [K, rank] of a row -> [1, K]."""
        return (logits + (self.predecessor_codebook(before) * weighed).sum(axis=-1))[None]


class BlockDraftModel(nn.Module):
    """A DFlash or DFlash2 drafter, without the embedding and the head, which are its target's."""

    def __init__(self, config: BlockConfig):
        super().__init__()
        hidden = config.hidden_size
        self.config = config
        self.fc = Linear(len(config.taps) * hidden, hidden, bias=False)
        self.hidden_norm, self.norm = RMSNorm(hidden, config.eps), RMSNorm(hidden, config.eps)
        self.layers = [BlockLayer(config, window) for window in config.windows]
        if config.selector is not None:
            self.candidate_selector = CandidateSelector(config)

    @property
    def dtype(self) -> mx.Dtype:
        """That it computes in."""
        return self.norm.weight.dtype

    def make_windows(self, start: int = 0) -> list[Window]:
        """Empty ones, a layer each, for a context that is read from position `start` on."""
        return [Window(most, start) for most in self.config.windows]

    def remember(self, tapped: mx.array, windows: Sequence[Window]) -> None:
        """tapped [1, T, N H]: what the target's layers gave of the next T positions, into the windows."""
        reach, length = self.config.reach, tapped.shape[1]
        cut = 0 if reach is None else max(length - reach, 0)
        context = self.hidden_norm(self.fc(tapped[:, cut:].astype(self.dtype)))
        for layer, window in zip(self.layers, windows, strict=True):
            more = 0 if window.most is None else max(length - cut - window.most, 0)
            layer.self_attn.remember(context[:, more:], window, cut + more)

    def __call__(self, embeddings: mx.array, windows: Sequence[Window]) -> mx.array:
        """embeddings [1, L, H] of a block -> its hidden states [1, L, H], for the target's head."""
        x = embeddings.astype(self.dtype) * self.config.input_scale
        for layer, window in zip(self.layers, windows, strict=True):
            x = layer(x, window)
        return self.norm(x)

    def logits(self, made: mx.array) -> mx.array:
        """What the target's head made of hidden states, as the drafter means it."""
        cap, scale = self.config.softcap, self.config.output_scale
        made = made if scale == 1 else made * scale
        return made if cap is None else mx.tanh(made / cap) * cap

    def walk(self, token: mx.array, hidden: mx.array, logits: mx.array, choose: Choose) -> None:
        """Let `choose` have the logits of each of R guesses after `token` [1]: hidden [1, R, H], logits [1, R, V].

        Each row of a DFlash is by itself; of a DFlash2 it hangs on the guess before, and has no other tokens than its
        candidates. So what a guess is drawn from is the distribution that `choose` was shown.
        """
        if "candidate_selector" not in self:
            for row in range(logits.shape[1]):
                if choose(logits[:, row]) is None:
                    return
            return
        ids, own, weighed = self.candidate_selector.candidates(hidden[0], logits[0])
        for row in range(logits.shape[1]):
            scores = self.candidate_selector.scores(token, own[row], weighed[row])
            nothing = mx.full((1, logits.shape[-1]), -mx.inf, mx.float32)
            token = choose(mx.put_along_axis(nothing, ids[row : row + 1], scores, axis=-1))
            if token is None:
                return
