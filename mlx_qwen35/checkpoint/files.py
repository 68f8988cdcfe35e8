"""Safetensors files on disk: which tensors lie where, and their bytes.

Knows the safetensors format, shards and their index. Knows nothing of models, layouts or MLX. Every header is checked
against its file before a byte of data is read, so that a truncated download or a damaged header is an error with a
name and never a wrong tensor.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_qwen35.errors import CheckpointError
from mlx_qwen35.machine.files import is_litter, listed

INDEX = "model.safetensors.index.json"

# Bits per element of every dtype that the format knows.
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
    "C64": 64,
}  # fmt: skip
# The dtypes that read() delivers; NumPy has neither bfloat16 nor FP8, so their bits come as uint16 and uint8.
_NUMPY = {
    "F32": np.float32, "F16": np.float16, "BF16": np.uint16, "U32": np.uint32, "I32": np.int32, "U8": np.uint8,
    "F8_E4M3": np.uint8,
}  # fmt: skip
Empty = Callable[[tuple[int, ...], type], np.ndarray]  # memory to read into: shape and dtype as np.empty takes them
_LONGEST_HEADER = 100_000_000  # the format's own limit
_HEAD, _BLOCKS, _BLOCK = 1 << 16, 64, 1 << 12  # of a fingerprint
_LFS = b"version https://git-lfs.github.com/spec/"
_BESIDE = re.compile(
    r"(adapter|lora|pytorch_lora|optimizer|scheduler|training|rng_|imatrix|consolidated|mtp|optiq_|vision|visual|mmproj)",
    re.IGNORECASE,
)
_NUMBERED = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.safetensors")


class ReadError(CheckpointError):
    """The disk did not give what it was asked for; that says nothing of what the file holds."""


@dataclass(frozen=True)
class Entry:
    """One tensor in a file. offset: bytes from the start of the file."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    def __str__(self) -> str:
        return f"{self.name} in {self.file.name}"


@dataclass(frozen=True)
class TensorFiles:
    """All tensors of a checkpoint by name; formats: the "format" of each file's metadata, None where it is silent."""

    folder: Path
    entries: dict[str, Entry]
    formats: dict[str, str | None]


def open_folder(folder: Path) -> TensorFiles:
    """Check the headers of a checkpoint's weight files, and its index if it has one; raises CheckpointError.

    Reads the shards that model.safetensors.index.json names, which may lie in folders below, or else `main_files`.
    """
    weight_map = _read_index(folder / INDEX)
    files = sorted(set(weight_map.values())) if weight_map is not None else _unindexed(folder)
    missing = _absent(folder, files)
    if missing:
        raise CheckpointError(
            f"{folder / INDEX} names {len(missing)} of {len(files)} shards that are not there ({_some(missing)}): "
            "finish the download, or delete the index if it belongs to other files"
        )
    entries: dict[str, Entry] = {}
    formats = {}
    for name in files:
        found, metadata = read_header(folder / name)
        formats[name] = metadata.get("format")
        for entry in found.values():
            if entry.name in entries:
                raise CheckpointError(
                    f"{entry.name} is in two files of {folder}, {entries[entry.name].file.name} and {name}: "
                    "delete the one that does not belong to this checkpoint"
                )
            entries[entry.name] = entry
    if weight_map is not None:
        _check_index(folder, weight_map, entries)
    return TensorFiles(folder, entries, formats)


def missing_shards(folder: Path) -> list[str]:
    """The weight files that the index or the numbers of its neighbours call for and that are not there.

    ["model.safetensors"] where there are none at all. Raises CheckpointError for an index that is damaged.
    """
    weight_map = _read_index(folder / INDEX)
    if weight_map is not None:
        return _absent(folder, sorted(set(weight_map.values())))
    files = main_files(path.name for path in listed(folder, "*.safetensors") if path.exists())
    return gaps(files) if files else ["model.safetensors"]


def main_files(names: Iterable[str]) -> list[str]:
    """Of the files in a folder, those that hold a model's weights where no index says it.

    They are called model*.safetensors, or else anything but what adapters, trainers, and other programs call what they
    put beside a model.
    """
    weights = sorted(n for n in names if n.endswith(".safetensors") and "/" not in n and not is_litter(n))
    return [n for n in weights if n.startswith("model")] or [n for n in weights if not _BESIDE.match(n)]


def indexed_files(index: bytes, where: Path) -> list[str]:
    """The weight files that the text of an index names; `where` names it in errors (CheckpointError)."""
    return sorted(set(_weight_map(index, where).values()))


def is_below(name: Any) -> bool:
    """Whether a text of somebody else's names a safetensors file in a folder, or below it, and never outside."""
    if not isinstance(name, str) or not name.endswith(".safetensors") or set(name) & {"\\", "\0", ":"}:
        return False
    return all(part not in ("", ".", "..") for part in name.split("/"))


def open_file(path: Path) -> TensorFiles:
    """The same for a single file, such as mtp/weights.safetensors."""
    entries, metadata = read_header(path)
    return TensorFiles(path.parent, entries, {path.name: metadata.get("format")})


