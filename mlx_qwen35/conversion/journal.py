"""What of a conversion is done: a file that grows by a line for each piece that lies in its place.

Knows lines, checksums and what a conversion was asked for, in words. Knows neither tensors nor threads. A line is
written after the bytes of which it speaks; a kill can cut off the last line only, and that one is not read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlx_qwen35.conversion.write import write_error
from mlx_qwen35.errors import CheckpointError
from mlx_qwen35.machine.files import flush

VERSION = 6  # of the journal, the order of pieces and the bytes that are written: another one cannot be gone on with

Settings = dict[str, Any]


class Refused(CheckpointError):
    """What lies there already is in the way, and stays as it is."""


class Journal:
    """A conversion's journal, open for more lines.

    settings: what was asked for. sources: a digest of what it is made of. assignment: what was decided on the way and
    is not decided again. done: piece -> the checksums of what it wrote. lost: piece -> what quantizing it lost, as
    numbers, where it was quantized. finished: whether nothing is left to be done.
    """

    def __init__(self, path: Path, settings: Settings, sources: str):
        self._path, self._settings, self._sources = path, settings, sources
        self.assignment: dict[str, Any] | None = None
        self.done: dict[str, list[str]] = {}
        self.lost: dict[str, list[float]] = {}
        self.finished = False
        self._handle = os.open(path, os.O_RDWR | os.O_APPEND)

    def start(self, assignment: dict[str, Any] | None) -> None:
        """Begin an empty one."""
        self.assignment = assignment
        self._append(
            {"version": VERSION, "settings": self._settings, "sources": self._sources, "assignment": assignment}
        )

    def resume(self) -> None:
        """Read what an earlier process did; raises CheckpointError if that was another conversion."""
        lines = _whole_lines(self._handle)
        os.truncate(self._handle, sum(len(line) + 1 for line in lines))
        if not lines:
            return
        try:
            head, *rest = (json.loads(line) for line in lines)
            if not all(isinstance(line, dict) for line in (head, *rest)):
                raise ValueError("a line is no object")
        except ValueError as error:
            raise Refused(
                f"{self._path} is damaged ({error}), so what was done is not known: discard that work with --overwrite"
            ) from None
        _check(self._path, head, self._settings, self._sources)
        self.assignment = head["assignment"]
        for line in rest:
            if "piece" in line:
                self.done[line["piece"]] = line["sums"]
                if "lost" in line:
                    self.lost[line["piece"]] = line["lost"]
            self.finished = "finished" in line

    def record(self, piece: str, sums: list[str], lost: list[float] | None) -> None:
        """A piece lies in its place."""
        self.done[piece] = sums
        if lost is not None:
            self.lost[piece] = lost
        self._append({"piece": piece, "sums": sums} | ({} if lost is None else {"lost": lost}))

    def finish(self) -> None:
        """All of the folder is there."""
        self.finished = True
        self._append({"finished": True})
        with suppress(OSError):  # without it the work is looked at again, and found done
            flush(self._handle)

    def close(self) -> None:
        os.close(self._handle)

    def _append(self, line: Mapping[str, Any]) -> None:
        try:
            data = json.dumps(line, separators=(",", ":")).encode() + b"\n"
            if os.write(self._handle, data) != len(data):
                raise OSError(28, "No space left on device")
        except OSError as error:
            raise write_error(error, self._path) from error


def is_begun(path: Path) -> bool:
    """Whether some piece of an earlier conversion is recorded in a journal."""
    try:
        handle = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        return len(_whole_lines(handle)) > 1
    finally:
        os.close(handle)


def _whole_lines(handle: int) -> list[bytes]:
    """The lines of a journal, but for one at the end that a kill cut off."""
    with open(handle, "rb", closefd=False) as file:
        file.seek(0)
        return file.read().split(b"\n")[:-1]


def _check(path: Path, head: Mapping[str, Any], settings: Settings, sources: str) -> None:
    was = head.get("settings", {})
    ways = "take the same again, discard that work with --overwrite, or choose another target"
    if head.get("version") != VERSION:
        raise Refused(f"{path.parent} is of another version of this package: {ways}")
    other = [key for key in settings if was.get(key) != settings[key]]
    if other:
        listed = ", ".join(f"{key} {was.get(key)} and not {settings[key]}" for key in other)
        raise Refused(f"the conversion in {path.parent} was begun with {listed}: {ways}")
    if head.get("sources") != sources:
        raise Refused(
            "the files of the source, MLX or this package have changed since the conversion in "
            f"{path.parent} was begun: discard that work with --overwrite"
        )
