"""The file that a chat is kept in: saved after every answer, and written by one program at a time.

Knows when it is written and what it is called. What is in it is the conversation's.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_qwen35.errors import PromptError, Qwen35Error
from mlx_qwen35.machine.interrupt import Ending
from mlx_qwen35.session.file import check_place, read_description
from mlx_qwen35.session.lock import SessionLock

if TYPE_CHECKING:
    from mlx_qwen35.conversation import Conversation


_LARGE = 64 << 20  # bytes
_SHARE = 20


class Keeping:
    """path None: the chat is not kept. Whoever makes one leaves it with `close`."""

    def __init__(self, path: str | None, ending: Ending) -> None:
        self._ending = ending
        self._locks = ExitStack()
        self.path: Path | None = None
        self._whole: tuple[float, float] | None = None  # when all was written last, and how long it took
        if path is not None:
            self._take(Path(path))

    @property
    def is_new(self) -> bool:
        """Whether there is to be a file that is not there yet."""
        return self.path is not None and not self.path.exists()

    def save(self, talk: Conversation) -> None:
        """Writes all of it, whole or not at all, whatever signal comes meanwhile. Raises WriteError."""
        if self.path is not None:
            begin = time.monotonic()
            with self._ending.deferred():
                talk.save(self.path)
            self._whole = time.monotonic(), time.monotonic() - begin

    def save_or_say(self, talk: Conversation) -> bool:
        """After an answer: writes all of a small one, and of a large one mostly what was said alone, so that it takes
        a twentieth of the time at most; -> whether all is written. Says it where the disk refuses."""
        if self.path is None:
            return True
        try:
            if talk.nbytes > _LARGE and self._whole is not None:
                when, took = self._whole
                if time.monotonic() - when < _SHARE * took:
                    with self._ending.deferred():
                        talk.save(self.path, computed=False)
                    return False
            self.save(talk)
        except Qwen35Error as error:
            print(f"error: the chat is not saved: {error}", file=sys.stderr)
            return False
        return True

    def is_in(self, path: Path) -> bool:
        return self.path is not None and os.path.realpath(path) == os.path.realpath(self.path)

    def go_on_with(self, path: Path) -> None:
        """Keeps the chat in another file from now on; the one before stays as it was written last. Nothing where it is
        not kept. Raises SessionError where another program has that file."""
        if self.path is not None and not self.is_in(path):
            before = self._locks.pop_all()
            try:
                self._take(path)
            except BaseException:
                self._locks.close()
                self._locks = before
                raise
            before.close()

    def close(self) -> None:
        self._locks.close()

    def _take(self, path: Path) -> None:
        check_place(path)
        self._locks.enter_context(SessionLock(path))
        if path.exists():
            read_description(path)  # what is no session is told before anything is loaded
        self.path, self._whole = path, None


def save_copy(talk: Conversation, path: Path) -> None:
    """Writes a session to a file beside the one the chat is kept in. Raises PromptError where another kind of file has
    that name."""
    check_place(path)
    if path.exists():
        try:
            read_description(path)
        except Qwen35Error:
            raise PromptError(f"{path} is there already and is no session: give another name") from None
    with SessionLock(path):
        talk.save(path)
