"""What packed parts stand for, in float32, for whoever does not compute with those as they are.

Knows packed parts, factors and rotations. Knows no form.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import mlx.core as mx

from mlx_qwen35.checkpoint.files import Entry
from mlx_qwen35.checkpoint.forms.face import Made
from mlx_qwen35.checkpoint.inventory import Shape
from mlx_qwen35.checkpoint.part import AnyPart, OfEntries
from mlx_qwen35.checkpoint.quantize import unpack
from mlx_qwen35.config import QuantSpec
from mlx_qwen35.layers.rotation import unrotated


@dataclass(frozen=True)
class Values(OfEntries):
    """The values that packed parts stand for, where nothing computes with those as they are.

    packed: "weight", "scales", .. and perhaps "factors"; spec: of them; dtype: of the model that was quantized. signs,
    block: of the rotation that they are behind.
    """

    ours: str
    packed: Mapping[str, AnyPart]
    spec: QuantSpec
    shape: Shape
    dtype: str
    signs: AnyPart | None = None
    block: int = 0
    computed: ClassVar[bool] = True
    passing: ClassVar[None] = None

    @property
    def entries(self) -> tuple[Entry, ...]:
        return tuple(dict.fromkeys(entry for part in self.packed.values() for entry in part.entries))

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.packed.values())

    @property
    def stacked(self) -> bool:
        return self.packed["weight"].stacked

    @property
    def cuts(self) -> bool:
        return all(part.cuts for part in self.packed.values())

    @property
    def growth(self) -> int:
        return 32 // self.spec.bits

    def fetch(self, start: int = 0, stop: int | None = None) -> dict[str, Any]:
        return {kind: part.fetch(start, stop) for kind, part in self.packed.items()}

    def finish(self, raw: dict[str, Any], dtype: mx.Dtype | None) -> mx.array:
        made = {kind: part.finish(raw[kind], None) for kind, part in self.packed.items()}
        x = unpack(made, self.spec)
        if self.signs is not None:
            x = unrotated(x, self.signs.finish(self.signs.fetch(), None), self.block)
        x = x.astype(dtype or mx.float32)
        mx.eval(x)
        return x


def as_floats(ours: str, shape: Shape, made: Made, dtype: str) -> Made:
    """The same values, dequantized."""
    if made.spec is None:
        return made
    packed = {name.rpartition(".")[2]: part for name, part in made.parts.items()}
    return Made({ours: Values(ours, packed, made.spec, shape, dtype)})
