"""A checkpoint's logits with one layer in memory at a time, for models that do not fit otherwise.

Knows how a Model is filled from a Source, and emptied. Knows nothing of what its answers are compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn

from mlx_qwen35.checkpoint.inventory import KEPT_FLOAT32, text_tensors
from mlx_qwen35.checkpoint.load import pack_modules
from mlx_qwen35.checkpoint.part import FLOATS, AnyPart
from mlx_qwen35.checkpoint.source import Source
from mlx_qwen35.model import Model


def logits(source: Source, tokens: mx.array, dtype: mx.Dtype) -> mx.array:
    """tokens [B, T] int -> logits [B, T, vocab], bit by bit those of the whole model in memory; dtype: to compute in.

    Memory: the largest of embedding, layer and head. Vision is left out.
    """
    model = Model(replace(source.config, vision=None))
    pack_modules(model, source)  # of random weights that are never computed: they are replaced
    model.eval()
    tied = source.config.text.tie_word_embeddings
    _fill(model.embed_tokens, "embed_tokens.", source, dtype)
    _fill(model.norm, "norm.", source, dtype)
    model.layers = _OneByOne(model.layers, source, dtype)
    hidden = model.hidden(tokens)
    mx.eval(hidden)
    if not tied:
        del model.embed_tokens
        _fill(model.lm_head, "lm_head.", source, dtype)
    found = model.head(hidden).astype(mx.float32)
    mx.eval(found)
    return found


def largest(source: Source, dtype: mx.Dtype) -> int:
    """The bytes of the weights that logits() has in memory at a time."""
    sizes: dict[str, int] = {}
    for name, shape in text_tensors(source.config).items():
        module, number = (*name.split("."), "")[:2]
        piece = f"{module}.{number}" if module == "layers" else module
        count = 1
        for size in shape:
            count *= size
        sizes[piece] = sizes.get(piece, 0) + count * dtype.size
    return max(sizes.values())


class _OneByOne:
    """Layers of which each is filled when its turn comes, and emptied after it."""

    def __init__(self, layers: list[nn.Module], source: Source, dtype: mx.Dtype):
        self._layers, self._source, self._dtype = layers, source, dtype

    def __len__(self) -> int:
        return len(self._layers)

    def __iter__(self) -> Iterator[Callable[..., tuple[mx.array, mx.array]]]:
        for number in range(len(self._layers)):
            yield self._called(number)

    def _called(self, number: int) -> Callable[..., tuple[mx.array, mx.array]]:
        def call(*arguments: object) -> tuple[mx.array, mx.array]:
            layer, self._layers[number] = self._layers[number], nn.Identity()
            _fill(layer, f"layers.{number}.", self._source, self._dtype)
            parts = layer(*arguments)
            mx.eval(parts)
            return parts

        return call


def _fill(module: nn.Module, prefix: str, source: Source, dtype: mx.Dtype) -> None:
    parts = [part for name, part in source.parts.items() if name.startswith(prefix)]
    weights = [(part.ours.removeprefix(prefix), part.finish(part.fetch(), _cast(part, dtype))) for part in parts]
    module.load_weights(weights)


def _cast(part: AnyPart, dtype: mx.Dtype) -> mx.Dtype | None:
    if part.dtype not in FLOATS or (part.dtype == "F32" and part.ours.endswith(KEPT_FLOAT32)):
        return None
    return dtype
