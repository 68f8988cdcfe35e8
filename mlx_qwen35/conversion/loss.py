"""What quantizing costs: how far what is written is from what it was made of, and when that is too far.

Knows values, and what was packed of them. Knows neither files nor why a module is quantized as it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import astuple, dataclass

import mlx.core as mx

from mlx_qwen35.checkpoint.quantize import unpack
from mlx_qwen35.config import QuantSpec

MOST_EMPTIED = 0.005  # of a module's groups; E4M3 scales of nvfp4 end at 2^-9, so that groups below 0.0059 become zero
_FLOOR = 1.2e-7  # the least scale of mx.quantize, 1e-7, in any dtype: below half of it a group of zeros is written
EVERY = 64  # rows, of which one is read back; groups are looked at in all


@dataclass(frozen=True)
class Loss:
    """lost, whole: sums of squares, of the error and of the values, over the rows that were read back. groups, emptied:
    how many groups there are, and how many of them were written as zeros without being zero."""

    lost: float = 0.0
    whole: float = 0.0
    groups: int = 0
    emptied: int = 0

    def __add__(self, other: Loss) -> Loss:
        return Loss(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    @property
    def relative(self) -> float:
        """The error by the size of the values (RMS)."""
        if self.whole == 0:
            return math.inf if self.lost > 0 else 0.0
        return math.sqrt(self.lost / self.whole)

    @property
    def emptied_share(self) -> float:
        return self.emptied / self.groups if self.groups else 0.0

    def excess(self, spec: QuantSpec, margin: float = 1.0) -> str | None:
        """Why this is too much for such a quantization; None: it is not. margin: what both limits are multiplied by."""
        # Where affine scales end lies nothing that a model misses.
        if spec.mode != "affine" and self.emptied_share > margin * MOST_EMPTIED:
            return f"{self.emptied_share:.1%} of its groups of {spec.group_size} weights become zero"
        if not self.relative <= margin * most(spec):
            return f"it loses {self.relative:.0%} of its size where {spec.bits} bits lose far less"
        return None


def most(spec: QuantSpec) -> float:
    """A relative error far above what rounding costs, far below what any other tensor in its place would: the square
    root of 2."""
    return 1.0 if spec.bits <= 2 else 0.5 if spec.bits == 3 else 0.25


def loss(weight: mx.array, found: Mapping[str, mx.array], spec: QuantSpec) -> Loss:
    """weight [.., in] floats, found: what quantize.pack() made of it."""
    rows = weight.reshape(-1, weight.shape[-1])
    flat = {kind: array.reshape(rows.shape[0], -1) for kind, array in found.items()}
    seen = rows[::EVERY].astype(mx.float32)
    back = unpack({kind: mx.contiguous(array[::EVERY]) for kind, array in flat.items()}, spec).astype(mx.float32)
    empty = flat["scales"] == 0
    if spec.mode == "affine":
        empty = mx.logical_and(mx.abs(flat["scales"]) <= _FLOOR, flat["biases"] == 0)
    lost, whole, suspects = mx.stack([mx.square(seen - back).sum(), mx.square(seen).sum(), empty.sum()]).tolist()
    emptied = 0
    if suspects:
        meant = (rows.reshape(rows.shape[0], -1, spec.group_size) != 0).any(-1)
        if spec.mode == "affine":
            codes = (flat["weight"].reshape(*empty.shape, -1) != 0).any(-1)
            empty = mx.logical_and(empty, mx.logical_or(flat["scales"] == 0, mx.logical_not(codes)))
        emptied = int(mx.logical_and(empty, meant).sum().item())
    return Loss(lost, whole, flat["scales"].size, emptied)
