"""AWQ checkpoints: 4 bits, each group with a zero of its own, eight rows to a word.

Knows quantization_config of quant_method "awq" (AutoAWQ's, and what AutoRound writes in its packing), and the three
tensors of a module. What they are in MLX's terms is integers.py's.

    X.qweight  I32 [in, out / 8]           values 0 2 4 6 1 3 5 7 of eight rows, from the lowest bits of a word on
    X.qzeros   I32 [in / group, out / 8]   alike
    X.scales   F16 [in / group, out]       value = scale * (q - zero)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from mlx_qwen35.checkpoint.files import Entry
from mlx_qwen35.checkpoint.forms import integers
from mlx_qwen35.checkpoint.forms.face import LEAST, Made, Published, Taken, named_dtype
from mlx_qwen35.checkpoint.forms.integers import Integers
from mlx_qwen35.checkpoint.inventory import Shape, is_linear
from mlx_qwen35.config import GROUP_SIZES, QuantSpec
from mlx_qwen35.errors import CheckpointError

_BITS = 4
_SCALES = ("F16", "BF16", "F32")
_SIZES = (-1, *GROUP_SIZES["affine"])


@dataclass(frozen=True)
class Awq:
    """What config.json says. group: of columns; None: all of a row. dtype: of the model that was quantized."""

    group: int | None
    dtype: str
    name: ClassVar[str] = "AWQ"
    endings: ClassVar[tuple[str, ...]] = (".qweight", ".qzeros", ".scales")
    streams: ClassVar[bool] = False
    unused: ClassVar[tuple[str, ...]] = ()

    @property
    def spec(self) -> QuantSpec:
        return QuantSpec(_BITS, self.group or GROUP_SIZES["affine"][-1], "affine")

    def make(self, ours: str, shape: Shape, found: Published) -> Made | list[str] | None:
        """The integers of a linear map of the text model or the MTP layer, as MLX packs them."""
        stems = () if ours.startswith("vision.") or not is_linear(ours, shape) else found.stems(ours)
        taken = Taken(found.entries, stems)
        if not taken.has("qweight"):
            return None
        *_, height, width = shape
        group = self.group or width
        if width % group or height % 8 or width % 8:
            return [f"{stems[0]}.qweight is of a [{height}, {width}] map, which groups of {group} do not divide"]
        qweight = taken.take("qweight", ("I32",), (width, height // 8))
        zeros = taken.take("qzeros", ("I32",), (width // group, height // 8))
        scales = taken.take("scales", _SCALES, (width // group, height))
        if taken.problems:
            return taken.problems
        return Integers(integers.awq(), shape, qweight, scales, zeros, dtype=self.dtype).made(ours)

    def left_over(self, entry: Entry) -> str | None:
        if not entry.name.endswith(self.endings):
            return None
        return f"{entry} is left over: AWQ is read in linear maps of the text model only, and has no part of its own"


def read_config(section: Mapping[str, Any], raw: Mapping[str, Any], where: str) -> Awq:
    """What a quantization_config of quant_method "awq" says; raises CheckpointError for what of it is not read.

    raw: all of config.json; where: the file, for errors.
    """
    bits, group, version = section.get("bits"), section.get("group_size"), section.get("version", "gemm")
    if type(bits) is not int or bits != _BITS:
        raise _fail(where, "bits", f"is {bits!r:.40}, and AWQ is read with 4 bits only")
    if type(group) is not int or group not in _SIZES:
        raise _fail(where, "group_size", f"is {group!r:.40}, and MLX has groups of {_SIZES[1:]} only")
    if not isinstance(version, str) or version.lower() != "gemm":
        raise _fail(where, "version", f"is {version!r:.40}, and only 'gemm' is read")
    return Awq(None if group == -1 else group, named_dtype(raw))


def _fail(where: str, key: str, problem: str) -> CheckpointError:
    return CheckpointError(f"{where}: quantization_config.{key} {problem}: {LEAST}")
