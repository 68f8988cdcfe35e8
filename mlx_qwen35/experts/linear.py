"""One linear map per expert, stacked, plain or quantized.

Knows weights and how rows meet their expert's. Knows neither what the three maps of an expert make together nor where
the weights come from: a stack may be all experts of a layer, or slots that some of them are in.
"""

from __future__ import annotations

import math
from functools import lru_cache

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..kernels.few_rows import plain_blas
from ..kernels.matmul import matmul
from ..kernels.once import cut
from ..kernels.quantized_matmul import quantized_matmul
from ..kernels.weights import Readable

_REMEMBERED = 64  # pairs of rows and experts


class _Expert(Readable, nn.Module):
    """What an adapter of mlx-lm needs to know of a linear map per expert, quantized or not."""

    @property
    def num_experts(self) -> int:
        return self.weight.shape[0]

    @property
    def output_dims(self) -> int:
        return self.weight.shape[1]

    def of(self, expert: int, rows: mx.array) -> mx.array:
        """rows [R, in] through one expert's map -> [R, out]."""
        raise NotImplementedError

    def to_lora(self, r: int, scale: float, dropout: float) -> nn.Module:
        """The same map with a low-rank one beside it; mlx-lm's linear_to_lora_layers calls this."""
        from mlx_lm.tuner.lora import LoRASwitchLinear

        return LoRASwitchLinear.from_base(self, r=r, scale=scale, dropout=dropout)


class ExpertLinear(_Expert):
    """One linear map per expert: weight [E, out, in]."""

    def __init__(self, num_experts: int, in_size: int, out_size: int):
        super().__init__()
        bound = in_size**-0.5
        self.weight = mx.random.uniform(-bound, bound, (num_experts, out_size, in_size))

    @property
    def input_dims(self) -> int:
        return self.weight.shape[2]

    def __call__(self, x: mx.array, expert_ids: mx.array, *, sorted_indices: bool) -> mx.array:
        """x [.., 1, in], expert_ids: the leading axes of x, or broadcast with them -> [.., 1, out]."""
        return mx.gather_mm(x, self.weight.swapaxes(-1, -2), rhs_indices=expert_ids, sorted_indices=sorted_indices)

    def of(self, expert: int, rows: mx.array) -> mx.array:
        return matmul(rows, self.weight[expert])

    def of_each(self, expert_ids: mx.array, rows: mx.array) -> mx.array:
        """rows [R, in], each through the map of its own expert, expert_ids [R] -> [R, out], with the bits that
        kernels.matmul has for each row."""
        if plain_blas():
            return self(rows[:, None], expert_ids, sorted_indices=False).squeeze(-2)
        own = _rows((len(rows),), (len(rows),))  # which MLX would make anew
        return mx.gather_mm(self.weight, rows[..., None], lhs_indices=expert_ids, rhs_indices=own).squeeze(-1)

    def to_quantized(
        self, group_size: int | None = None, bits: int | None = None, mode: str = "affine"
    ) -> QuantizedExpertLinear:
        """The same map with quantized weights; nn.quantize calls this."""
        weight, scales, *biases = mx.quantize(self.weight, group_size, bits, mode)
        return QuantizedExpertLinear(weight, scales, *biases, group_size=group_size, bits=bits, mode=mode)


class QuantizedExpertLinear(_Expert):
    """ExpertLinear with the weights of mx.quantize: weight uint32, scales, and biases where the mode is affine.

    factors: float32 [E, 1] or [E, out], where a checkpoint has a scale for each whole tensor or row beside those of
    groups: products are multiplied by them in float32.
    """

    def __init__(
        self,
        weight: mx.array,
        scales: mx.array,
        biases: mx.array | None = None,
        factors: mx.array | None = None,
        *,
        group_size: int | None,
        bits: int | None,
        mode: str,
    ):
        super().__init__()
        self.weight, self.scales = weight, scales
        if biases is not None:
            self.biases = biases
        if factors is not None:
            self.factors = factors
        self.group_size, self.bits, self.mode = group_size, bits, mode
        self.freeze()

    @property
    def input_dims(self) -> int:
        return self.scales.shape[2] * self.group_size

    def __call__(
        self, x: mx.array, expert_ids: mx.array, *, sorted_indices: bool, taken: slice | None = None
    ) -> mx.array:
        """taken: these outputs alone."""
        packed = [self.weight, self.scales, self.get("biases")]
        if taken is not None:
            packed = [part if part is None else cut(part, taken, axis=1) for part in packed]
        y = mx.gather_qmm(
            x,
            *packed,
            # Where rows lie sorted, MLX's faster form for them needs that these are left out.
            lhs_indices=None if sorted_indices else _rows(x.shape[:-2], expert_ids.shape),
            rhs_indices=expert_ids,
            transpose=True,
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
            sorted_indices=sorted_indices,
        )
        if "factors" not in self:
            return y
        factors = self.factors if taken is None or self.factors.shape[1] == 1 else self.factors[:, taken]
        return (y * factors[expert_ids][..., None, :]).astype(y.dtype)

    def of(self, expert: int, rows: mx.array) -> mx.array:
        biases = self.get("biases")
        y = quantized_matmul(
            rows,
            self.weight[expert],
            self.scales[expert],
            None if biases is None else biases[expert],
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
            kept=False,
        )
        return (y * self.factors[expert]).astype(y.dtype) if "factors" in self else y


@lru_cache
def _rows(rows: tuple[int, ...], pairs: tuple[int, ...]) -> mx.array | None:
    """Which row a pair takes, for rows of this shape that are broadcast to `pairs`: what MLX makes anew at every call.

    Of few pairs; of more, where that is no part of the time, None: MLX is to make it.
    """
    if math.prod(pairs) > _REMEMBERED:
        return None
    return mx.array(np.broadcast_to(np.arange(math.prod(rows), dtype=np.uint32).reshape(rows), pairs))
