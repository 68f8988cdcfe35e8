"""Matrices as kernels read them: weights.metal has the same for their side.

Knows the forms of mx.quantize. Knows neither whose weights they are nor what they are multiplied with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx

_AFFINE = (2, 3, 4, 5, 6, 8)
_MXFP4 = 40  # not negative: on CUDA constants become part of a kernel's name as they are
_LEAST = 8  # elements: MLX passes smaller arrays in another address space
BLOCK = 16  # values that a kernel takes at a time


class Kind(NamedTuple):
    """What a kernel is compiled for: matrices of `rows` x `width` values, plain (form 0) or quantized.

    form: the bits of an affine form, 40 for mxfp4. group: values that a scale is for. weight, scales: dtypes of arrays.
    """

    form: int
    group: int
    rows: int
    width: int
    weight: mx.Dtype
    scales: mx.Dtype

    def constants(self, name: str) -> dict[str, int | mx.Dtype]:
        """Template arguments that tell a body, and MLX's cache of kernels, how these matrices are stored."""
        name = name.upper()
        types = {f"{name}_W": self.weight, f"{name}_S": self.scales}
        return types | {f"{name}_FORM": self.form, f"{name}_GROUP": self.group}


@dataclass(frozen=True, eq=False)
class Weights:
    """One matrix [out, in] or a stack of them [E, out, in]."""

    kind: Kind
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
        rows = weight.shape[-2]
        if scales is None:
            kind = Kind(0, BLOCK, rows, weight.shape[-1], weight.dtype, weight.dtype)
            # Scales and biases are not read: any array will do.
            return None if kind.width % BLOCK else Weights(kind, weight, weight, weight)
        if mode == "affine" and bits in _AFFINE and biases is not None:
            form = bits
        elif mode == "mxfp4":
            form, biases = _MXFP4, scales
        else:
            return None
        kind = Kind(form, group_size, rows, scales.shape[-1] * group_size, weight.dtype, scales.dtype)
        return Weights(kind, weight, scales, biases)

    @property
    def arrays(self) -> tuple[mx.array, mx.array, mx.array]:
        return self.weight, self.scales, self.biases

    def values(self) -> mx.array:
        """The float32 matrices that these stand for; for references."""
        form, group = self.kind.form, self.kind.group
        if form == 0:
            return self.weight.astype(mx.float32)
        if form == _MXFP4:
            return mx.dequantize(self.weight, self.scales, None, group, 4, "mxfp4", dtype=mx.float32)
        return mx.dequantize(self.weight, self.scales.astype(mx.float32), self.biases.astype(mx.float32), group, form)


class Readable:
    """A module with one matrix or stack, `weight` and where it is quantized `scales` .., that kernels can read.

    What they need is found once, and anew when an array is another: a decode step asks every layer.
    """

    _found: Weights | None = None

    def weights(self) -> Weights | None:
        """None for a form that kernels do not know, or where more than a matrix is to be computed."""
        if "bias" in self or "factors" in self or "signs" in self:
            return None
        weight, scales, biases = self["weight"], self.get("scales"), self.get("biases")
        found = self._found
        if (
            found is not None
            and found.weight is weight
            and (scales is None or found.scales is scales)
            and (biases is None or found.biases is biases)
        ):
            return found
        how = {} if scales is None else {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}
        self._found = Weights.of(weight, scales, biases, **how)
        return self._found


def weights_of(module: object) -> Weights | None:
    """The matrix of a module as kernels read it; None where it is none, such as an adapter."""
    return module.weights() if isinstance(module, Readable) else None


class Projections(NamedTuple):
    """The three maps of an expert, or stacks of those of several experts: gate, up [.., I, H], down [.., H, I]."""

    gate: Weights
    up: Weights
    down: Weights

    @classmethod
    def of(cls, gate: object, up: object, down: object) -> Projections | None:
        """Of three modules; None if kernels do not read one of them."""
        found = weights_of(gate), weights_of(up), weights_of(down)
        return None if None in found else cls(*found)
