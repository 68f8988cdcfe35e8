"""The embedding, which may be the head as well; quantized, its product is the one of the linear maps.

Knows one matrix of vectors. Knows no tokens' meaning.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from ..kernels import one_row
from ..kernels.matmul import matmul
from ..kernels.quantized_matmul import quantized_matmul
from .rotation import rotated, unrotated


class Embedding(nn.Embedding):
    """nn.Embedding through kernels.matmul, that quantizes to the QuantizedEmbedding below."""

    _multiply = staticmethod(matmul)

    def be_exact(self) -> None:
        """From now on `as_linear` gives a few rows the bits that each has alone, on every device."""
        self._multiply = one_row.matmul

    def as_linear(self, x: mx.array) -> mx.array:
        """x [.., H] -> [.., vocab]."""
        return self._multiply(x, self.weight)

    def to_quantized(
        self, group_size: int | None = None, bits: int | None = None, mode: str = "affine", quantize_input: bool = False
    ) -> nn.Module:
        """nn.quantize calls this."""
        if quantize_input:
            return super().to_quantized(group_size, bits, mode, quantize_input)
        return QuantizedEmbedding.from_embedding(self, group_size, bits, mode)


class QuantizedEmbedding(nn.QuantizedEmbedding):
    """nn.QuantizedEmbedding whose `as_linear` goes through kernels.quantized_matmul. factors, signs, block: as
    in QuantizedLinear."""

    block = 0

    _multiply = staticmethod(quantized_matmul)

    def be_exact(self) -> None:
        """From now on `as_linear` gives a few rows the bits that each has alone, on every device."""
        self._multiply = one_row.quantized_matmul

    def as_linear(self, x: mx.array) -> mx.array:
        """x [.., H] -> [.., vocab]."""
        how = {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}
        x = rotated(x, self.signs, self.block) if "signs" in self else x
        y = self._multiply(x, self.weight, self.scales, self.get("biases"), **how)
        return (y * self.factors).astype(y.dtype) if "factors" in self else y

    def __call__(self, x: mx.array) -> mx.array:
        """x [..] int -> [.., H]."""
        found = super().__call__(x)
        if "signs" in self:
            found = unrotated(found, self.signs, self.block)
        if "factors" not in self:
            return found
        factors = self.factors if self.factors.size == 1 else self.factors[x][..., None]
        return (found * factors).astype(found.dtype)
