"""The bank whose experts are all in memory.

Knows stacked weights and how to multiply each row by its expert's. Knows no router and no files.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from ..kernels.activation import swiglu

# From this many (row, expert) pairs on, sorting them by expert pays: MLX then reads each expert once.
_SORT_FROM = 64


class _Expert(nn.Module):
    """What an adapter of mlx-lm needs to know of a linear map per expert, quantized or not."""

    @property
    def num_experts(self) -> int:
        return self.weight.shape[0]

    @property
    def output_dims(self) -> int:
        return self.weight.shape[1]

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
        return mx.gather_mm(
            x, self.weight.swapaxes(-1, -2), rhs_indices=expert_ids, sorted_indices=sorted_indices
        )

    def to_quantized(
        self, group_size: int | None = None, bits: int | None = None, mode: str = "affine"
    ) -> QuantizedExpertLinear:
        """The same map with quantized weights; nn.quantize calls this."""
        weight, scales, *biases = mx.quantize(self.weight, group_size, bits, mode)
        return QuantizedExpertLinear(weight, scales, *biases, group_size=group_size, bits=bits, mode=mode)


class QuantizedExpertLinear(_Expert):
    """ExpertLinear with the weights of mx.quantize: weight uint32, scales, and biases where the mode is affine."""

    def __init__(
        self,
        weight: mx.array,
        scales: mx.array,
        biases: mx.array | None = None,
        *,
        group_size: int | None,
        bits: int | None,
        mode: str,
    ):
        super().__init__()
        self.weight, self.scales = weight, scales
        if biases is not None:
            self.biases = biases
        self.group_size, self.bits, self.mode = group_size, bits, mode
        self.freeze()

    @property
    def input_dims(self) -> int:
        return self.scales.shape[2] * self.group_size

    def __call__(self, x: mx.array, expert_ids: mx.array, *, sorted_indices: bool) -> mx.array:
        return mx.gather_qmm(
            x,
            self.weight,
            self.scales,
            self.get("biases"),
            rhs_indices=expert_ids,
            transpose=True,
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
            sorted_indices=sorted_indices,
        )


class ResidentExperts(nn.Module):
    """All experts of one layer: down(silu(gate(x)) * up(x)) each."""

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = ExpertLinear(num_experts, hidden_size, intermediate_size)
        self.up_proj = ExpertLinear(num_experts, hidden_size, intermediate_size)
        self.down_proj = ExpertLinear(num_experts, intermediate_size, hidden_size)

    def __call__(self, x: mx.array, expert_ids: mx.array, weights: mx.array) -> mx.array:
        """x [N, H], expert_ids [N, K] int, weights [N, K] -> sum over K of weight * expert(x), [N, H]."""
        if expert_ids.size < _SORT_FROM:
            y = self._experts(x[:, None, None, :], expert_ids, sorted_indices=False)  # [N, K, 1, H]
        else:
            # pairs in the order of x:      row 0 0 1 1 2 2   expert 5 1 1 4 5 0
            # sorted by expert:             row 2 0 1 1 0 2   expert 0 1 1 4 5 5
            order = mx.argsort(expert_ids.flatten())
            rows = x[order // expert_ids.shape[1]][:, None, :]  # [N*K, 1, H]
            y = self._experts(rows, expert_ids.flatten()[order], sorted_indices=True)
            y = y[mx.argsort(order)].reshape(*expert_ids.shape, 1, -1)  # [N, K, 1, H]
        return (y.squeeze(-2) * weights[..., None]).sum(axis=-2)

    def _experts(self, x: mx.array, expert_ids: mx.array, *, sorted_indices: bool) -> mx.array:
        gate = self.gate_proj(x, expert_ids, sorted_indices=sorted_indices)
        up = self.up_proj(x, expert_ids, sorted_indices=sorted_indices)
        return self.down_proj(swiglu(gate, up), expert_ids, sorted_indices=sorted_indices)
