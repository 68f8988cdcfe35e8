"""One file with arrays, a description of them in JSON and the media it speaks of: written whole or not at all.

Knows the file (a safetensors file, so that others can look into it), its checksum and how it takes the place of an
older one. Knows nothing of sessions or models.

    header     names, places, and the description under __metadata__
    arrays     in the order of the header; those of media among them
    ~checksum  of all bytes before it
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_qwen35.checkpoint.files import ReadError, read, read_header
from mlx_qwen35.conversion.write import TAGS, SafetensorsFile, TensorSpec, WriteError, write_error
from mlx_qwen35.errors import CheckpointError, SessionError
from mlx_qwen35.machine.files import flush_names
from mlx_qwen35.vision.media import Levels, Media

FORMAT, VERSION = "mlx-qwen35-session", "1"
_CHECKSUM, DIGEST = "~checksum", 32  # bytes; the last of the narrowest tensors, and so the last in the file
_MEDIUM = "~medium"
_ADVICE = re.compile(r"[:.,]? (download|finish the download).*", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True)
class Bytes:
    """An array as it is written: its dtype as safetensors calls it, and its values, bfloat16 as uint16."""

    tag: str
    values: np.ndarray


def held(array: mx.array) -> Bytes:
    """An array, computed, to be written later and by any thread. It is not copied: MLX makes a copy before it writes to
    a buffer that something else holds, too."""
    values = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
    mx.eval(values)
    return Bytes(TAGS[array.dtype], np.array(values, copy=False))


def write(path: Path, description: Mapping[str, Any], arrays: Mapping[str, mx.array | Bytes]) -> None:
    """Put a file at `path` in place of what may be there, which stays whole until the new one is.

    description: JSON values, and Media anywhere among them. arrays: uint32, float32, float16, bfloat16 or uint8.
    Raises WriteError where the disk refuses, or `path` is that of something else than a file.
    """
    path = _place(path)
    arrays = {name: array if isinstance(array, Bytes) else held(array) for name, array in arrays.items()}
    media: dict[str, Media] = {}

    def medium(value: Any) -> Any:
        if not isinstance(value, Media):
            raise TypeError(f"{type(value).__name__} cannot be saved")
        media[value.key] = value
        return {_MEDIUM: value.key}

    text = json.dumps(description, default=medium, ensure_ascii=False)
    about = json.dumps({key: _about(value) for key, value in media.items()})
    rows = {f"media.{key}": _rows(value) for key, value in media.items()}
    arrays |= {name: Bytes("U8" if values.dtype == np.uint8 else "F32", values) for name, values in rows.items()}
    specs = [TensorSpec(name, array.tag, array.values.shape) for name, array in arrays.items()]
    specs.append(TensorSpec(_CHECKSUM, "U8", (DIGEST,)))
    metadata = {"format": FORMAT, "version": VERSION, "description": text, "media": about}
    _remove_left_over(path)
    made = SafetensorsFile(_partial(path), specs, metadata)
    digest = hashlib.blake2b(made.header, digest_size=DIGEST)
    try:
        made.open()
        for name in made.names:
            at = 0
            for data in _pieces(arrays[name].values) if name != _CHECKSUM else ():
                digest.update(data)
                made.write(name, data, at)
                at += data.nbytes
        made.write(_CHECKSUM, memoryview(digest.digest()), 0)
        made.sync()
        made.close()
        _put(made.path, path)
    except BaseException:
        _remove(made)
        raise
    flush_names(path.parent)  # so that the new name outlives a loss of power


def check_place(path: Path) -> None:
    """Raises the WriteError that `write` would begin with, before there is anything to write."""
    made = SafetensorsFile(_partial(_place(path)), [])
    try:
        made.open()
    finally:
        _remove(made)


def read_description(path: Path) -> dict[str, Any]:
    """The description alone, Media as they were written; nothing of it is checked yet but its form."""
    if not path.exists():
        raise SessionError(f"{path} does not exist: give the file that a session was saved to")
    with _refusing(path):
        _, metadata = read_header(path)
        if metadata.get("format") != FORMAT:
            raise SessionError(f"{path} is no session of this package: give another file, or a name that is free")
        if metadata.get("version") != VERSION:
            raise SessionError(
                f"{path} has version {metadata.get('version')!r:.20} of the session file, this package reads "
                f"{VERSION}: take the release that wrote it, or begin a new session"
            )
        return json.loads(metadata["description"])


@dataclass(frozen=True)
class Beginning:
    """What a file says of its past without being read whole. shown: where the placeholders of each image and video
    begin, with its key; points: where it can be gone on from."""

    description: dict[str, Any]
    tokens: np.ndarray
    shown: tuple[tuple[int, str], ...]
    points: tuple[int, ...]


def read_beginning(path: Path) -> Beginning:
    """Reads header and tokens alone: many files are looked at, and few are read. Raises SessionError where those are
    damaged, or the file is cut off; what else is damaged is found when it is read."""
    with _refusing(path), open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        size = os.fstat(file.fileno()).st_size
        if not 2 <= length <= size - 8:
            raise SessionError(f"{path} is damaged: it has no header. Delete it")
        header = json.loads(file.read(length))
        about = header.pop("__metadata__")
        if (about.get("format"), about.get("version")) != (FORMAT, VERSION):
            raise SessionError(f"{path} is no session of this version: delete it")
        if 8 + length + max(entry["data_offsets"][1] for entry in header.values()) != size:
            raise SessionError(f"{path} is damaged: it is cut off. Delete it")
        start, end = header["tokens"]["data_offsets"]
        file.seek(8 + length + start)
        tokens = np.frombuffer(file.read(end - start), np.uint32)
        description = json.loads(about["description"])
        shown = tuple((int(at), str(medium[_MEDIUM])) for at, medium in description["shown"])
        points = {*(int(mark["offset"]) for mark in description["marks"]), len(tokens)}
        return Beginning(description, tokens, shown, tuple(sorted(points)))


Part = Callable[[str, np.ndarray], "np.ndarray | None"]  # of an array by its name; None: nothing


Loaded = tuple[str, mx.array]  # dtype as safetensors calls it, and values, bfloat16 as uint16


def read_all(path: Path, part: Part | None = None) -> tuple[dict[str, Any], dict[str, mx.array]]:
    """(description with its Media, arrays); raises SessionError where a byte is not what was written.

    part: what to keep of each array; the rest is read, checked and let go, one array at a time.
    """
    description, loaded = read_values(path, part)
    return description, as_arrays(loaded)


def as_arrays(loaded: Mapping[str, Loaded]) -> dict[str, mx.array]:
    """What was read, on the thread that computes with it."""
    return {name: values.view(mx.bfloat16) if tag == "BF16" else values for name, (tag, values) in loaded.items()}


def read_values(path: Path, part: Part | None = None) -> tuple[dict[str, Any], dict[str, Loaded]]:
    """As `read_all`, on any thread: nothing in it has to be evaluated."""
    with _refusing(path):
        entries, metadata = read_header(path)
        with open(path, "rb") as file:
            start = min((entry.offset for entry in entries.values()), default=0)
            digest = hashlib.blake2b(file.read(start), digest_size=DIGEST)
        arrays, pixels = {}, {}
        for name, entry in entries.items():
            values = read(entry)
            if name == _CHECKSUM:
                if values.tobytes() != digest.digest():
                    raise SessionError(f"{path} is damaged: its bytes are not those that were written. Delete it")
            else:
                digest.update(memoryview(values).cast("B"))
                if name.startswith("media."):
                    pixels[name.removeprefix("media.")] = values
                elif part is None or (values := part(name, values)) is not None:
                    arrays[name] = entry.dtype, mx.array(values)
        if _CHECKSUM not in entries:
            raise SessionError(f"{path} is damaged: it has no checksum. Delete it")
        about = json.loads(metadata["media"])
        media = {key: _medium(about[key], rows) for key, rows in pixels.items()}

        def revived(value: dict[str, Any]) -> Any:
            return media[value[_MEDIUM]] if value.keys() == {_MEDIUM} else value

        return json.loads(metadata["description"], object_hook=revived), arrays


def media_bytes(media: Iterable[Media]) -> int:
    """What they take in a file."""
    return sum(_rows(medium).nbytes for medium in media)


def _about(medium: Media) -> dict[str, Any]:
    about = {name: getattr(medium, name) for name in ("kind", "grid", "timestamps", "merge_size")}
    if isinstance(medium.rows, Levels):
        about |= {"mean": medium.rows.mean, "std": medium.rows.std}
    return about


def _rows(medium: Media) -> np.ndarray:
    return medium.rows.levels if isinstance(medium.rows, Levels) else medium.rows


def _medium(about: dict[str, Any], rows: np.ndarray) -> Media:
    levels = rows
    if "mean" in about:
        levels = Levels(rows, tuple(about.pop("mean")), tuple(about.pop("std")))
    return Media(about["kind"], levels, tuple(about["grid"]), tuple(about["timestamps"]), about["merge_size"])


def _pieces(values: np.ndarray) -> Iterator[memoryview]:
    """All bytes in their order."""
    if values.flags.c_contiguous or values.ndim < 2:
        if values.size:
            yield memoryview(np.ascontiguousarray(values).reshape(-1)).cast("B")
        return
    for row in values:
        yield from _pieces(row)


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """Turns what a damaged file leads to into one error that says what to do about a session."""
    try:
        yield
    except SessionError:
        raise
    except ReadError as error:  # which says nothing of the file
        raise SessionError(str(error).replace(", or download the file again", "")) from None
    except CheckpointError as error:
        reason = _ADVICE.sub("", str(error))
        raise SessionError(f"{reason}: it is not a session that can be continued. Delete it, or give another") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SessionError(f"{path} is damaged ({type(error).__name__}: {error}). Delete it") from error


def _place(path: Path) -> Path:
    """Where a file at `path` lies, behind links; raises WriteError where that is no file and cannot become one."""
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        raise WriteError(f"{path} is no file, and a session cannot take its place: give the name of a file")
    if not path.parent.parent.is_dir():  # a folder is made, but one alone
        raise WriteError(f"{path} cannot be written: there is no folder {path.parent}; make it, or give another name")
    return path


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def _put(partial: Path, path: Path) -> None:
    try:
        os.replace(partial, path)
    except OSError as error:
        raise write_error(error, path) from error


def _remove(made: SafetensorsFile) -> None:
    made.close()
    with suppress(OSError):
        made.path.unlink()


def _remove_left_over(path: Path) -> None:
    """What processes that are gone had begun to write."""
    for partial in path.parent.glob(f".{escape(path.name)}.*.partial"):
        process = partial.name.split(".")[-2]
        if process.isdigit():
            try:
                os.kill(int(process), 0)
            except ProcessLookupError:
                partial.unlink(missing_ok=True)
            except OSError:
                pass
