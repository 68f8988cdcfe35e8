"""The model of one rank: its share of the layers and experts, and where it meets the others.

Knows layers and the group. Knows neither files nor who calls.

    experts     every layer, of the experts a range; a layer's experts of all ranks are summed, in one message
    pipeline    some layers; hidden states come from the rank before and go to the next, the last ones back to rank 0
    tensor      every layer, of its heads a part; mixer and feed-forward are summed, in two messages
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_qwen35.cache import AnyLayer, Cache, Elsewhere
from mlx_qwen35.cache.rows import RowsCache
from mlx_qwen35.config import ModelConfig
from mlx_qwen35.errors import RankLostError
from mlx_qwen35.experts.resident import ResidentExperts
from mlx_qwen35.layers.linear import Linear
from mlx_qwen35.layers.mlp import MLP
from mlx_qwen35.layers.moe import SparseMoE
from mlx_qwen35.layers.summed import Summed, array_of
from mlx_qwen35.model import Model
from mlx_qwen35.model.decoder import DecoderLayer, together
from mlx_qwen35.parallel.cuts import text_of, vocabulary_span
from mlx_qwen35.parallel.group import FEW, Group
from mlx_qwen35.parallel.head import Best, HeadShare, can_be_cut
from mlx_qwen35.parallel.plan import Plan
from mlx_qwen35.vision.sight import Sight


class RankedMoE(SparseMoE):
    """A mixture whose experts `first` .. `stop` are here, and the shared one on the last rank: summed over the ranks.

    Every rank routes. With each row goes how many experts it went through here: all ranks together have to have each
    of them once, or they did not route alike (`RanksModel.routed_alike`).
    """

    def __init__(self, whole: SparseMoE, config: ModelConfig, plan: Plan, group: Group) -> None:
        nn.Module.__init__(self)
        moe, (self._first, self._stop) = config.text.moe, plan.shares[group.rank]
        self.experts_per_token, self.gate = whole.experts_per_token, whole.gate
        size = config.text.hidden_size
        self.experts = ResidentExperts(self._stop - self._first, size, moe.intermediate_size)
        if group.rank == group.size - 1:
            self.shared_expert, self.shared_expert_gate = whole.shared_expert, whole.shared_expert_gate
        self._group = group
        self._counts: list[mx.array] = []  # of the rows since they were looked at

    def __call__(self, x: mx.array | Summed) -> mx.array:
        """x [B, T, H], or what is to be its norm -> [B, T, H]; evaluates what is routed."""
        x = array_of(x)
        rows = x.reshape(-1, x.shape[-1])  # [N, H]
        expert_ids, weights = self._group.from_rank_0(*self.choose(rows))  # [N, K]
        shared = gate = None
        if "shared_expert" in self:
            shared, gate = self.shared_expert(rows), self.shared_expert_gate(rows)
        routed, count = self._routed(rows, expert_ids, weights, () if shared is None else (shared, gate))
        wide = mx.float32 if len(rows) <= FEW else x.dtype
        part = routed.astype(wide)
        if shared is not None:
            part = part + (mx.sigmoid(gate) * shared).astype(wide)
        total = self._group.sum(mx.concatenate([part, count.astype(wide)], axis=-1))  # [N, H + 1]
        self._counts.append(total[:, -1])
        return total[:, :-1].astype(x.dtype).reshape(x.shape)

    def _routed(
        self, rows: mx.array, expert_ids: mx.array, weights: mx.array, beside: Sequence[mx.array]
    ) -> tuple[mx.array, mx.array]:
        """(the weighted sum over this rank's experts [N, H], how many of them each row had [N, 1])."""
        mx.eval(expert_ids, rows, weights)
        ids = np.array(expert_ids)
        own = (ids >= self._first) & (ids < self._stop)
        count = mx.array(own.sum(axis=1, keepdims=True).astype(np.float32))
        at, _ = np.nonzero(own)
        if not len(at):
            return mx.zeros_like(rows), count
        pairs = np.flatnonzero(own).astype(np.uint32)
        local = mx.array((ids[own] - self._first).astype(np.uint32))[:, None]
        mine = mx.array(at.astype(np.uint32))
        y = self.experts(rows[mine], local, weights.reshape(-1)[mx.array(pairs)][:, None], beside)  # [P, H]
        # each in its own place of [N, K]: the sum of a row has one order, whoever is beside it
        placed = mx.zeros((ids.size, rows.shape[1]), y.dtype)
        placed[mx.array(pairs)] = y
        return placed.reshape(*ids.shape, -1).sum(axis=1), count


class SummedMLP(MLP):
    """A part of a feed-forward, summed over the ranks."""

    _group_of: tuple[Group]

    def __call__(self, x: mx.array | Summed) -> mx.array:
        return _summed(self._group_of[0], super().__call__(x))


class CutLayer(DecoderLayer):
    """A layer with a part of its heads, and of its feed-forward where that is dense."""

    def __init__(self, config: ModelConfig, kind: str, plan: Plan, group: Group) -> None:
        text = config.text
        super().__init__(text_of(text, group.size), kind)
        self._group_of = (group,)  # no part of the module
        if isinstance(self.mlp, SparseMoE):
            self.mlp = RankedMoE(self.mlp, config, plan, group)
        else:
            self.mlp = SummedMLP(text.hidden_size, text.intermediate_size // group.size)
            self.mlp._group_of = (group,)

    def _mixed(self, *inputs: Any) -> tuple[mx.array, mx.array]:
        x, made = super()._mixed(*inputs)
        return x, _summed(self._group_of[0], made)


def _summed(group: Group, x: mx.array) -> mx.array:
    wide = mx.float32 if x.size // x.shape[-1] <= FEW else x.dtype
    return group.sum(x.astype(wide)).astype(x.dtype)


class Passing(nn.Module):
    """A layer that another rank has: what comes in goes out."""

    is_attention = False

    def __call__(self, x: mx.array, *others: Any) -> tuple[mx.array, mx.array | None]:
        *_, added = others
        return x, added

    def mix(self, x: mx.array, *others: Any) -> mx.array:
        return x

    def feed(self, x: mx.array) -> tuple[mx.array, None]:
        return x, None

    def join(self) -> None:
        """There is nothing to join."""


class _Nowhere(nn.Module):
    """Embeddings that another rank has."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self._size = size

    def __call__(self, tokens: mx.array) -> mx.array:
        return mx.zeros((*tokens.shape, self._size))

    def to_quantized(self, **how: Any) -> _Nowhere:
        """nn.quantize calls this."""
        return self


class RanksModel(Model):
    """A rank's share of a model. Its calls are made by all ranks together, with the same tokens."""

    _in_windows = False  # a layer that is done again would meet no other rank

    together_chunk = 0  # a call for other ranks is of one prompt

    def __init__(self, config: ModelConfig, plan: Plan, group: Group) -> None:
        super().__init__(config)
        self._plan, self._ranks_group = (plan,), (group,)
        text = config.text
        if plan.kind == "experts":
            for layer in self.layers:
                layer.mlp = RankedMoE(layer.mlp, config, plan, group)
        elif plan.kind == "tensor":
            self.layers = [CutLayer(config, kind, plan, group) for kind in text.layer_types]
        else:
            first, stop = plan.shares[group.rank]
            self.layers = [layer if first <= number < stop else Passing() for number, layer in enumerate(self.layers)]
        if group.rank:
            for name in ("lm_head", "vision"):
                if name in self:
                    del self[name]
            if plan.kind == "tensor" and not text.tie_word_embeddings:
                first, stop = vocabulary_span(text.vocab_size, group.size, group.rank)
                self.lm_head = Linear(text.hidden_size, stop - first, bias=False)
            if plan.kind == "pipeline":
                self.embed_tokens = _Nowhere(text.hidden_size)
        self._steps: tuple[int, int] | None = None
        self._head_share: tuple[HeadShare, ...] = ()
        self._best: Best | None = None
        self._returned = 0  # how many of the last hidden states of a call rank 0 looks at

    def go_in_steps(self, chunk: int, tile: int) -> None:
        """Take prompts in steps as a rank needs them that streams experts, whichever that is: so many tokens of a
        prompt in a call, and in a mixer. All ranks take the same, and have the same bits of what each computes."""
        self._steps = chunk, tile

    @property
    def prefill_chunk(self) -> int:
        return super().prefill_chunk if self._steps is None else self._steps[0]

    @property
    def tile(self) -> float:
        return super().tile if self._steps is None else self._steps[1]

    @property
    def plan(self) -> Plan:
        return self._plan[0]

    @property
    def group(self) -> Group:
        return self._ranks_group[0]

    def make_cache(self, batch: int = 1, left_padding: Sequence[int] | None = None) -> Cache:
        cache = super().make_cache(batch, left_padding)
        held: list[AnyLayer] = cache.layers
        pairs = zip(self.layers, held, strict=True)
        cache.layers = [Elsewhere() if isinstance(layer, Passing) else own for layer, own in pairs]
        return cache

    def _through_layers(self, x: mx.array, *others: Any) -> tuple[mx.array, mx.array | None]:
        """In a pipeline what other ranks' layers make of x comes from them; of that the last positions alone.

        Many rows are computed layer by layer, each of which is progress.
        """
        if self.plan.kind != "pipeline":
            return super()._through_layers(x, *others)
        group, rank = self.group, self.group.rank
        dtype, last = self.norm.weight.dtype, group.size - 1
        if rank:
            x = group.receive(x.shape, dtype, rank - 1)
        if x.shape[0] * x.shape[1] > FEW:
            *others, _, taps = others
            others += group.computed, taps
        x = together(*super()._through_layers(x, *others))
        count = min(self._returned or x.shape[1], x.shape[1])
        if rank == last:
            x = x[:, -count:]
        group.send(x.astype(dtype), 0 if rank == last else rank + 1)
        return group.receive((x.shape[0], count, x.shape[2]), dtype, last) if rank == 0 else x, None

    def computed(
        self,
        tokens: mx.array,
        cache: Cache | RowsCache | None,
        media: Sight | tuple[()],
        *,
        more: bool,
        wanted: int | None = None,
        best: tuple[int, int] | None = None,
    ) -> mx.array:
        """`hidden`, computed with what the cache then holds. To be called by all ranks.

        best: as HeadShare.best has count and tokens; `self.best` is then what it gave of the last position, computed.
        """
        x = self._computed(tokens, cache, media, more, wanted)
        self._best = None
        if best is not None:
            if not self._head_share:
                self._head_share = (HeadShare(self._whole_head, self.config.text.vocab_size, self.group),)
            self._best = self._head_share[0].best(x[:, -1], *best)
            mx.eval(self._best)
        return x

    @property
    def best(self) -> Best:
        return self._best

    @property
    def cuts_head(self) -> bool:
        """Whether a call may ask for `best`."""
        return self.plan.kind == "tensor" and can_be_cut(self._whole_head, self.config.text.vocab_size)

    @property
    def _whole_head(self) -> nn.Module:
        return self.embed_tokens if self.config.text.tie_word_embeddings else self.lm_head

    def _computed(
        self,
        tokens: mx.array,
        cache: Cache | RowsCache | None,
        media: Sight | tuple[()],
        more: bool,
        wanted: int | None,
    ) -> mx.array:
        """Where ranks chose different experts for a row, whose sums all see, they go back and take rank 0's choice."""
        before = None if cache is None else cache.snapshot() if isinstance(cache, Cache) else cache.mark()
        held = [] if cache is None else cache.arrays
        x = super().hidden(tokens, cache, media, more=more, wanted=wanted)
        mx.eval(x, held and held())
        if self.routed_alike():
            return x
        if isinstance(cache, Cache):
            cache.restore(before)
            cache.step_again()
        elif cache is not None:
            cache.go_back(before)
        with self.group.led_by_rank_0():
            x = super().hidden(tokens, cache, media, more=more, wanted=wanted)
            mx.eval(x, held and held())
        if not self.routed_alike():
            raise RankLostError("the ranks computed different experts with one choice: they have not the same weights")
        return x

    def routed_alike(self) -> bool:
        """Whether since this was asked last every row went through as many experts as it has, over all ranks."""
        mixtures = [layer.mlp for layer in self.layers if isinstance(getattr(layer, "mlp", None), RankedMoE)]
        counts = [count.astype(mx.float32) for mixture in mixtures for count in mixture._counts]
        for mixture in mixtures:
            mixture._counts = []
        if not counts:
            return True
        return bool((mx.concatenate(counts) == self.config.text.moe.experts_per_token).all().item())
