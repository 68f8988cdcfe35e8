"""Elementwise steps between the products, each of them one pass on a GPU. Knows arithmetic only."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import mlx.core as mx

from .lanes import in_lanes

_LEAST = 2**16  # elements that are worth a lane of their own: a millisecond of sigmoids
_ON_GPU = mx.default_device().type == mx.gpu


def fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates elementwise arithmetic on arrays of any shape: a GPU runs it as one kernel instead of one a step.

    Not on CPU, where mx.compile calls a C++ compiler: half a second before the first token. (mlx.nn.silu is compiled.)
    """
    return mx.compile(function, shapeless=True) if _ON_GPU else function


def shared_out(function: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """Decorates elementwise arithmetic on arrays of one shape: a CPU does many elements on all cores."""

    @wraps(function)
    def on_all_cores(*arrays: mx.array) -> mx.array:
        size = arrays[0].size
        if _ON_GPU or size < 2 * _LEAST:
            return function(*arrays)
        flat = [array.reshape(-1) for array in arrays]
        parts = in_lanes(lambda part: function(*(array[part] for array in flat)), size, least=_LEAST)
        return mx.concatenate(parts).reshape(arrays[0].shape)

    return on_all_cores


@shared_out
@fused
def silu(x: mx.array) -> mx.array:
    """x * sigmoid(x)."""
    return x * mx.sigmoid(x)


@shared_out
@fused
def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """silu(gate) * up."""
    return gate * mx.sigmoid(gate) * up


@shared_out
@fused
def gated(x: mx.array, gate: mx.array) -> mx.array:
    """x * sigmoid(gate)."""
    return x * mx.sigmoid(gate)
