"""Writing a checkpoint folder: shards whose tensors are filled in pieces, and a folder that appears only when complete.

Knows the safetensors format and how folders are replaced. Knows nothing of models or of what the tensors mean. All
names, dtypes and shapes are known before the first byte is written, so memory holds one piece of one tensor.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import mlx.core as mx

from mlx_qwen35.checkpoint.files import INDEX

SHARD_BYTES = 5 << 30
_SIZES = {"U32": 4, "F32": 4, "F16": 2, "BF16": 2, "U8": 1}
TAGS = {mx.uint32: "U32", mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16", mx.uint8: "U8"}


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written. dtype: as safetensors calls it."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _SIZES[self.dtype]


class SafetensorsWriter:
    """One safetensors file, filled piece by piece. Leaving the `with` block checks that nothing was left out."""

    def __init__(self, path: Path, specs: Iterable[TensorSpec]):
        # Wide elements first keeps every tensor aligned to its element, as the format's own library does.
        self._specs = sorted(specs, key=lambda spec: (-_SIZES[spec.dtype], spec.name))
        self._path = path
        header: dict[str, object] = {"__metadata__": {"format": "mlx"}}
        end = 0
        for spec in self._specs:
            header[spec.name] = {
                "dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [end, end + spec.nbytes],
            }  # fmt: skip
            end += spec.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._next: dict[str, int] = {}
        self._end: dict[str, int] = {}
        begin = 8 + len(text)
        for spec in self._specs:
            self._next[spec.name], begin = begin, begin + spec.nbytes
            self._end[spec.name] = begin
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self._write(len(text).to_bytes(8, "little") + text, 0)

    def append(self, name: str, piece: mx.array) -> None:
        """Write the next rows of a tensor."""
        mx.eval(piece)
        if piece.dtype == mx.bfloat16:
            piece = piece.view(mx.uint16)  # the buffer protocol has no bfloat16
        data = memoryview(mx.contiguous(piece).flatten())
        if self._next[name] + data.nbytes > self._end[name]:
            raise ValueError(f"{name}: more rows than announced")
        self._write(data.cast("B"), self._next[name])
        self._next[name] += data.nbytes

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        os.close(self._handle)
        short = [name for name in self._next if self._next[name] != self._end[name]]
        if kind is None and short:
            raise ValueError(f"{self._path}: {', '.join(short)} were not written to their end")

    def _write(self, data: bytes | memoryview, offset: int) -> None:
        view = memoryview(data)
        while view:
            count = os.pwrite(self._handle, view[: 1 << 30], offset)
            offset, view = offset + count, view[count:]


def plan_shards(groups: Iterable[list[TensorSpec]], limit: int = SHARD_BYTES) -> dict[str, list[TensorSpec]]:
    """File name -> its tensors. Groups stay together and in order; a file passes `limit` only for one group alone."""
    shards: list[list[TensorSpec]] = []
    size = 0
    for group in groups:
        bytes_here = sum(spec.nbytes for spec in group)
        if not shards or size + bytes_here > limit:
            shards.append([])
            size = 0
        shards[-1] += group
        size += bytes_here
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{n:05d}-of-{len(shards):05d}.safetensors": shard for n, shard in enumerate(shards, 1)}


def write_index(folder: Path, shards: dict[str, list[TensorSpec]]) -> None:
    """model.safetensors.index.json for what plan_shards() gave."""
    weight_map = {spec.name: file for file, specs in shards.items() for spec in specs}
    total = sum(spec.nbytes for specs in shards.values() for spec in specs)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / INDEX, index)


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def complete_folder(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """A hidden folder beside `target` to write into; it takes that name when the block ends and vanishes if it fails.

    A folder of that name is replaced only if `overwrite`, and only once the new one is complete.
    """
    parent = target.parent
    parent.mkdir(parents=True, exist_ok=True)
    partial = parent / f".{target.name}.partial-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        if overwrite and target.exists():
            old = parent / f".{target.name}.replaced-{os.getpid()}"
            target.rename(old)
            try:
                partial.rename(target)
            except BaseException:
                old.rename(target)
                raise
            shutil.rmtree(old, ignore_errors=True)
        else:
            partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
