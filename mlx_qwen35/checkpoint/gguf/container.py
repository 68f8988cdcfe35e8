"""The container of GGUF: header, metadata, and where tensors lie; of one file, or of all files of a split model.

Knows the format and its limits. Knows nothing of models or of what metadata means, and reads no weight. Whatever a
header says is held against the size of its file before anything is read or kept because of it, so that a damaged file
is an error with a name and a place, at the price of a few milliseconds.

    "GGUF"  version u32  tensors u64  keys u64
    key: name, type u32, value                                               as often as there are keys
    tensor: name, dimensions u32, sizes u64 each (rows last), type u32, offset u64   as often as there are tensors
    padding to `general.alignment`, then the tensors' blocks, each padded to it

A text is its length as u64 and its bytes in UTF-8; an array its items' type, their number as u64, and the items.
"""

from __future__ import annotations

import math
import os
import re
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mlx_qwen35.checkpoint.files import ReadError
from mlx_qwen35.checkpoint.gguf.types import (
    ALIGNMENT,
    ARRAY,
    BOOL,
    FOREIGN,
    FORMATS,
    KINDS,
    LONGEST_NAME,
    MAGIC,
    MOST_DIMENSIONS,
    STRING,
    VERSIONS,
    Kind,
)
from mlx_qwen35.errors import CheckpointError

_LONGEST_HEADER = 1 << 26  # bytes; the family's vocabulary and merges take about 10 MB
_MOST_KEYS, _MOST_TENSORS, _MOST_FILES = 1 << 12, 1 << 16, 1 << 10
_MOST_TEXTS = 1 << 20  # in all arrays of a file together; the family has half as many
_LONGEST_TEXT = 1 << 24  # bytes
_READ = 1 << 20
_PEEKED = 16  # keys, among which the architecture is in the files of all writers
_AGAIN = "download the file again"
_Told = tuple[str, Kind, tuple[int, ...], int]  # of a tensor: name, type, shape, offset from where the blocks begin
_NUMBERED = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


@dataclass(frozen=True)
class GgufTensor:
    """A tensor in a file. shape: as PyTorch has it, rows first; offset: of its blocks, from the start of the file."""

    name: str
    file: Path
    kind: Kind
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) // self.kind.values * self.kind.nbytes

    def __str__(self) -> str:
        return f"{self.name} in {self.file.name}"


@dataclass(frozen=True)
class Array:
    """An array of the metadata, not yet taken apart. count: of items; data: their bytes."""

    kind: int
    count: int
    data: bytes = field(repr=False)
    where: str

    def values(self) -> list[Any]:
        """The items; raises CheckpointError for text that is not UTF-8, and for more than any vocabulary has."""
        if self.count > _MOST_TEXTS:
            raise CheckpointError(f"{self.where} has {self.count} items, and at most {_MOST_TEXTS} are read: {_AGAIN}")
        if self.kind != STRING:
            found = np.frombuffer(self.data, np.dtype(FORMATS[self.kind]).newbyteorder("<"))
            return found.tolist()
        made, at = [], 0
        try:
            for _ in range(self.count):
                end = at + 8 + int.from_bytes(self.data[at : at + 8], "little")
                made.append(str(self.data[at + 8 : end], "utf-8"))
                at = end
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.where}[{len(made)}] is not UTF-8 ({error.reason}): {_AGAIN}") from None
        return made


