"""Writing a checkpoint's files: safetensors whose tensors are filled in any order, their index, JSON.

Knows the safetensors format, and files of tensors whose places are known. Knows nothing of models or of what the
tensors mean. All names, dtypes and shapes are known before the first byte is written, so that every piece of every
tensor has its place from the start.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from mlx_qwen35.checkpoint.files import INDEX
from mlx_qwen35.conversion.disk import PAGE, Writer, write_at
from mlx_qwen35.errors import CheckpointError
from mlx_qwen35.machine.files import flush, flush_names, flush_path, forget, listed, reserve

SHARD_BYTES = 5 << 30
_SIZES = {"U32": 4, "F32": 4, "F16": 2, "BF16": 2, "U8": 1}
TAGS = {mx.uint32: "U32", mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16", mx.uint8: "U8"}
_FULL = (errno.ENOSPC, errno.EDQUOT)


class WriteError(CheckpointError):
    """The disk refused what was to be written; what was written before is good, and a conversion can go on later."""


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written. dtype: as safetensors calls it."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _SIZES[self.dtype]


class PlacedFile:
    """One file of tensors on disk: where each of them lies, known before any is there.

    Threads may write different places of it at the same time. Nothing is open between calls of open() and close().
    """

    def __init__(self, path: Path, header: bytes, places: Mapping[str, tuple[int, int]]):
        """header: the first bytes of the file. places: (offset in it, bytes) of each tensor, in its order."""
        self.path, self.header = path, header
        self._place = dict(places)
        self.nbytes = max((offset + size for offset, size in self._place.values()), default=len(header))
        self._handle = -1
        self._writer: Writer | None = None

    @property
    def names(self) -> list[str]:
        """In the order of the file."""
        return list(self._place)

    def open(self) -> None:
        """Create the file with its header, or go on with one that is there."""
        with _named(self.path):
            self.path.parent.mkdir(exist_ok=True)  # mtp/ and experts/
            self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            reserve(self._handle, self.nbytes)
            write_at(self._handle, self.header, 0)
            self._writer = Writer(self.path, self._handle)

    def write(self, name: str, data: memoryview, offset: int) -> None:
        """Put bytes into a tensor, `offset` bytes from its start; raises WriteError where the disk refuses them."""
        start, size = self._place[name]
        if offset + data.nbytes > size:
            raise ValueError(f"{name}: more bytes than announced")
        with _named(self.path):
            self._writer.write(data, start + offset)

    def read(self, name: str, offset: int, count: int) -> bytes:
        """`count` bytes of a tensor from `offset`; fewer where the file ends before."""
        return os.pread(self._handle, count, self._place[name][0] + offset)

    def forget(self) -> None:
        """Let the next read come from the disk, where the system can be told so."""
        forget(self._handle)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def sync(self) -> None:
        """Return when the disk has it all; raises WriteError if it does not."""
        with _named(self.path):
            flush(self._handle)


class SafetensorsFile(PlacedFile):
    """A safetensors file."""

    def __init__(self, path: Path, specs: Iterable[TensorSpec], metadata: dict[str, str] | None = None):
        # Whole pages first, so that all large tensors begin with one; then wide elements first, which keeps the others
        # aligned to theirs, as the format's own library does.
        ordered = sorted(specs, key=lambda spec: (spec.nbytes % PAGE > 0, -_SIZES[spec.dtype], spec.name))
        header, begin = _header(ordered, metadata or {"format": "mlx"})
        places = {}
        for spec in ordered:
            places[spec.name] = begin, spec.nbytes
            begin += spec.nbytes
        super().__init__(path, header, places)


def _header(specs: list[TensorSpec], metadata: dict[str, str]) -> tuple[bytes, int]:
    """The first bytes of a file, and where its data begins: with a page, if a tensor of whole pages does."""
    align = PAGE if specs and specs[0].nbytes % PAGE == 0 else 8
    header: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for spec in specs:
        header[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [end, end + spec.nbytes]}
        end += spec.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % align)
    return len(text).to_bytes(8, "little") + text, 8 + len(text)


class _named:
    """Turns an OSError within the block into one that names the file and says what to do."""

    def __init__(self, path: Path):
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            raise write_error(error, self._path) from error


def write_error(error: OSError, path: Path) -> WriteError:
    """What to say of a write to `path` that failed."""
    if error.errno in _FULL:
        return WriteError(f"the disk is full: {path} cannot be written to its end ({error.strerror}). Free some space")
    if error.errno == errno.EFBIG:
        return WriteError(
            f"{path} is larger than a file may be here: raise the limit (`ulimit -f`), or choose a disk whose file "
            "system takes large files, as FAT32 does not"
        )
    return WriteError(f"{path} cannot be written ({error.strerror or error}): check the disk and its permissions")


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


def shown_size(count: int) -> str:
    """Bytes as people read them, in powers of ten."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "KB")):
        if count >= unit:
            return f"{count / unit:.2f} {name}"
    return f"{count} bytes"


def write_json(path: Path, value: object) -> None:
    with _named(path):
        path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def make_durable(folder: Path) -> None:
    """Return when the disk has all names in a folder and below it, and all files but safetensors, which sync()
    themselves; raises WriteError where it has not."""
    for path in listed(folder, "**/*"):
        if path.is_dir():
            flush_names(path)
        elif path.suffix != ".safetensors":
            with _named(path):
                flush_path(path)
    flush_names(folder)
