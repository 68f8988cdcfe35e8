"""The hidden place beside a target in which a conversion works until the target is complete.

Knows folders, locks and names. Knows nothing of tensors. All of it lies in one folder beside the target, so that one
name is enough to find, go on with or remove what an interruption left behind:

    .TARGET.partial/journal     what is done; locked by the process that works
    .TARGET.partial/folder/     what will be TARGET, config.json last
    .TARGET.partial/replaced/   the TARGET that was there, for the moment in which the two change places
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mlx_qwen35.conversion.journal import Refused
from mlx_qwen35.conversion.write import write_error
from mlx_qwen35.errors import CheckpointError
from mlx_qwen35.machine.files import flush_names, lock

_LONGEST_NAME = 255  # bytes, of a file on all common disks


class Partial:
    """One conversion's hidden folder. It is this process's own from claim() to the end of its block."""

    def __init__(self, target: Path):
        self.target = target
        self.container = container_of(target)
        self.folder = self.container / "folder"
        self.journal = self.container / "journal"
        self._replaced = self.container / "replaced"

    def restore(self) -> None:
        """Put back the old target if a kill hit the moment in which it had no name."""
        if self._replaced.exists() and not self.target.exists():
            self._replaced.rename(self.target)

    def clear(self) -> None:
        """Remove what an earlier conversion did; the lock stays."""
        shutil.rmtree(self.folder, ignore_errors=True)
        os.truncate(self.journal, 0)

    def finish(self, overwrite: bool) -> None:
        """Give the folder its name. One that has it already is replaced if `overwrite`, and put back on a failure."""
        try:
            self._exchange(overwrite)
        except OSError as error:
            raise write_error(error, self.target) from error
        self.discard()

    def _exchange(self, overwrite: bool) -> None:
        replaced = False
        if overwrite and self.target.exists():
            shutil.rmtree(self._replaced, ignore_errors=True)
            self.target.rename(self._replaced)
            replaced = True
        try:
            if self.target.exists():  # since the beginning, or rename() would move into it
                raise Refused(f"{self.target} appeared during the conversion: move it, and go on with --resume")
            self.folder.rename(self.target)
        except BaseException:
            if replaced:
                self._replaced.rename(self.target)
            raise
        flush_names(self.target.parent)

    def discard(self) -> None:
        """Remove all of it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.rmtree(self._replaced, ignore_errors=True)
        with suppress(OSError):
            self.journal.unlink()
        with suppress(OSError):
            self.container.rmdir()


def container_of(target: Path) -> Path:
    """The hidden folder of a target."""
    name = f".{target.name}.partial"
    if len(os.fsencode(name)) > _LONGEST_NAME:
        name = f".{hashlib.sha256(os.fsencode(target.name)).hexdigest()[:32]}.partial"
    return target.parent / name


@contextmanager
def claim(target: Path) -> Iterator[Partial]:
    """The target's hidden folder, made if it is not there, for this process alone.

    Raises CheckpointError if another process has it (one that was killed does not), and for a target that is a link or
    has no name: what is made beside it would not lie beside the folder that is meant.
    """
    if target.is_symlink():
        raise Refused(f"{target} is a link to {os.readlink(target)}: give the folder that it leads to, or remove it")
    if len(os.fsencode(target.name)) > _LONGEST_NAME:
        raise Refused(f"{target} has a name of more than {_LONGEST_NAME} bytes, which disks do not take: shorten it")
    if target.name in ("", ".."):
        raise Refused(f"{target} is a way to a folder and not its name: give the name")
    partial = Partial(target)
    try:
        handle = _locked(partial)
    except OSError as error:
        raise write_error(error, partial.container) from error
    try:
        partial.restore()
        yield partial
    finally:
        os.close(handle)  # and with it the lock


def _locked(partial: Partial) -> int:
    while True:
        partial.container.mkdir(parents=True, exist_ok=True)
        handle = os.open(partial.journal, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            locked = lock(handle)
        except BlockingIOError:
            os.close(handle)
            raise CheckpointError(
                f"another conversion is writing {partial.target} at this moment: wait for it, or choose another target"
            ) from None
        except OSError:
            os.close(handle)
            raise
        if not locked:  # two conversions to one target are not noticed there
            return handle
        # The one that had the lock before may have removed this very file while we waited for nothing.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(partial.journal)):
                return handle
        os.close(handle)
