"""What a conversion to GGUF writes: one file for the text model, one for the vision tower.

Knows a source and what is asked for. Reads headers, norms and companions, no other weight, and writes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_qwen35.checkpoint.inventory import mtp_tensors
from mlx_qwen35.checkpoint.source import Source
from mlx_qwen35.conversion.gguf.asked import check_config
from mlx_qwen35.conversion.gguf.header import header
from mlx_qwen35.conversion.gguf.metadata import (
    Metadata,
    architecture,
    general_metadata,
    sampling_metadata,
    size_label,
    text_metadata,
    vision_metadata,
)
from mlx_qwen35.conversion.gguf.outtype import file_number, split_name, tower_name
from mlx_qwen35.conversion.gguf.tensors import GgufPiece, Tensor, tensors_of
from mlx_qwen35.conversion.gguf.vocabulary import Read, vocabulary
from mlx_qwen35.conversion.plan import make_plan
from mlx_qwen35.conversion.task import Task, Update
from mlx_qwen35.conversion.write import PlacedFile
from mlx_qwen35.errors import CheckpointError


@dataclass(frozen=True)
class GgufPlan:
    """One file. name: of the file."""

    name: str
    metadata: Metadata
    tensors: tuple[Tensor, ...]

    @cached_property
    def header(self) -> tuple[bytes, dict[str, tuple[int, int]]]:
        """Its first bytes, and where each tensor lies: (offset, bytes)."""
        return header(self.metadata, [(t.name, t.kind, t.shape, t.nbytes) for t in self.tensors])

    @property
    def nbytes(self) -> int:
        """Of the file."""
        first, places = self.header
        return max((offset + size for offset, size in places.values()), default=len(first))

    def file(self, folder: Path) -> PlacedFile:
        """The file in `folder`; it is not touched yet."""
        first, places = self.header
        return PlacedFile(folder / self.name, first, places)

    def pieces(self, file: PlacedFile) -> Iterator[GgufPiece]:
        for tensor in self.tensors:
            for start, stop in tensor.pieces():
                yield GgufPiece(tensor, start, stop, file)


def plan_gguf(
    origin: Source, read: Read, target: Path, outtype: str, updates: Mapping[str, Update] | None = None
) -> list[GgufPlan]:
    """The files of a conversion: that of the text model, `target`, and where the source has a vision tower, its own.

    read: a companion file's bytes by its name. outtype: as read_outtype() gives it. updates: what an adapter changes,
    by tensor. Raises CheckpointError for what llama.cpp does not run, and for a source that lacks what it needs.
    """
    config, where = origin.config, str(origin.folder)
    check_config(config, outtype, where)
    plan = make_plan(origin, None, None, mx.float32, updates=updates)
    mtp = _mtp_layer(origin, plan.mtp)
    text = tensors_of([*plan.text, *mtp], config.text, outtype)
    size = size_label((tensor.name, tensor.shape) for tensor in text)
    name = split_name(target.name)[0]
    metadata = general_metadata(architecture(config), "model", name, size, file_number(outtype))
    metadata |= sampling_metadata(_object(read, "generation_config.json", where))
    metadata |= text_metadata(config, mtp_layers=1 if mtp else 0)
    metadata |= vocabulary(read, config.text.vocab_size, config.raw, where)
    plans = [GgufPlan(target.name, metadata, tuple(text))]
    if plan.vision:
        # The tower is small and spoiled by few bits: 16, as published towers have.
        kind = outtype if outtype in ("F32", "BF16") else "F16"
        tower = tensors_of(plan.vision, config.text, kind)
        size = size_label((tensor.name, tensor.shape) for tensor in tower)
        metadata = general_metadata("clip", "mmproj", name, size, file_number(kind))
        metadata |= vision_metadata(config, _object(read, "preprocessor_config.json", where))
        plans.append(GgufPlan(tower_name(target.name), metadata, tuple(tower)))
    return plans


def _mtp_layer(origin: Source, tasks: tuple[Task, ...]) -> list[Task]:
    """The tasks of the MTP head in the order of its use, if it is whole: one layer, and what makes its input."""
    if not tasks:
        return []
    shapes = mtp_tensors(origin.config, 1)
    found = {task.name: task for task in tasks}
    odd = [name for name in (shapes | found) if name not in found or found[name].shape != shapes.get(name)]
    if odd:
        raise CheckpointError(
            f"{origin.folder} has an MTP layer of which {odd[0]} is not as llama.cpp needs it: convert a checkpoint "
            "that has all of it or none"
        )
    return [found[name] for name in shapes]


def _object(read: Read, name: str, where: str) -> dict[str, Any]:
    data = read(name)
    if data is None:
        return {}
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: {name} is not valid JSON ({error}); download it again") from None
    return found if isinstance(found, dict) else {}
