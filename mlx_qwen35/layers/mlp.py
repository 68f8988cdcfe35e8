"""The dense feed-forward block. Knows three projections."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from ..kernels.activation import swiglu
from ..kernels.lanes import together
from ..kernels.weights import Projections, weights_of
from .joined import JoinedInputs, columns
from .linear import Linear, rows_in_lanes, worth_lanes
from .summed import Summed


class MLP(JoinedInputs, nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=False)
        self._widths = [intermediate_size, intermediate_size]

    def __call__(self, x: mx.array | Summed) -> mx.array:
        """x [.., H], or what is to be its norm -> [.., H]."""
        if isinstance(x, Summed):
            hidden = x.through(weights_of(self.gate_proj), weights_of(self.up_proj), gated=True)
            if hidden is not None:
                return self.down_proj(hidden)
            x = x.normed
        if worth_lanes(x, self.gate_proj, self.up_proj, self.down_proj):
            return self._in_lanes(x)
        made = self._joined(x, self.joinable())
        return self.down_proj(swiglu(*columns(made, self._widths)))

    def _in_lanes(self, x: mx.array) -> mx.array:
        """The same for a few rows on a CPU: lanes share the hidden values, exchange them, and share the outputs."""
        hidden, outputs = self._widths[0], x.shape[-1]

        def first(rows: slice) -> mx.array:
            return swiglu(self.gate_proj.rows(x, rows), self.up_proj.rows(x, rows))

        def second(rows: slice) -> mx.array:
            return self.down_proj.rows(together(parts), rows)

        parts = rows_in_lanes(first, hidden, 2 * outputs)
        return together(rows_in_lanes(second, outputs, hidden))

    def joinable(self) -> list[nn.Module]:
        return [self.gate_proj, self.up_proj]

    def projections(self) -> Projections | None:
        """The three matrices as kernels read them; None if they do not know one."""
        return Projections.of(self.gate_proj, self.up_proj, self.down_proj)
