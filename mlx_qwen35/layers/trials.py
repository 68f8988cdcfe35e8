"""Which kernels a layer launches, as trials; and what to do where one fails.

Knows the layers' sizes and weights. Knows neither how a trial is judged nor what is remembered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..kernels import ragged_attention, trials
from ..kernels.delta_decode import SIMDS
from ..kernels.trial import Trial
from ..kernels.weights import Kind, weights_of
from .attention import GatedAttention
from .delta_net import GatedDeltaNet
from .mlp import MLP
from .moe import SparseMoE
from .norm import RMSNorm


@dataclass(frozen=True)
class Use:
    """A module that launches kernels. forms: in the order in which they are to be taken, each its trials and what makes
    the module take it; where none of them stands its trials, MLX's operations do the work (`unfused`)."""

    module: Any
    forms: tuple[tuple[Sequence[Trial], Callable[[], None]], ...]


def uses(model: Any) -> Iterator[Use]:
    """Of what has decoder layers, rotary positions, and a norm behind them: a model or a drafting head.

    A module is left out where its weights are nothing that kernels read.
    """
    dtype, rope = model.norm.weight.dtype, model._rope
    half = rope.half
    yield _one(rope, [trials.of_angles(half, rope.factor, several=several) for several in (False, True)])
    yield _norm(model.norm, dtype, [], added=True)
    for number, layer in enumerate(model.layers):
        mixer = layer.self_attn if layer.is_attention else layer.linear_attn
        met = [(weights.kind, None) for weights in mixer._joined.readable(mixer.joinable())]
        yield _norm(layer.input_layernorm, dtype, met, added=number > 0)
        yield _norm(layer.post_attention_layernorm, dtype, list(_fed(layer.mlp)), added=True)
        if layer.is_attention:
            yield _attention(layer.self_attn, dtype, half)
            yield from _rows(layer.self_attn, dtype)
        elif layer.linear_attn.conv1d.weight.shape[1] > 1:
            yield _delta(layer.linear_attn, dtype)
        if isinstance(layer.mlp, SparseMoE):
            yield from _experts(layer.mlp, dtype)


def _one(module: Any, needed: Sequence[Trial]) -> Use:
    return Use(module, ((needed, lambda: None),))


def _norm(norm: RMSNorm, dtype: mx.Dtype, met: Sequence[tuple[Kind, Kind | None]], *, added: bool) -> Use:
    """met: of each product that meets the norm, the matrix, and the second where it is gated."""
    alone = [trials.of_add_norm(norm.weight.shape[0], dtype, norm.weight.dtype)]
    products = [
        trials.of_norm_matmul(dtype, norm.weight.dtype, *kinds, rows=rows, added=added)
        for kinds in met
        for rows in (1, 3)
    ]

    def take(apart: bool) -> Callable[[], None]:
        return lambda: setattr(norm, "apart", apart)

    return Use(norm, (([*products, *alone], take(False)), (alone, take(True))) if products else ((alone, take(True)),))


def _fed(block: MLP | SparseMoE) -> Iterator[tuple[Kind, Kind | None]]:
    """What meets the norm before a feed-forward block."""
    if isinstance(block, SparseMoE):
        gate = weights_of(block.gate)
        if gate is not None:
            yield gate.kind, None
        return
    gate, up = weights_of(block.gate_proj), weights_of(block.up_proj)
    if gate is not None and up is not None:
        yield gate.kind, up.kind


def _attention(layer: GatedAttention, dtype: mx.Dtype, half: int) -> Use:
    dim, heads, kv_heads = layer.head_dim, layer.heads, layer.kv_heads
    sizes = [2 * heads * dim, kv_heads * dim, kv_heads * dim]
    (first, queries, _), (second, keys, keys_at), _ = layer._joined.places(layer.joinable(), sizes)
    assert first == second or not keys_at
    how = {"heads": heads, "kv_heads": kv_heads, "dim": dim, "half": half, "widths": (queries, keys)}
    norms = layer.q_norm.weight.dtype, layer.k_norm.weight.dtype
    both = (True, False)
    return _one(layer, [trials.of_attention_inputs(dtype, norms, **how, keys_at=keys_at, same=same) for same in both])


def _rows(layer: GatedAttention, dtype: mx.Dtype) -> Iterator[Use]:
    how = {"heads": layer.heads, "kv_heads": layer.kv_heads, "dim": layer.head_dim}
    if not ragged_attention.readable(**how):
        return

    def take(simds: int) -> Callable[[], None]:
        return lambda: setattr(layer.rows, "most_simds", simds)

    def needed(simds: int) -> list[Trial]:
        spans = [trials.of_ragged_attention(dtype, **how, whole=whole, most_simds=simds) for whole in (True, False)]
        return [*spans, trials.of_ragged_sum(dtype, heads=layer.heads, dim=layer.head_dim)]

    yield Use(layer.rows, tuple((needed(simds), take(simds)) for simds in ragged_attention.SIMDS))


def _delta(layer: GatedDeltaNet, dtype: mx.Dtype) -> Use:
    (first, mixed, _), (second, *_), (third, gates, gates_at), (fourth, *_) = layer._joined.places(
        layer.joinable(), layer._widths
    )
    # What is in two arrays is put together (joined.neighbours).
    mixed = mixed if first == second else sum(layer._widths[:2])
    gates, gates_at = (gates, gates_at) if third == fourth else (sum(layer._widths[2:]), 0)
    weights = layer.conv1d.weight.dtype, layer.A_log.dtype, layer.dt_bias.dtype, layer.norm.weight.dtype
    how = {
        "key_heads": layer.key_heads, "heads": layer.value_heads, "key_dim": layer.key_dim,
        "value_dim": layer.value_dim, "taps": layer.conv1d.weight.shape[1], "widths": (mixed, gates),
    }  # fmt: skip

    def take(simds: int) -> Callable[[], None]:
        return lambda: setattr(layer, "most_simds", simds)

    forms = (
        ([trials.of_delta_decode(dtype, weights, **how, gates_at=gates_at, most_simds=simds)], take(simds))
        for simds in SIMDS
    )
    return Use(layer, tuple(forms))


def _experts(layer: SparseMoE, dtype: mx.Dtype) -> Iterator[Use]:
    """Of a few rows, and the router's of many."""
    number, chosen = layer.gate.weight.shape[0], layer.experts_per_token
    needed = [trials.of_router(dtype, dtype, number, chosen, None)]
    own, shared = layer.experts.projections(), layer.shared_expert.projections()
    gate = weights_of(layer.shared_expert_gate)
    if own is not None and shared is not None and gate is not None:
        kinds = own.gate.kind, own.up.kind, shared.gate.kind, shared.up.kind
        needed.append(trials.of_router(dtype, dtype, number, chosen, gate.kind))
        for rows in (3,) if chosen >= 8 else (3, 1):  # MLX passes arrays of fewer than 8 elements in another way
            needed.append(trials.of_expert_gate_up(dtype, chosen, kinds, rows))
            needed.append(trials.of_expert_down(dtype, chosen, (own.down.kind, shared.down.kind), rows))
    yield _one(layer, needed)
