"""GGUF as a published form: which parts each of our tensors is made of.

Knows how a tensor that llama.cpp wrote becomes one of ours. Reads no weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from mlx_qwen35.checkpoint.files import Entry
from mlx_qwen35.checkpoint.forms.face import Made, Published
from mlx_qwen35.checkpoint.gguf.container import GgufTensor
from mlx_qwen35.checkpoint.gguf.decode import can_decode
from mlx_qwen35.checkpoint.gguf.origins import Origin
from mlx_qwen35.checkpoint.gguf.part import BIASES, SCALES, VALUES, WORDS, GgufPart, factors_of, packing
from mlx_qwen35.checkpoint.gguf.patches import FramesPart
from mlx_qwen35.checkpoint.inventory import PATCH_EMBEDDING, Shape, is_linear
from mlx_qwen35.checkpoint.names import TARGET
from mlx_qwen35.checkpoint.part import FLOATS, Part
from mlx_qwen35.checkpoint.quantize import packed

_KINDS = {"weight": WORDS, "scales": SCALES, "biases": BIASES}


def _half(origin: Origin) -> int | None:
    """Which half of each expert's rows these are, where they are floats that were fused and nothing else: 0, 1."""
    bare = origin.heads is None and not origin.log and origin.scale is None and origin.tensor.kind.name in FLOATS
    fused = len(origin.shape) == 3 and origin.tensor.shape[1:2] == (2 * origin.shape[1],)
    return (1 if origin.runs[0][0] else 0) if bare and fused and origin.runs else None


@dataclass(frozen=True)
class GgufForm:
    """origins: of our tensors; frames: of the patch embedding, () without a vision tower; label: of the recipe by which
    the model was quantized, such as "Q4_K_M"; notes: what whoever loads it should know."""

    origins: Mapping[str, Origin]
    frames: tuple[GgufTensor, ...]
    label: str
    notes: tuple[str, ...] = ()

    name = "GGUF"
    endings = ()
    unused = ()
    spec = None
    streams = False

    def entries(self) -> dict[str, Entry]:
        """Every tensor of ours under the name that a written checkpoint gives it, with its place in the file."""
        made = {}
        for ours, origin in self.origins.items():
            name = TARGET.source(ours).names[0]
            tensor = origin.tensor
            dtype = tensor.kind.name if origin.is_plain else f"GGUF:{tensor.kind.name}"
            made[name] = Entry(name, tensor.file, dtype, origin.shape, tensor.offset, origin.nbytes)
        stem = TARGET.source(PATCH_EMBEDDING).names[0]
        for number, tensor in enumerate(self.frames):
            name = f"{stem}.{number}" if number else stem
            made[name] = Entry(name, tensor.file, tensor.kind.name, tensor.shape, tensor.offset, tensor.nbytes)
        return made

    def make(self, ours: str, shape: Shape, found: Published) -> Made | list[str] | None:
        """The parts of one of our tensors, of that unquantized shape; None: it lies as it is. A list: what is wrong."""
        if ours == PATCH_EMBEDDING and self.frames:
            return self._patches(ours, shape, found)
        origin = self.origins.get(ours)
        if origin is None:
            return [f"{ours} is in none of the files (expected {list(shape)})"]
        tensor = origin.tensor
        if origin.shape != shape:
            return [f"{tensor} has shape {list(origin.shape)} as {ours}, expected {list(shape)}"]
        if origin.is_plain:
            return None
        half = _half(origin)
        if half is not None:
            entry = found.entries[TARGET.source(ours).names[0]]
            whole = replace(entry, dtype=tensor.kind.name, shape=tensor.shape, nbytes=tensor.nbytes)
            return Made({ours: Part(ours, (whole,), shape, half=half)}, None)
        if not can_decode(tensor.kind.name) or (len(shape) < 2 and tensor.kind.values > 1):
            return [f"{tensor} is {tensor.kind.name} {list(tensor.shape)}, which no {ours} of this family is"]
        entries = (found.entries[TARGET.source(ours).names[0]],)
        spec, factors = packing(origin) if is_linear(ours, shape) else None, None
        if origin.scale is not None and is_linear(ours, shape):
            factors = factors_of(ours.removesuffix(".weight"), shape, origin.scale)
            bare = replace(origin, scale=None)
            if factors is not None and packing(bare):
                spec, origin = packing(bare), bare
        if spec is None:
            return Made({ours: GgufPart(ours, entries, origin, shape, VALUES)}, None)
        stem = ours.removesuffix(".weight")
        parts = {
            f"{stem}.{kind}": GgufPart(f"{stem}.{kind}", entries, origin, inner, _KINDS[kind])
            for kind, (inner, _) in packed(shape, spec).items()
        }
        return Made(parts if factors is None else {**parts, factors.ours: factors}, spec)

    def _patches(self, ours: str, shape: Shape, found: Published) -> Made | list[str]:
        name = TARGET.source(ours).names[0]
        names = [name, f"{name}.1"]
        entries = tuple(found.entries[n] for n in names if n in found.entries)
        first = entries[0]
        if len(entries) != 2 or len(first.shape) != 4 or any(e.shape != first.shape for e in entries):
            return [f"{first} and its second frame have the shapes {[list(entry.shape) for entry in entries]}"]
        if any(entry.dtype not in ("F32", "F16", "BF16") or entry.dtype != first.dtype for entry in entries):
            return [f"{first} is {first.dtype}, expected F32, F16 or BF16 as its second frame"]
        part = FramesPart(ours, entries)
        if part.shape != shape:
            return [f"{first} has shape {list(first.shape)}, which makes {list(part.shape)}, expected {list(shape)}"]
        return Made({ours: part}, None)

    def left_over(self, entry: Entry) -> str | None:
        return None
