"""Routing traces: which experts each token asked for in each layer, and which a prediction would have named.

Recorded from a checkpoint (the demo) on held-out questions, or drawn with a given skew and memory for a geometry whose
weights are not at hand. Knows routers and random numbers; knows no pools and no files.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from benchmarks.likelihood import Question, questions
from mlx_qwen35.kernels.router import route
from mlx_qwen35.model import DecoderLayer, Model
from mlx_qwen35.processor import Processor

# What the next layer's router is shown, one layer before its time.
AS_NORMED = "as normed for this layer"
RENORMED = "renormed with the next layer's weight"
WITH_SHARED = "renormed, this layer's shared expert added"
TWO_AHEAD = "renormed, two layers ahead"
PREDICTIONS = (AS_NORMED, RENORMED, WITH_SHARED, TWO_AHEAD)


@dataclass(frozen=True)
class Trace:
    """One sequence of tokens. ids: [layers, tokens, K]. ranked: by prediction, [layers, tokens, n], the likeliest
    first; -1 in layers that nothing looks ahead to. The first `prompt` tokens were given, the others are of the reply.
    """

    num_experts: int
    ids: np.ndarray
    ranked: dict[str, np.ndarray] = field(default_factory=dict)
    prompt: int = 0


class _Listener:
    """Stands where a layer's second norm stood, and keeps what came in: [B, T, H]."""

    def __init__(self, layer: DecoderLayer):
        self.layer, self.norm = layer, layer.post_attention_layernorm
        self.heard: mx.array | None = None
        layer.post_attention_layernorm = self

    def after(self, x: mx.array, added: mx.array) -> tuple[mx.array, mx.array]:
        self.heard, normed = self.norm.after(x, added)
        return self.heard, normed

    def scores(self, x: mx.array) -> mx.array:
        """What this layer's router makes of hidden states x."""
        return self.layer.mlp.gate(self.norm(x))


def record(model: Model, processor: Processor, per_skill: int, seed: int = 0) -> Iterator[Trace]:
    """Every layer's routing of held-out questions and their right replies, in a shuffled order.

    The replies are given, not generated: their tokens meet the same layers in the same order as in decoding.
    """
    asked = questions(processor, per_skill)
    random.Random(seed).shuffle(asked)
    listeners = [_Listener(layer) for layer in model.layers]
    try:
        for question in asked:
            yield _record(model, listeners, question)
    finally:
        for listener in listeners:
            listener.layer.post_attention_layernorm = listener.norm


def _record(model: Model, listeners: list[_Listener], question: Question) -> Trace:
    # The last token is said and never fed.
    tokens = mx.array([(question.prompt + question.reply)[:-1]])
    model.hidden(tokens, None, [question.media] if question.media else None)
    hidden = [listener.heard for listener in listeners]
    top_k = listeners[0].layer.mlp.experts_per_token
    ids = [route(listener.scores(x)[0], top_k)[0] for listener, x in zip(listeners, hidden, strict=True)]
    nothing = mx.full((ids[0].shape[0], listeners[0].layer.mlp.gate.weight.shape[0]), -1)
    ranked: dict[str, list[mx.array]] = {name: [nothing] for name in PREDICTIONS}
    ranked[TWO_AHEAD].append(nothing)
    for here, there, x in zip(listeners, listeners[1:], hidden, strict=False):
        moe, normed = here.layer.mlp, here.norm(x)
        shared = mx.sigmoid(moe.shared_expert_gate(normed)) * moe.shared_expert(normed)
        ranked[AS_NORMED].append(_order(there.layer.mlp.gate(normed)))
        ranked[RENORMED].append(_order(there.scores(x)))
        ranked[WITH_SHARED].append(_order(there.scores(x + shared)))
    for there, x in zip(listeners[2:], hidden, strict=False):
        ranked[TWO_AHEAD].append(_order(there.scores(x)))
    return Trace(
        nothing.shape[1],
        np.array(mx.stack(ids)),
        {name: np.array(mx.stack(orders)) for name, orders in ranked.items()},
        len(question.prompt),
    )


def _order(scores: mx.array) -> mx.array:
    """[1, T, E] -> all experts, the best scored first, [T, E]."""
    return mx.argsort(-scores[0], axis=-1)


def zipf(
    *,
    layers: int,
    tokens: int,
    num_experts: int,
    top_k: int,
    skew: float,
    stay: float,
    topic: int | None = None,
    recall: float = 0.78,
    seed: int = 0,
) -> Trace:
    """Drawn routing. skew: the expert of rank r is chosen in proportion to r ** -skew, in an order of each layer's own.
    stay: an expert of one token is asked for by the next with this probability, whatever its rank. topic: after so many
    tokens half of the experts change ranks. recall: what share of a token's experts its prediction names.
    """
    rng = np.random.default_rng(seed)
    rows = np.arange(layers)[:, None]
    odds = -skew * np.log(np.argsort(rng.random((layers, num_experts)), axis=1) + 1.0)  # [layers, E]
    ids = np.empty((layers, tokens, top_k), np.int64)
    ranked = np.empty((layers, tokens, top_k), np.int64)
    for token in range(tokens):
        if topic and token and token % topic == 0:
            for layer in range(layers):
                moved = rng.choice(num_experts, num_experts // 2, replace=False)
                odds[layer, moved] = odds[layer, rng.permutation(moved)]
        # Adding Gumbel noise to log odds and taking the K largest draws K without replacement.
        keys = odds + rng.gumbel(size=odds.shape)
        if token:
            kept = np.where(rng.random((layers, top_k)) < stay, np.inf, keys[rows, ids[:, token - 1]])
            keys[rows, ids[:, token - 1]] = kept
        ids[:, token] = np.argpartition(-keys, top_k, axis=1)[:, :top_k]
        # A wrong prediction names others, by the same odds.
        others = odds + rng.gumbel(size=odds.shape)
        others[rows, ids[:, token]] = np.where(rng.random((layers, top_k)) < recall, np.inf, -np.inf)
        ranked[:, token] = np.argsort(-others, axis=1)[:, :top_k]
    return Trace(num_experts, ids, {RENORMED: ranked})
