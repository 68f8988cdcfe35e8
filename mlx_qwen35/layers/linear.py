"""A linear map whose quantized form takes the product that suits device and rows. Knows weights, not what they mean."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from ..kernels import one_row
from ..kernels.few_rows import ALIGNED, MOST_ROWS, unpacks
from ..kernels.lanes import LEAST_SHARED, in_lanes, lane_count
from ..kernels.matmul import matmul
from ..kernels.once import cut
from ..kernels.quantized_matmul import quantized_matmul
from ..kernels.weights import Readable
from .rotation import rotated


class Linear(Readable, nn.Linear):
    """nn.Linear through kernels.matmul, that quantizes to the QuantizedLinear below."""

    _multiply = staticmethod(matmul)

    def be_exact(self) -> None:
        """From now on a few rows have the bits that each has alone, on every device."""
        self._multiply = one_row.matmul

    def __call__(self, x: mx.array) -> mx.array:
        """x [.., in] -> [.., out]."""
        y = self._multiply(x, self.weight)
        return y + self.bias if "bias" in self else y

    def to_quantized(
        self, group_size: int | None = None, bits: int | None = None, mode: str = "affine", quantize_input: bool = False
    ) -> nn.Module:
        """nn.quantize calls this."""
        if quantize_input:
            return super().to_quantized(group_size, bits, mode, quantize_input)
        return QuantizedLinear.from_linear(self, group_size, bits, mode)


class QuantizedLinear(Readable, nn.QuantizedLinear):
    """nn.QuantizedLinear through kernels.quantized_matmul.

    factors: float32 [1] or [out], where a checkpoint has a scale for the whole tensor or each row beside those of
    groups: the product is multiplied by it in float32. signs: [in], where its weights are behind a rotation of their
    input, in blocks of `block` columns (rotation.py).
    """

    block = 0

    _multiply = staticmethod(quantized_matmul)

    def be_exact(self) -> None:
        """From now on a few rows have the bits that each has alone, on every device."""
        self._multiply = one_row.quantized_matmul

    def __call__(self, x: mx.array) -> mx.array:
        """x [.., in] -> [.., out]."""
        y = self.product(self.turned(x), self.weight, self.scales, self.get("biases"))
        if "factors" in self:
            y = (y * self.factors).astype(y.dtype)
        return y + self.bias if "bias" in self else y

    def turned(self, x: mx.array) -> mx.array:
        """x [.., in] as product() needs it."""
        return rotated(x, self.signs, self.block) if "signs" in self else x

    def product(self, x: mx.array, weight: mx.array, scales: mx.array, biases: mx.array | None = None) -> mx.array:
        """x [.., in] with other weights [any, in] of the same quantization -> [.., any]."""
        how = {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}
        return self._multiply(x, weight, scales, biases, **how)

    def rows(self, x: mx.array, taken: slice) -> mx.array:
        """x [.., in] -> some of its outputs, without bias, [.., taken]."""
        packed = [self.weight, self.scales, *([self.biases] if "biases" in self else [])]
        return self.product(x, *(cut(part, taken) for part in packed))


def is_bare(module: nn.Module) -> bool:
    """Whether a map is quantized and its product is all that comes out: no bias, no factors, no adapter."""
    return type(module) is QuantizedLinear and "bias" not in module and "factors" not in module


def worth_lanes(x: mx.array, *maps: nn.Module) -> bool:
    """Whether a CPU's lanes may each take some outputs of these maps: quantized, x [.., in] of a few rows, and none of
    the products is one that shares itself out (kernels/few_rows)."""
    few = x.size // x.shape[-1] <= MOST_ROWS and mx.default_device().type == mx.cpu
    if not few or lane_count() == 1 or not all(is_bare(m) and "signs" not in m for m in maps):
        return False
    sizes = ((m, m.weight.shape[0], m.scales.shape[1] * m.group_size) for m in maps)
    return not any(unpacks(x, outputs, inputs=inputs, bits=m.bits, mode=m.mode) for m, outputs, inputs in sizes)


def rows_in_lanes(compute: Callable[[slice], mx.array], count: int, work: int) -> list[mx.array]:
    """compute(rows) for slices of `count` outputs, each in its lane; work: products that one output takes of one row.

    How the outputs are cut does not hang on how many rows there are, so that no bits can.
    """
    return in_lanes(compute, count, least=-(-LEAST_SHARED // work), aligned=ALIGNED)
