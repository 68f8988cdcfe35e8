"""Elementwise steps between the products, each of them one pass on a GPU. Knows arithmetic only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx

_ON_GPU = mx.default_device().type == mx.gpu


def fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates elementwise arithmetic on arrays of any shape: a GPU runs it as one kernel instead of one a step.

    Not on CPU, where mx.compile calls a C++ compiler: half a second before the first token. (mlx.nn.silu is compiled.)
    """
    return mx.compile(function, shapeless=True) if _ON_GPU else function


@fused
def silu(x: mx.array) -> mx.array:
    """x * sigmoid(x)."""
    return x * mx.sigmoid(x)


@fused
def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """silu(gate) * up."""
    return gate * mx.sigmoid(gate) * up


@fused
def gated(x: mx.array, gate: mx.array) -> mx.array:
    """x * sigmoid(gate)."""
    return x * mx.sigmoid(gate)
