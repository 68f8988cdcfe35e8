"""What conversions to folders and to files have in common: what was done before, how far they are, what stays behind.

Knows journals, checksums and what a source is made of. Knows neither tensors nor what is written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from typing import Protocol, TypeVar

import mlx.core as mx

from mlx_qwen35 import __version__
from mlx_qwen35.checkpoint import adapters
from mlx_qwen35.checkpoint.files import ReadError, fingerprint
from mlx_qwen35.checkpoint.mtp import find_mtp
from mlx_qwen35.checkpoint.source import Source
from mlx_qwen35.conversion import pipeline
from mlx_qwen35.conversion.journal import Journal, Refused, is_begun
from mlx_qwen35.conversion.partial import Partial
from mlx_qwen35.conversion.write import WriteError
from mlx_qwen35.errors import CheckpointError

OnProgress = Callable[[int, int], None]

_GO_ON = "Go on with --resume (resume=True)"


class Work(Protocol):
    """A piece of a conversion, or whatever else is put in its place at once."""

    @property
    def name(self) -> str: ...

    @property
    def nbytes(self) -> int: ...

    def found(self) -> list[str]:
        """The checksums of what lies in its place."""


AnyWork = TypeVar("AnyWork", bound=Work)


class Progress:
    """Counts bytes for a callback."""

    def __init__(self, total: int, report: OnProgress | None):
        self.done, self.total, self.report = 0, total, report

    def begin(self, count: int) -> None:
        """So much was done before."""
        self.add(count)

    def add(self, count: int) -> None:
        self.done += count
        if self.report:
            self.report(self.done, self.total)


def left_to_do(pieces: Iterable[AnyWork], journal: Journal, progress: Progress) -> list[AnyWork]:
    """The pieces that do not lie in their place, as the checksums say: a power failure may lose what was written."""
    pieces = list(pieces)
    recorded = [piece for piece in pieces if piece.name in journal.done]
    good = set()

    def compare(piece: AnyWork, sums: list[str]) -> None:
        if sums == journal.done[piece.name]:
            good.add(piece.name)

    pipeline.run(recorded, lambda piece: piece.found(), compare)
    progress.begin(sum(piece.nbytes for piece in recorded if piece.name in good))
    return [piece for piece in pieces if piece.name not in good]


def digest(origin: Source, adapter: adapters.Adapter | None) -> str:
    """Of what the target's bytes are made of: the files of source and adapter as they are now, and MLX.

    Times alone would not do: archives and builds that are to be repeated give every file the same.
    """
    paths = {entry.file for entry in origin.files.entries.values()}
    paths |= {path for path in [origin.folder / "config.json"] if path.exists()}  # a GGUF has none
    paths = sorted(paths | set(find_mtp(origin).paths))
    paths += [] if adapter is None else [*adapter.files]
    found = [(path.name, path.stat().st_mtime_ns, fingerprint(path)) for path in paths]
    device = mx.default_device().type
    text = json.dumps([str(origin.folder.resolve()), found, mx.__version__, str(device), __version__])
    return hashlib.sha256(text.encode()).hexdigest()


def clean_up(error: BaseException, partial: Partial) -> None:
    """Keep what can be gone on with; nothing else stays behind."""
    damaged = isinstance(error, CheckpointError) and not isinstance(error, (WriteError, ReadError, Refused))
    if damaged or not is_begun(partial.journal):
        partial.discard()
    elif isinstance(error, (WriteError, ReadError)):
        error.args = (f"{error}. {_GO_ON}",)


def check_unfinished(partial: Partial, overwrite: bool, resume: bool) -> None:
    """Raises Refused where an interrupted conversion is neither gone on with nor discarded."""
    if is_begun(partial.journal) and not overwrite and not resume:
        raise Refused(
            f"an unfinished conversion to {partial.target} lies in {partial.container}: go on with it (--resume, or "
            "resume=True), discard it (--overwrite, or overwrite=True), or choose another target"
        )
