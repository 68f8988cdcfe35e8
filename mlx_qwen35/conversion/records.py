"""Expert records: all that one expert needs in one stretch of one file, as reading it from an SSD likes it.

Knows the layout of those files and how they are made of the shards that were written. Knows nothing of who reads them.
In the shards an expert is nine slices of nine tensors (gate, up and down; weight, scales and biases of each). Here it
is one record:

    experts/layer-00003.safetensors     one a layer; loaders, which read *.safetensors beside config.json, pass it by
      records   U8 [experts, record_bytes], from a multiple of 16 KiB on, as is every record: whole pages of the disk
      metadata  format "mlx-qwen35-experts", version, layer;
                parts: [{name, dtype, shape, offset, nbytes}, ...] of a record, offsets in it multiples of 64;
                sha256: of each record, its padding with it

It repeats the experts' bytes: a tensor of a safetensors file is one stretch, and what others load is one tensor of all
experts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mlx_qwen35.checkpoint.expert_files import FORMAT, VERSION
from mlx_qwen35.conversion.disk import PAGE
from mlx_qwen35.conversion.plan import Plan
from mlx_qwen35.conversion.task import Task
from mlx_qwen35.conversion.write import SafetensorsFile, TensorSpec
from mlx_qwen35.errors import CheckpointError

_ALIGN = 64
_UNKNOWN = "0" * 64  # a checksum's place in the header, until the records are written


@dataclass(frozen=True)
class _Part:
    """One projection's weight, scales or biases: of all experts in a shard, and its place in a record."""

    name: str
    spec: TensorSpec
    file: SafetensorsFile
    offset: int

    @property
    def nbytes(self) -> int:
        """Of one expert."""
        return self.spec.nbytes // self.spec.shape[0]

    def as_json(self) -> dict[str, object]:
        return {
            "name": self.name, "dtype": self.spec.dtype, "shape": list(self.spec.shape[1:]), "offset": self.offset,
            "nbytes": self.nbytes,
        }  # fmt: skip


class LayerRecords:
    """The records of one layer, a piece of a conversion like any other; made when the shards' pieces all are there."""

    def __init__(self, layer: int, tasks: list[Task], home: Mapping[str, SafetensorsFile], folder: Path):
        self._layer = layer
        self._path = folder / "experts" / f"layer-{layer:05d}.safetensors"
        self._parts: list[_Part] = []
        end = 0
        for task in tasks:
            projection = task.name.split(".")[-2]
            for kind, spec in task.specs().items():
                part = _Part(f"{projection}.{kind}", spec, home[spec.name], end)
                self._parts.append(part)
                end += part.nbytes + -part.nbytes % _ALIGN
        self._count = tasks[0].shape[0]
        self._record = end + -end % PAGE

    @property
    def name(self) -> str:
        return f"records:{self._layer}"

    @property
    def nbytes(self) -> int:
        return self._count * self._record

    def write(self) -> tuple[list[str], None]:
        """Read every expert out of the shards, and write its record; their checksums."""
        file = self._file([_UNKNOWN] * self._count)
        file.open()
        try:
            sums = []
            for expert in range(self._count):
                record = bytearray(self._record)
                for part in self._parts:
                    data = part.file.read(part.spec.name, expert * part.nbytes, part.nbytes)
                    record[part.offset : part.offset + len(data)] = data
                sums.append(hashlib.sha256(record).hexdigest())
                file.write("records", memoryview(record), expert * self._record)
            file.sync()
        finally:
            file.close()
        sealed = self._file(sums)  # the same file, with a header that is as long
        sealed.open()
        sealed.close()
        return [_together(sums)], None

    def found(self) -> list[str]:
        """The same of what lies on the disk; that of nothing, if the file is not there or not whole."""
        if not self._path.exists() or self._path.stat().st_size != self._file([_UNKNOWN] * self._count).nbytes:
            return []
        with open(self._path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            text = file.read(length)
            sums = [hashlib.sha256(file.read(self._record)).hexdigest() for _ in range(self._count)]
        return [_together(sums)] if self._file(sums).header[8:] == text else []

    def _file(self, sums: list[str]) -> SafetensorsFile:
        metadata = {
            "format": FORMAT, "version": str(VERSION), "layer": str(self._layer),
            "parts": json.dumps([part.as_json() for part in self._parts]), "sha256": json.dumps(sums),
        }  # fmt: skip
        spec = TensorSpec("records", "U8", (self._count, self._record))
        return SafetensorsFile(self._path, [spec], metadata)


def layer_records(plan: Plan, files: Mapping[str, SafetensorsFile], folder: Path) -> list[LayerRecords]:
    """The records of a plan's layers; raises CheckpointError if there are no experts."""
    home = {spec.name: files[name] for name, specs in plan.files.items() for spec in specs}
    layers: dict[int, list[Task]] = {}
    for task in plan.text:
        if ".mlp.experts." in task.name:
            layers.setdefault(int(task.name.split(".")[1]), []).append(task)
    if not layers:
        raise CheckpointError(f"{plan.origin.folder} has no experts to pack: leave pack_experts out")
    return [LayerRecords(layer, tasks, home, folder) for layer, tasks in layers.items()]


def _together(sums: list[str]) -> str:
    return hashlib.sha256("".join(sums).encode()).hexdigest()[:32]