def fingerprint(path: Path) -> str:
    """Of a file's size, its first bytes, which hold a safetensors header, and blocks that are spread over the rest.

    Not of all of it: that would be to read a whole checkpoint. Raises CheckpointError if it cannot be read.
    """
    found = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            found.update(size.to_bytes(8, "little") + file.read(_HEAD))
            for block in range(_BLOCKS):
                file.seek((size - _BLOCK) * block // (_BLOCKS - 1) if size > _BLOCK else 0)
                found.update(file.read(_BLOCK))
    except OSError as error:
        raise ReadError(f"{path} cannot be read ({error}): check the disk, or download the file again") from None
    return found.hexdigest()


def read(
    entry: Entry, start: int = 0, stop: int | None = None, half: int | None = None, *, empty: Empty = np.empty
) -> np.ndarray:
    """Rows start..stop of axis 0 of a tensor, bfloat16 as uint16; raises CheckpointError if the file cannot be read.

    half: 0 or 1 takes the first or second half of axis 1, [R, 2M, ...] -> [R, M, ...], and reads only that.
    """
    if entry.dtype not in _NUMPY:
        raise CheckpointError(f"{entry} has dtype {entry.dtype}, which this package does not read")
    shape = entry.shape
    dtype = _NUMPY[entry.dtype]
    if not shape:
        out = empty((), dtype)
        return fill(entry, [(entry.offset, out)], out)
    stop = shape[0] if stop is None else stop
    stride = math.prod(shape[1:]) * np.dtype(dtype).itemsize
    if half is None:
        out = empty((stop - start, *shape[1:]), dtype)
        return fill(entry, [(entry.offset + start * stride, out)], out)
    out = empty((stop - start, shape[1] // 2, *shape[2:]), dtype)
    # [gate | up] of row r, then of row r + 1: take one stretch of each
    begin = entry.offset + half * (stride // 2)
    return fill(entry, [(begin + row * stride, out[row - start]) for row in range(start, stop)], out)


def read_columns(entry: Entry, start: int, stop: int) -> np.ndarray:
    """Columns start..stop of a matrix, and only they are read."""
    if entry.dtype not in _NUMPY:
        raise CheckpointError(f"{entry} has dtype {entry.dtype}, which this package does not read")
    out = np.empty((entry.shape[0], stop - start), _NUMPY[entry.dtype])
    size = out.dtype.itemsize
    places = ((row * entry.shape[1] + start) * size for row in range(entry.shape[0]))
    return fill(entry, [(entry.offset + place, row) for place, row in zip(places, out, strict=True)], out)


def read_stacked(entries: Iterable[Entry], *, empty: Empty = np.empty) -> np.ndarray:
    """Equal-shaped tensors stacked along a new axis 0."""
    entries = tuple(entries)
    if entries[0].dtype not in _NUMPY:
        raise CheckpointError(f"{entries[0]} has dtype {entries[0].dtype}, which this package does not read")
    out = empty((len(entries), *entries[0].shape), _NUMPY[entries[0].dtype])
    for row, entry in enumerate(entries):
        fill(entry, [(entry.offset, out[row])], out)
    return out


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors of one file in the order of their data, and its metadata; raises CheckpointError if it is damaged."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(8)
            if head and _LFS.startswith(head):
                raise CheckpointError(f"{path} is a Git LFS pointer and not the file itself: run `git lfs pull`")
            if len(head) < 8:
                raise CheckpointError(f"{path} has {size} bytes and so no header: download it again")
            length = int.from_bytes(head, "little")
            if not 2 <= length <= min(_LONGEST_HEADER, size - 8):
                raise CheckpointError(
                    f"{path} ends early or is no safetensors file: its first bytes announce a header of {length} bytes "
                    f"and the file has {size}. Download it again"
                )
            text = file.read(length)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist: download it again") from None
    except OSError as error:
        raise ReadError(f"{path} cannot be read ({error}): check the path and its permissions") from None
    header = _parse(path, text, "the header of ")
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata  # mx.save_safetensors writes null where it was given none
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{path}: the header's __metadata__ is damaged: download the file again")
    entries = sorted((_entry(path, name, value, 8 + length) for name, value in header.items()), key=_place)
    _check_data(path, entries, 8 + length, size)
    return {entry.name: entry for entry in entries}, metadata


def _place(entry: Entry) -> tuple[int, int]:
    return entry.offset, entry.nbytes


def _entry(path: Path, name: str, value: Any, data: int) -> Entry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{path}: the header's entry for {name!r:.120} is damaged: download the file again")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise CheckpointError(f"{path}: {name} has the dtype {dtype!r:.40}, which the safetensors format does not have")
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
        raise CheckpointError(
            f"{path}: {name} has shape {shape!r:.80} and data_offsets {offsets!r:.80} where counts are expected: "
            "download the file again"
        )
    nbytes = math.prod(shape) * _BITS[dtype] // 8
    if offsets[1] - offsets[0] != nbytes:
        raise CheckpointError(
            f"{path}: {name} of shape {shape} and dtype {dtype} takes {nbytes} bytes, but the header gives it "
            f"{offsets[1] - offsets[0]}: download the file again"
        )
    return Entry(name, path, dtype, tuple(shape), data + offsets[0], nbytes)


def _counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**60 for v in values)


def _check_data(path: Path, entries: list[Entry], data: int, size: int) -> None:
    """The tensors must fill the file from the end of the header to its last byte, without hole or overlap."""
    end, last = data, "the header"
    for entry in entries:
        if entry.offset != end:
            problem = "overlaps" if entry.offset < end else "leaves a hole after"
            raise CheckpointError(f"{path}: the data of {entry.name} {problem} {last}: download the file again")
        end, last = entry.offset + entry.nbytes, entry.name
    if end > size:
        cut = next(e.name for e in entries if e.offset + e.nbytes > size)
        raise CheckpointError(
            f"{path} ends early: {size} bytes where its header announces {end}; the first tensor cut off is {cut}. "
            "Download it again"
        )
    if end < size:
        raise CheckpointError(f"{path} has {size - end} bytes after its last tensor {last}: download it again")


def fill(entry: Entry, stretches: list[tuple[int, np.ndarray]], out: np.ndarray) -> np.ndarray:
    """Read bytes from `offset` into each contiguous piece of `out`."""
    try:
        handle = os.open(entry.file, os.O_RDONLY)
        try:
            for offset, piece in stretches:
                view = memoryview(piece.reshape(-1)).cast("B") if piece.size else memoryview(b"")
                while view:
                    count = os.preadv(handle, [view[: 1 << 30]], offset)
                    if count == 0:
                        raise CheckpointError(f"{entry.file} ends within {entry.name}: it changed while it was read")
                    offset, view = offset + count, view[count:]
        finally:
            os.close(handle)
    except OSError as error:
        raise ReadError(f"{entry} cannot be read ({error}): check the disk, or download the file again") from None
    return out


def _read_index(path: Path) -> dict[str, str] | None:
    """The weight_map of an index; None where there is no index."""
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ReadError(f"{path} cannot be read ({error}): check the path and its permissions") from None
    return _weight_map(text, path)


def _weight_map(text: bytes, path: Path) -> dict[str, str]:
    if text.startswith(_LFS):
        raise CheckpointError(f"{path} is a Git LFS pointer and not the file itself: run `git lfs pull`")
    weight_map = _parse(path, text, "").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map: download it again")
    for name, file in weight_map.items():
        if not is_below(file):
            raise CheckpointError(
                f"{path} puts {name!r:.120} into {file!r:.80}, which is no name of a shard in or below its folder"
            )
    return weight_map


def _check_index(folder: Path, weight_map: dict[str, str], entries: dict[str, Entry]) -> None:
    path = folder / INDEX
    lies = [n for n, file in weight_map.items() if n not in entries or entries[n].file != folder / file]
    if lies:
        raise CheckpointError(
            f"{path} names {len(lies)} tensors that are not where it says ({_some(lies)}; the first should be in "
            f"{weight_map[lies[0]]}): index and shards are of two versions, download them again"
        )
    silent = [n for n in entries if n not in weight_map]
    if silent:
        raise CheckpointError(
            f"{path} leaves out {len(silent)} tensors of its shards ({_some(silent)}, in "
            f"{entries[silent[0]].file.name}): index and shards are of two versions, download them again"
        )


def _unindexed(folder: Path) -> list[str]:
    """The weight files of a folder without an index."""
    try:
        here = sorted(name for name in os.listdir(folder) if not is_litter(name))
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be listed ({error}): give the folder of a checkpoint") from None
    files = main_files(here)
    if not files:
        other = [n for n in here if n.endswith((".safetensors", ".bin", ".gguf", ".pt", ".pth", ".incomplete"))]
        hint = f"; {_some(other)} is not read" if other else ""
        raise CheckpointError(
            f"{folder} holds no model*.safetensors{hint}: finish the download, or give the folder of the weights"
        )
    missing = gaps(files)
    if missing:
        count = int(_NUMBERED.fullmatch(missing[0])[3])
        lack = f"{folder} lacks {len(missing)} of {count} shards"
        raise CheckpointError(f"{lack} ({_some(missing)}): finish the download")
    return files


def _absent(folder: Path, names: list[str]) -> list[str]:
    return [name for name in names if not (folder / name).exists()]


def gaps(files: list[str]) -> list[str]:
    """What is missing between model-00001-of-00003.safetensors and its last neighbour."""
    for name in files:
        numbered = _NUMBERED.fullmatch(name)
        if numbered:
            stem, count = numbered[1], int(numbered[3])
            want = [f"{stem}-{n + 1:05d}-of-{count:05d}.safetensors" for n in range(count)]
            missing = [n for n in want if n not in files]
            if missing:
                return missing
    return []


def _parse(path: Path, text: bytes, what: str) -> dict[str, Any]:
    """A JSON object in which no key occurs twice: the second would silently replace the first."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ValueError(f"{twice!r:.120} occurs twice")
        return values

    try:
        value = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what}{path} is damaged ({error}): download the file again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{what}{path} is no JSON object: download the file again")
    return value


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
