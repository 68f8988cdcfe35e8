"""Matrices as kernels read them: weights.metal has the same for their side.

Knows the forms of mx.quantize. Knows neither whose weights they are nor what they are multiplied with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx

_AFFINE = (2, 3, 4, 5, 6, 8)
_LEAST = 8  # elements: MLX passes smaller arrays in another address space
BLOCK = 16  # values that a kernel takes at a time


@dataclass(frozen=True)
class Weights:
    """One matrix [out, in] or a stack of them [E, out, in], plain (form 0) or quantized; group: values of a scale."""

    form: int
    group: int
    weight: mx.array
    scales: mx.array
    biases: mx.array

    @staticmethod
    def of(
        weight: mx.array,
        scales: mx.array | None = None,
        biases: mx.array | None = None,
        *,
        group_size: int | None = None,
        bits: int | None = None,
        mode: str | None = None,
    ) -> Weights | None:
        """What mx.quantize gave, or a plain matrix alone. -> None for a form that kernels do not read."""
        if weight.size < _LEAST:
            return None
        if scales is None:
            # Buffers that are not read: any array will do.
            return None if weight.shape[-1] % BLOCK else Weights(0, BLOCK, weight, weight, weight)
        if mode == "affine" and bits in _AFFINE and biases is not None:
            return Weights(bits, group_size, weight, scales, biases)
        if mode == "mxfp4":
            return Weights(-4, group_size, weight, scales, scales)
        return None

    @property
    def rows(self) -> int:
        """out."""
        return self.weight.shape[-2]

    @property
    def width(self) -> int:
        """in."""
        return self.weight.shape[-1] if self.form == 0 else self.scales.shape[-1] * self.group

    @property
    def arrays(self) -> tuple[mx.array, mx.array, mx.array]:
        return self.weight, self.scales, self.biases

    def constants(self, name: str) -> dict[str, int | mx.Dtype]:
        """Template arguments that tell a body, and MLX's cache of kernels, how these matrices are stored."""
        name = name.upper()
        types = {f"{name}_W": self.weight.dtype, f"{name}_S": self.scales.dtype}
        return types | {f"{name}_FORM": self.form, f"{name}_GROUP": self.group}

    def values(self) -> mx.array:
        """The float32 matrices that these stand for; for references."""
        if self.form == 0:
            return self.weight.astype(mx.float32)
        if self.form < 0:
            return mx.dequantize(self.weight, self.scales, None, self.group, 4, "mxfp4", dtype=mx.float32)
        biases = self.biases.astype(mx.float32)
        return mx.dequantize(self.weight, self.scales.astype(mx.float32), biases, self.group, self.form)


class Projections(NamedTuple):
    """The three maps of an expert, or stacks of those of several experts: gate, up [.., I, H], down [.., H, I]."""

    gate: Weights
    up: Weights
    down: Weights
