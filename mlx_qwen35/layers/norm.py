"""RMS normalisation. Knows one scale vector; the statistics are float32 whatever the dtype."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from ..kernels.activation import fused, shared_out
from ..kernels.add_norm import add_norm
from ..kernels.rms_norm import rms_norm


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis; `weight` is the effective scale (1 + w of the published files)."""

    unfused = False  # MLX's operations take the kernel's place: it was found wrong here, or is not wanted
    apart = False  # and this for the kernel of the product behind it

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = mx.ones((size,))
        self.eps = eps

    def __call__(self, x: mx.array) -> mx.array:
        # A float32 scale beside bfloat16 activations promotes the result: bring it back.
        return rms_norm(x, self.weight, self.eps).astype(x.dtype)

    @property
    def meets_products(self) -> bool:
        """Whether a product's launch may take this norm in."""
        return not (self.training or self.unfused or self.apart)

    def after(self, x: mx.array, added: mx.array | None) -> tuple[mx.array, mx.array]:
        """x + added (None: nothing), and the norm of it."""
        if added is None:
            return x, self(x)
        return add_norm(x, added, self.weight, eps=self.eps, differentiable=self.training or self.unfused)


class GatedRMSNorm(RMSNorm):
    """rms(x) * weight * silu(gate): the norm of the delta layers, gated in float32."""

    def __call__(self, x: mx.array, gate: mx.array) -> mx.array:
        return _gated(rms_norm(x, self.weight, self.eps), gate).astype(x.dtype)


@shared_out
@fused
def _gated(normed: mx.array, gate: mx.array) -> mx.array:
    """normed * silu(gate) in float32, in the dtype of gate."""
    exact = gate.astype(mx.float32)
    return (normed.astype(mx.float32) * (exact * mx.sigmoid(exact))).astype(gate.dtype)
