"""A tiny random Model beside the NumPy reference of the same weights.

Knows how the tensors of tests.checkpoints come under the names of Model, without the loader.
"""

from typing import Any

import mlx.core as mx
import numpy as np

from mlx_qwen35.config import ModelConfig
from mlx_qwen35.model import Model

from .checkpoints import random_tensors, relayout, tiny_config
from .reference_numpy import Reference


def tiny_model(kind: str = "dense", *, seed: int = 0, **overrides: Any) -> tuple[Model, Reference]:
    """Overrides are keys of the text configuration, as tiny_config takes them."""
    config = tiny_config(kind, flat=True, **overrides)
    tensors = random_tensors(config, seed)
    model = Model(ModelConfig.from_dict(config))
    ours = {
        name.removeprefix("model.").replace("switch_mlp", "experts"): mx.array(value)
        for name, value in relayout(tensors, "mlx-text").items()
    }
    model.load_weights(list(ours.items()), strict=True)
    mx.eval(model.parameters())
    return model, Reference(config, tensors)


def some_tokens(length: int, *, seed: int = 1, vocab: int = 96) -> list[int]:
    return np.random.RandomState(seed).randint(0, vocab, length).tolist()


def run(model: Model, tokens: list[int], *, cuts: list[int] | None = None, cache: Any = None) -> np.ndarray:
    """Logits [T, vocab] of one row, computed in pieces of the lengths in `cuts`, repeated; None: whole, no cache."""
    if cuts is None:
        return np.array(model(mx.array([tokens]), cache))[0]
    cache = model.make_cache() if cache is None else cache
    pieces, start, turn = [], 0, 0
    while start < len(tokens):
        stop = min(start + cuts[turn % len(cuts)], len(tokens))
        pieces.append(np.array(model(mx.array([tokens[start:stop]]), cache))[0])
        start, turn = stop, turn + 1
    return np.concatenate(pieces)
