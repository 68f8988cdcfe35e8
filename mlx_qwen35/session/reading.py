"""A session file that is read by a thread of its own, while others compute.

Knows a file and the part of it that is wanted. Evaluates nothing, and knows nothing of sessions or of who waits.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np

from mlx_qwen35.session import file
from mlx_qwen35.session.saving import part_of

Found = tuple[dict[str, Any], dict[str, file.Loaded], "file.Part | None"]


class _Dropped(Exception):
    """Nobody wants it any more."""


class Reading:
    """Begins at once. nbytes: what it is going to hold."""

    def __init__(self, path: Path, point: int, nbytes: int) -> None:
        self.nbytes = nbytes
        self._path, self._point = path, point
        self._dropped = False
        self._found: Found | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._read, name="mlx-qwen35 reading", daemon=True)
        self._thread.start()

    @property
    def done(self) -> bool:
        """Whether `result` is there, or what went wrong."""
        return not self._thread.is_alive()

    def wait(self, seconds: float | None = None) -> None:
        """Until it is done, or so many seconds."""
        self._thread.join(seconds)

    def drop(self) -> None:
        """It ends after what it is at."""
        self._dropped = True

    def result(self) -> Found:
        """Once it is done: description, arrays and the part that they are of. Raises SessionError as `read_values`."""
        self.wait()
        found, self._found = self._found, None
        if found is None:
            raise self._error or RuntimeError("a file is read once")
        return found

    def _read(self) -> None:
        try:
            found = read(self._path, self._point, self._look)
            self._found = None if self._dropped else found
        except BaseException as error:  # told by whoever asks
            error.__cause__ = error.__context__ = None  # all of these know what was read
            self._error = error.with_traceback(None)

    def _look(self) -> None:
        if self._dropped:
            raise _Dropped


def read(path: Path, point: int, look: Any = None) -> Found:
    """The past in a file up to one of its points, or all of it. look: called before each array is kept."""
    part = part_of(file.read_description(path), point)

    def kept(name: str, values: np.ndarray) -> np.ndarray | None:
        look()
        return values if part is None else part(name, values)

    description, values = file.read_values(path, part if look is None else kept)
    return description, values, part
