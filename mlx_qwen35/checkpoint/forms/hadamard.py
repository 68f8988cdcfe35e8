"""Ternary-Bonsai (prism_hadamard_qwen35): MLX's affine weights of 2 bits, behind a rotation of what they are given.

Knows what its config.json says: which modules are packed, and the blocks of their rotations. What a rotation is,
layers/rotation.py knows.

    X.weight, X.scales, X.biases   as MLX packs 2 bits in groups of 128
    X.signs                        F32 [in] of -1 and 1; not there where the block is 0, and nothing is rotated
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from mlx_qwen35.checkpoint.files import Entry
from mlx_qwen35.checkpoint.forms.face import Made, Published, Taken
from mlx_qwen35.checkpoint.inventory import SIGNS, Shape
from mlx_qwen35.checkpoint.names import bare
from mlx_qwen35.checkpoint.part import FLOATS, Part
from mlx_qwen35.config import HADAMARD, QuantSpec
from mlx_qwen35.errors import CheckpointError

_SPEC = QuantSpec(2, 128, "affine")
_NAMESPACES = {1: "mlx-lm-text", 2: "mlx-vlm-qwen3_5"}
_BLOCKS = (0, 512, 1024, 2048, 4096, 8192)
# What config.json says of the form alone.
KEYS = ("schema_version", "base_model_type", "tensor_namespace", "gdn_activation_layout", "modules")


@dataclass(frozen=True)
class Hadamard:
    """blocks: of our packed modules; 0: nothing is rotated."""

    blocks: Mapping[str, int]
    name: ClassVar[str] = "Ternary-Bonsai"
    endings: ClassVar[tuple[str, ...]] = ()
    streams: ClassVar[bool] = True
    unused: ClassVar[tuple[str, ...]] = ()
    spec: ClassVar[QuantSpec] = _SPEC

    def make(self, ours: str, shape: Shape, found: Published) -> Made | list[str] | None:
        """A packed module of config.json's list; all else is plain."""
        module = ours.removesuffix(".weight")
        block = self.blocks.get(module) if ours.endswith(".weight") else None
        if block is None:
            return None
        taken, (height, width) = Taken(found.entries, found.stems(ours)), shape[-2:]
        if width % _SPEC.group_size or (block and width % block):
            return [f"{taken.stems[0]} has rows of {width}, which its blocks of {block} (config.json) do not divide"]
        groups = (height, width // _SPEC.group_size)
        parts = {
            ours: taken.take("weight", ("U32",), (height, width * _SPEC.bits // 32)),
            f"{module}.scales": taken.take("scales", FLOATS, groups),
            f"{module}.biases": taken.take("biases", FLOATS, groups),
        }
        if block:
            parts[f"{module}{SIGNS}"] = taken.take("signs", ("F32",), (width,))
        if taken.problems:
            return taken.problems
        return Made({name: Part(name, entries, entries[0].shape) for name, entries in parts.items()}, _SPEC)

    def left_over(self, entry: Entry) -> str | None:
        if not entry.name.endswith(SIGNS):
            return None
        return f"{entry} is left over: config.json does not list its module among those that are rotated"


def read_config(raw: Mapping[str, Any], where: str) -> Hadamard | None:
    """What a config.json says of rotations; None: it is of another form. Raises CheckpointError for what is not read.

    where: that file, for errors.
    """
    if raw.get("model_type") != HADAMARD:
        return None
    schema = raw.get("schema_version", 2)
    if not isinstance(schema, int) or _NAMESPACES.get(schema) != raw.get("tensor_namespace", _NAMESPACES[2]):
        raise _fail(where, f"schema_version {schema!r:.40} with tensor_namespace {raw.get('tensor_namespace')!r:.40}")
    if raw.get("gdn_activation_layout", "grouped") != "grouped":
        raise _fail(where, f"gdn_activation_layout {raw['gdn_activation_layout']!r:.40}")
    told = raw.get("quantization")
    due = {"bits": _SPEC.bits, "group_size": _SPEC.group_size, "mode": _SPEC.mode}
    if not isinstance(told, Mapping) or {"mode": "affine", **told} != due:
        raise _fail(where, f"quantization {told!r:.80}")
    blocks: dict[str, int] = {}
    modules = raw.get("modules")
    for record in modules if isinstance(modules, list) else ():
        path, block = (record.get(key) for key in ("path", "block")) if isinstance(record, Mapping) else (None, None)
        if not isinstance(path, str) or type(block) is not int or block not in _BLOCKS or bare(path) in blocks:
            raise _fail(where, f"the module {record!r:.120}")
        blocks[bare(path)] = block
    if not blocks:
        raise _fail(where, "no list of modules")
    return Hadamard(blocks)


def _fail(where: str, what: str) -> CheckpointError:
    return CheckpointError(f"{where} has {what}, which is no Ternary-Bonsai that this package reads: download it again")
