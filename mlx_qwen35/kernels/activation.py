"""The gate of every feed-forward block. Knows arithmetic only.

One fused pass on a GPU. Not on CPU: mx.compile calls a C++ compiler there, half a second before the first token, and
mlx.nn.silu is compiled.
"""

from __future__ import annotations

import mlx.core as mx

_fused = mx.compile if mx.is_available(mx.gpu) else lambda function: function


@_fused
def silu(x: mx.array) -> mx.array:
    """x * sigmoid(x)."""
    return x * mx.sigmoid(x)


@_fused
def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """silu(gate) * up."""
    return gate * mx.sigmoid(gate) * up
