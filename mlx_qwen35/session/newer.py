"""What was said since a session file was written, in a small file beside it: a large session is not written whole after
every answer.

Knows the two files, and when the small one counts. Knows nothing of what notes hold.

.NAME.newer has the notes and the checksum of the file they are newer than, which ends that file. Once a whole file is
in its place they say nothing any more, and are deleted.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlx_qwen35.errors import Qwen35Error
from mlx_qwen35.session import file


def write(path: Path, notes: Any) -> None:
    """Write notes beside the session file at `path`, which is there. Raises WriteError where the disk refuses."""
    path = Path(os.path.realpath(path))
    file.write(_beside(path), {"newer_than": _end(path), "notes": notes}, {})


def read(path: Path, notes: Any) -> Any:
    """The notes that are newer than the file, or `notes`, which are those in it."""
    path = Path(os.path.realpath(path))
    beside = _beside(path)
    if beside.exists():
        with suppress(Qwen35Error):  # what is damaged has nothing to say
            told: Mapping[str, Any] = file.read_all(beside)[0]
            if told.get("newer_than") == _end(path):
                return told["notes"]
    return notes


def forget(path: Path) -> None:
    """The file at `path` is the newest."""
    with suppress(OSError):
        _beside(Path(os.path.realpath(path))).unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.newer")


def _end(path: Path) -> str | None:
    """The checksum that ends a session file."""
    try:
        with open(path, "rb") as whole:
            whole.seek(-file.DIGEST, os.SEEK_END)
            return whole.read().hex()
    except OSError:
        return None