@dataclass(frozen=True)
class Gguf:
    """A GGUF, whole. metadata: of the first file, arrays as Array; files: all of them, in order."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]
    files: tuple[Path, ...]


def read_gguf(path: Path) -> Gguf:
    """The headers of a GGUF, all its files where it is split; raises CheckpointError for what is damaged or missing.

    path: the file, or the first of several; any other of them is refused.
    """
    metadata, tensors = _read_file(path)
    count = metadata.get("split.count", 0)
    if type(count) is not int or not 0 <= count <= _MOST_FILES:
        raise CheckpointError(f"{path}: split.count is {count!r:.40}, which is no number of files: {_AGAIN}")
    files = [path] if count < 2 else split_files(path, count)
    found = {tensor.name: tensor for tensor in tensors}
    if count > 1 and metadata.get("split.no", 0) != 0:
        raise CheckpointError(f"{path} is not the first of its {count} files: give {files[0]}")
    first = metadata.get("general.alignment")
    for number, other in enumerate(files[1:], 1):
        more, tensors = _read_file(other, first)
        if (more.get("split.no"), more.get("split.count")) != (number, count):
            raise CheckpointError(
                f"{other}: split.no {more.get('split.no')!r:.20} of {more.get('split.count')!r:.20}, where its name "
                f"and {path.name} say {number} of {count}: files of two models lie in one folder, keep those of one"
            )
        for tensor in tensors:
            if tensor.name in found:
                raise CheckpointError(f"{tensor} is in {found[tensor.name].file.name} too: download the files again")
            found[tensor.name] = tensor
    told = metadata.get("split.tensors.count")
    if count > 1 and type(told) is int and told != len(found):
        raise CheckpointError(
            f"{path}: split.tensors.count is {told}, and its {count} files hold {len(found)}: download them again"
        )
    return Gguf(path, metadata, found, tuple(files))


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata alone, of a file whose tensors may lie in others."""
    return _read_file(path)[0]


def header_size(path: Path) -> int:
    """Bytes of the header of one file, whatever follows; raises CheckpointError where it is damaged."""
    with open(path, "rb", buffering=0) as file:
        header = _Header(path, file.fileno())
        header.parsed()
        return header.at


def peek(path: Path, key: str) -> Any:
    """One value of the metadata, which stands near its beginning; None where it does not, or nothing can be read."""
    try:
        with open(path, "rb", buffering=0) as file:
            return _Header(path, file.fileno()).first(key)
    except (OSError, CheckpointError):
        return None


def first_file(path: Path) -> Path:
    """The first file of a split model, by the name of any of them; the path itself where it has no number."""
    return named_files(path)[0]


def named_files(path: Path) -> list[Path]:
    """All files of a split model, by the name of any of them; the path alone where it has no number."""
    numbered = _NUMBERED.fullmatch(path.name)
    count = int(numbered["count"]) if numbered else 0
    if not 0 < count <= _MOST_FILES:
        return [path]
    return [path.with_name(f"{numbered['stem']}-{n:05d}-of-{count:05d}.gguf") for n in range(1, count + 1)]


def split_files(path: Path, count: int) -> list[Path]:
    """All files of a split model; raises CheckpointError where names do not fit, or one is not there."""
    numbered = _NUMBERED.fullmatch(path.name)
    if numbered is None or int(numbered["count"]) != count:
        raise CheckpointError(
            f"{path}: split.count is {count}, and the file should be called *-00001-of-{count:05d}.gguf: restore the "
            "name that it was published with"
        )
    files = named_files(path)
    missing = [file.name for file in files if not file.exists()]
    if missing:
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise CheckpointError(f"{path.parent} lacks {len(missing)} of {count} files ({shown}): finish the download")
    return files


def _read_file(path: Path, first: int | None = None) -> tuple[dict[str, Any], list[GgufTensor]]:
    """first: the alignment that the first of several files names."""
    try:
        with open(path, "rb", buffering=0) as file:
            return _Header(path, file.fileno()).read(first)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist: check the path") from None
    except OSError as error:
        raise ReadError(f"{path} cannot be read ({error}): check the path and its permissions") from None


def _is_empty(value: Any) -> bool:
    return value == "" or (isinstance(value, Array) and not value.count)


