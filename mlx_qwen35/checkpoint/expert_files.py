"""Where the experts of a checkpoint lie in its files: in the shards, or in the records that were packed beside them.

Knows how published tensors and records hold experts. Reads headers, and a few bytes of each layer's records to tell
that they are those of the shards beside them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_qwen35.checkpoint import files
from mlx_qwen35.checkpoint.files import Entry
from mlx_qwen35.checkpoint.gguf.part import GgufPart
from mlx_qwen35.checkpoint.gguf.unpacking import expert_tensor
from mlx_qwen35.checkpoint.part import AnyPart, Part
from mlx_qwen35.checkpoint.source import Source
from mlx_qwen35.errors import CheckpointError
from mlx_qwen35.experts.layout import Extent, Fixed, LayerLayout, Tensor

FORMAT, VERSION = "mlx-qwen35-experts", 1  # of the records that conversion/records.py packs
_COMPARED = 4096  # bytes of each tensor of one expert


def expert_layouts(source: Source) -> dict[int, LayerLayout]:
    """The experts of every layer. Packed records are taken where there are any.

    Raises CheckpointError where experts are in a form that has to be converted first (FP8 in blocks, GPTQ, ...), and
    for records that are damaged or not of these shards.
    """
    if not source.streamable:
        raise CheckpointError(
            f"{source.folder}: experts in {source.form.name} cannot be streamed as they are. Convert the "
            f"checkpoint, which takes little memory: mlx-qwen35 convert {source.folder} TARGET -q"
        )
    layers: dict[int, list[AnyPart]] = {}
    for ours, part in source.parts.items():
        if ours.startswith("layers.") and ".mlp.experts." in ours:
            layers.setdefault(int(ours.split(".")[1]), []).append(part)
    found = {}
    for layer, parts in sorted(layers.items()):
        shards = _in_shards(layer, parts)
        found[layer] = _packed(source.folder, shards) or shards
    return found


def fingerprint(layouts: Mapping[int, LayerLayout]) -> str:
    """Of these experts, as far as a few bytes of each layer tell; the same in shards and in records."""
    made = hashlib.sha256()
    for number, layout in sorted(layouts.items()):
        extents = zip(layout.tensors, layout.extents(number % layout.num_experts), strict=True)
        for tensor, extent in sorted(extents, key=lambda pair: pair[0].name):
            made.update(repr((number, layout.num_experts, tensor.name, tensor.dtype, tensor.shape)).encode())
            made.update(_beginning(extent))
    return made.hexdigest()[:32]


def _in_shards(layer: int, parts: list[AnyPart]) -> LayerLayout:
    stem = f"layers.{layer}.mlp.experts."
    count = parts[0].shape[0]
    fixed = tuple(
        Fixed(part.ours.removeprefix(stem), part.dtype, part.shape[1:], part.passing.fixed)
        for part in parts
        if part.passing.fixed is not None
    )
    parts = [part for part in parts if part.passing.fixed is None]
    if all(part.stacked for part in parts):  # a tensor for each expert
        tensors = tuple(_tensor(part, stem) for part in parts)
        places = tuple(
            tuple(Extent(e.file, e.offset, e.nbytes) for e in (part.entries[expert] for part in parts))
            for expert in range(count)
        )
        return LayerLayout(layer, count, tensors, places, fixed=fixed)
    placed = [found for part in parts if (found := _in_one(part, stem)) is not None]
    tensors, first, steps = zip(*placed, strict=True)
    return LayerLayout(layer, count, tensors, (first,), steps, fixed)


def _tensor(part: AnyPart, stem: str) -> Tensor:
    name, passing = part.ours.removeprefix(stem), part.passing
    return Tensor(name, part.entries[0].dtype, part.shape[1:], passing.step, passing.exact)


def _in_one(part: AnyPart, stem: str) -> tuple[Tensor, Extent, int] | None:
    """(a tensor of one expert, where expert 0 has it, bytes to the next) of what all experts lie in one tensor of.

    None: another part brings it along. Gate and up of an expert may be two halves: [gate 0 | up 0 | gate 1 | up 1 ...]
    """
    if isinstance(part, GgufPart):
        return expert_tensor(part, part.ours.removeprefix(stem))
    entry, tensor = part.entries[0], _tensor(part, stem)
    half = (part.half or 0) if isinstance(part, Part) else 0
    return tensor, Extent(entry.file, entry.offset + half * tensor.nbytes, tensor.nbytes), entry.nbytes // part.shape[0]


def _packed(folder: Path, shards: LayerLayout) -> LayerLayout | None:
    """The same experts in the records of their layer; None if there are no records."""
    path = folder / "experts" / f"layer-{shards.layer:05d}.safetensors"
    if not path.exists():
        return None
    advice = f"delete {path.parent}, which only makes reading faster, or convert the original again with --pack-experts"
    entries, metadata = files.read_header(path)
    records = entries.get("records")
    told = _told(metadata)
    if records is None or told is None or (records.dtype, len(records.shape)) != ("U8", 2):
        raise CheckpointError(f"{path} is no file of expert records that this version reads: {advice}")
    expected = {(tensor.name, tensor.dtype, tensor.shape) for tensor in shards.tensors}
    here = {(part["name"], part["dtype"], tuple(part["shape"])) for part in told}
    count, step = records.shape
    fit = all(0 <= part["offset"] and part["offset"] + part["nbytes"] <= step for part in told)
    if here != expected or count != shards.num_experts or not fit or metadata.get("layer") != str(shards.layer):
        raise CheckpointError(f"{path} holds other experts than the shards beside it: {advice}")
    tensors = tuple(Tensor(part["name"], part["dtype"], tuple(part["shape"])) for part in told)
    place = tuple(Extent(path, records.offset + part["offset"], part["nbytes"]) for part in told)
    try:
        packed = LayerLayout(shards.layer, count, tensors, (place,), (step,) * len(tensors))
    except ValueError:
        raise CheckpointError(f"{path}: sizes and shapes of its records contradict each other: {advice}") from None
    if not _same_bytes(packed, shards):
        raise CheckpointError(f"{path} was made of other weights than the shards beside it: {advice}")
    return packed


def _told(metadata: dict[str, str]) -> list[dict[str, Any]] | None:
    """The parts of a record, as the metadata has them; None if they are not told in the way that this version knows."""
    if (metadata.get("format"), metadata.get("version")) != (FORMAT, str(VERSION)):
        return None
    try:
        parts = json.loads(metadata["parts"])
        kinds = {"name": str, "dtype": str, "shape": list, "offset": int, "nbytes": int}
        good = all(isinstance(part[key], kind) for part in parts for key, kind in kinds.items())
        return parts if good and all(type(size) is int for part in parts for size in part["shape"]) else None
    except (KeyError, TypeError, ValueError):
        return None


def _same_bytes(packed: LayerLayout, shards: LayerLayout) -> bool:
    """Whether the beginnings of one expert's tensors agree; which one differs from layer to layer."""
    expert = shards.layer % shards.num_experts
    there = dict(zip((tensor.name for tensor in shards.tensors), shards.extents(expert), strict=True))
    here = zip((tensor.name for tensor in packed.tensors), packed.extents(expert), strict=True)
    return all(_beginning(extent) == _beginning(there[name]) for name, extent in here)


def _beginning(extent: Extent) -> bytes:
    size = min(extent.nbytes, _COMPARED)
    return files.read(Entry("an expert", extent.file, "U8", (size,), extent.offset, size)).tobytes()
