"""Reads the small text files of a checkpoint folder, or of what stands for one. Knows JSON and UTF-8, not what the
files mean."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_qwen35.errors import CheckpointError


@dataclass(frozen=True)
class MadeFolder:
    """Files that lie nowhere, by name: what metadata of a checkpoint makes. where: of that checkpoint, for errors."""

    where: Path
    files: Mapping[str, bytes]

    def __truediv__(self, name: str) -> MadeFile:
        return MadeFile(self, name)

    def __str__(self) -> str:
        return str(self.where)


@dataclass(frozen=True)
class MadeFile:
    """One of them, there or not; as much of a Path as reading it takes."""

    parent: MadeFolder
    name: str

    def exists(self) -> bool:
        return self.name in self.parent.files

    def read_bytes(self) -> bytes:
        if not self.exists():
            raise FileNotFoundError(str(self))
        return self.parent.files[self.name]

    def with_name(self, name: str) -> MadeFile:
        return self.parent / name

    def __str__(self) -> str:
        return f"{self.name} of {self.parent}"


Folder = Path | MadeFolder
File = Path | MadeFile


def as_folder(folder: str | os.PathLike[str] | MadeFolder) -> Folder:
    return folder if isinstance(folder, MadeFolder) else Path(folder)


def read_text(path: File) -> str:
    """The file as text. Raises CheckpointError if it is missing, unreadable or not UTF-8."""
    try:
        return path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; copy it from the checkpoint this folder was made from") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 text (byte {error.start}); download it again") from error


def parse_json_object(text: str, path: File) -> dict[str, Any]:
    """`text`, the contents of `path`, as a JSON object. Raises CheckpointError if it is anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__} where an object belongs; download it again")
    return value


def read_json_object(path: File, *, optional: bool = False) -> dict[str, Any]:
    """The file as a JSON object; {} for an `optional` file that is not there."""
    if optional and not path.exists():
        return {}
    return parse_json_object(read_text(path), path)