class _Header:
    """Reads a header from its start on, never further than the file and _LONGEST_HEADER go."""

    def __init__(self, path: Path, handle: int):
        self.path, self.handle = path, handle
        self.size = os.fstat(handle).st_size
        self.most = min(self.size, _LONGEST_HEADER)
        self.data = bytearray()
        self.at = 0
        self.texts = 0

    def first(self, key: str) -> Any:
        """The value of a key that is among the first ones; None where it is not."""
        _, keys = self.begin()
        for number in range(min(keys, _PEEKED)):
            name = self.text(f"the name of key {number}", 1 << 16)
            value = self.value(f"key {name!r:.120}")
            if name == key:
                return value
        return None

    def begin(self) -> tuple[int, int]:
        """(how many tensors, how many keys)."""
        magic = bytes(self.take(4, "its first bytes")) if self.size >= 4 else b""
        if magic != MAGIC:
            raise CheckpointError(f"{self.path} is no GGUF (it begins with {magic!r}): download it again")
        version = self.number("I", "the version")
        if version not in VERSIONS:
            big = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
            what = "is big-endian, which is not read" if big else f"has version {version} of GGUF, and 2 and 3 are read"
            raise CheckpointError(f"{self.path} {what}: download the model from another publisher")
        tensors = self.number("Q", "the number of tensors")
        keys = self.number("Q", "the number of keys")
        # The shortest key takes 13 bytes, the shortest tensor 32.
        if keys > min(_MOST_KEYS, self.size // 13) or tensors > min(_MOST_TENSORS, self.size // 24):
            raise self.fail("the header", f"announces {keys} keys and {tensors} tensors")
        return tensors, keys

    def read(self, first: int | None) -> tuple[dict[str, Any], list[GgufTensor]]:
        """(what keys say, the tensors). first: as in _read_file."""
        metadata, found = self.parsed()
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if first is None or "general.alignment" in metadata:
            return metadata, self.placed(found, alignment)
        # Others than the first say nothing: gguf-py pads them alike, llama-gguf-split by the default. Their size tells.
        try:
            return metadata, self.placed(found, first)
        except CheckpointError:
            return metadata, self.placed(found, alignment)

    def parsed(self) -> tuple[dict[str, Any], list[_Told]]:
        """The same as it is told, up to the end of the header.

        Keys that are there and empty say nothing: gguf-py does not write them.
        """
        tensors, keys = self.begin()
        metadata: dict[str, Any] = {}
        for number in range(keys):
            name = self.text(f"the name of key {number}", 1 << 16)
            if name in metadata:
                raise self.fail(f"key {name!r:.120}", "occurs twice")
            metadata[name] = self.value(f"key {name!r:.120}")
        metadata = {name: value for name, value in metadata.items() if not _is_empty(value)}
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1) or alignment > 1 << 20:
            raise self.fail("general.alignment", f"is {alignment!r:.40}, which is no power of two")
        return metadata, [self.tensor(number) for number in range(tensors)]

    def fail(self, place: str, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {place} {problem}: {_AGAIN}")

    def need(self, count: int, what: str) -> None:
        """Have `count` bytes from here on in memory."""
        end = self.at + count
        if end > self.most:
            short = "the file ends" if self.most == self.size else f"the header is longer than {_LONGEST_HEADER} bytes"
            raise CheckpointError(f"{self.path} ends early or is damaged: {short} within {what}, at byte {self.at}")
        while len(self.data) < end:
            wanted = min(max(_READ, end - len(self.data)), self.most - len(self.data))
            got = os.pread(self.handle, wanted, len(self.data))
            if not got:
                raise CheckpointError(f"{self.path} ends within {what}: it changed while it was read")
            self.data += got

    def take(self, count: int, what: str) -> memoryview:
        self.need(count, what)
        begin, self.at = self.at, self.at + count
        return memoryview(bytes(self.data[begin : self.at]))

    def number(self, form: str, what: str) -> Any:
        size = struct.calcsize("<" + form)
        self.need(size, what)
        (value,) = struct.unpack_from("<" + form, self.data, self.at)
        self.at += size
        return value

    def text(self, what: str, most: int = _LONGEST_TEXT) -> str:
        length = self.number("Q", what)
        if length > most:
            raise self.fail(what, f"has {length} bytes")
        try:
            return str(self.take(length, what), "utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(what, f"is not UTF-8 ({error.reason})") from None

    def value(self, what: str) -> Any:
        kind = self.number("I", what)
        if kind == STRING:
            return self.text(what)
        if kind == BOOL:
            byte = self.number("B", what)
            if byte > 1:
                raise self.fail(what, f"is {byte} where true or false is expected")
            return bool(byte)
        if kind in FORMATS:
            return self.number(FORMATS[kind], what)
        if kind != ARRAY:
            raise self.fail(what, f"has the type {kind}, which GGUF does not have")
        item, count = self.number("I", what), self.number("Q", what)
        begin = self.at
        if item == STRING:
            self.texts += count
            if self.texts > _MOST_TEXTS:
                raise self.fail(what, f"announces {count} texts, and all arrays together may have {_MOST_TEXTS}")
            self.skip_texts(count, what)
        elif item in FORMATS:
            size = count * struct.calcsize("<" + FORMATS[item])
            self.need(size, what)
            self.at += size
        else:
            raise self.fail(what, f"is an array of type {item}, which no model of this family has")
        return Array(item, count, bytes(self.data[begin : self.at]), f"{self.path}: {what}")

    def skip_texts(self, count: int, what: str) -> None:
        at, data, length_of = self.at, self.data, struct.Struct("<Q").unpack_from
        for number in range(count):
            if at + 8 > len(data):
                self.at = at
                self.need(8, f"item {number} of {what}")
            at += 8 + length_of(data, at)[0]
            if at > len(data):
                self.need(at - self.at, f"item {number} of {what}")
        self.need(at - self.at, what)
        self.at = at

    def tensor(self, number: int) -> _Told:
        what = f"tensor {number}"
        name = self.text(f"the name of {what}", 1 << 16)
        what = f"tensor {name!r:.120}"
        if not name or len(name.encode()) > LONGEST_NAME:
            raise self.fail(what, f"has a name of {len(name.encode())} bytes, and 1 to {LONGEST_NAME} are allowed")
        dimensions = self.number("I", what)
        if dimensions > MOST_DIMENSIONS:
            raise self.fail(what, f"has {dimensions} dimensions")
        sizes = tuple(self.number("Q", what) for _ in range(dimensions))
        if any(not 0 < size < 1 << 40 for size in sizes) or math.prod(sizes) >= 1 << 50:
            raise self.fail(what, f"has the sizes {list(sizes)}")
        kind, offset = self.number("I", what), self.number("Q", what)
        if kind not in KINDS:
            known = f"type {kind}" if kind not in FOREIGN else f"type {kind}, {FOREIGN[kind]}"
            raise CheckpointError(
                f"{self.path}: {what} has {known}, which is not read: take a GGUF of llama.cpp's own types, or the "
                "safetensors of the same model"
            )
        form = KINDS[kind]
        width = sizes[0] if sizes else 1
        if width % form.values:
            raise self.fail(what, f"has rows of {width}, which blocks of {form.values} ({form.name}) do not divide")
        return name, form, sizes[::-1], offset

    def placed(self, found: list[_Told], alignment: int) -> list[GgufTensor]:
        """The tensors, which must follow one another without a hole or overlap, as llama.cpp demands it too."""
        start = end = -(-self.at // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        last, last_kind, stop = "the header", None, self.at
        for name, kind, shape, offset in sorted(found, key=lambda tensor: tensor[3]):
            tensor = GgufTensor(name, self.path, kind, shape, start + offset)
            if name in tensors:
                raise self.fail(f"tensor {name!r:.120}", "occurs twice")
            if tensor.offset != end:
                problem = "overlaps" if tensor.offset < end else "leaves a hole after"
                raise self.misplaced(f"tensor {name!r:.120} at byte {tensor.offset} {problem} {last!r:.120}", last_kind)
            stop = tensor.offset + tensor.nbytes
            if stop > self.size:
                raise self.misplaced(
                    f"the file has {self.size} bytes and ends within tensor {name!r:.120}, at byte {stop}", kind
                )
            end, last, last_kind = -(-stop // alignment) * alignment, name, kind
            tensors[name] = tensor
        if found and self.size > end:
            raise self.misplaced(f"{self.size - end} bytes follow the last tensor {last!r:.120}", last_kind)
        return list(tensors.values())

    def misplaced(self, problem: str, kind: Kind | None) -> CheckpointError:
        hint = ""
        if kind is not None and kind.name == "Q2_0":
            hint = " (Q2_0 in groups of 128, as prism-ml's own llama.cpp writes it, has other sizes and is not read)"
        return CheckpointError(f"{self.path}: {problem}{hint}: {_AGAIN}")

