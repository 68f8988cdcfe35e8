"""A prompt from the command line and from what is piped into it. Knows files, pipes and waiting; no flags' meaning.

A pipe that nobody writes to is what many programs leave open for those they start: it is waited for only where the
command line asks for it (`-p -`). Otherwise it is read if something comes soon; what was begun is read to its end.
"""

from __future__ import annotations

import codecs
import io
import os
import select
import stat
import sys
from collections.abc import Sequence
from typing import NamedTuple

from mlx_qwen35.errors import PromptError

STDIN = "-"
SOON = 1.0  # seconds in which a pipe has to begin
PATIENT = 3.0  # seconds without a word about what is waited for


class Asked(NamedTuple):
    """text: the prompt; None: there is none. unread: standard input is a pipe in which nothing had come."""

    text: str | None
    unread: bool


def read_prompt(given: Sequence[str]) -> Asked:
    """The texts of all -p, in their order, with a blank line between; "-" is standard input. If none is "-", what is
    piped in comes last.

    Raises PromptError if standard input is no text, or is asked for and empty.
    """
    if given.count(STDIN) > 1:
        raise PromptError("-p - is given twice, and standard input can be read only once; leave one out")
    if STDIN not in given:
        piped = _piped()
        pieces = [*given, *([piped] if piped else [])]
        return Asked("\n\n".join(pieces) if pieces else None, piped is None)
    text = _text(_everything())
    if not text:
        raise PromptError("standard input is empty; pipe a text into the command, or give one with -p TEXT")
    return Asked("\n\n".join(text if piece == STDIN else piece for piece in given), False)


def tell_missed() -> None:
    """Says so on standard error, if something has come on a pipe that was not waited for."""
    number = _number()
    if number is not None and _comes(number, 0) and os.read(number, 1):
        print(
            f"What came on standard input after {SOON:.0f} second was not read: -p - waits for it.", file=sys.stderr
        )


def _piped() -> str | None:
    """What a file or a program gives, "" if there is neither, None if nothing has come yet."""
    number = _number()
    if number is None:
        return "" if sys.stdin is None or sys.stdin.isatty() else _text(_everything())
    kind = os.fstat(number).st_mode
    if stat.S_ISREG(kind):
        return _text(_everything())
    if not (stat.S_ISFIFO(kind) or stat.S_ISSOCK(kind)):
        return ""
    if not _comes(number, SOON):
        return None
    pieces, said = [], False
    while True:
        if not said and not _comes(number, PATIENT):
            print("Reading standard input to its end before answering.", file=sys.stderr)
            said = True
        if not (piece := os.read(number, 1 << 16)):
            return _text(b"".join(pieces))
        pieces.append(piece)


def _comes(number: int, seconds: float) -> bool:
    """Whether there is something to read, or the end, within so many seconds."""
    return bool(select.select([number], [], [], seconds)[0])


def _number() -> int | None:
    """The file descriptor of standard input; None if it has none."""
    try:
        return sys.stdin.fileno()
    except (AttributeError, io.UnsupportedOperation, ValueError):
        return None


def _everything() -> bytes:
    """Standard input to its end."""
    if sys.stdin is None:
        return b""
    try:
        return sys.stdin.buffer.read()
    except AttributeError:  # a text that stands in for it
        return sys.stdin.read().encode()
    except OSError:  # pytest's, which may not be read
        return b""


def _text(data: bytes) -> str:
    try:
        return codecs.decode(data, "utf-8-sig").replace("\r\n", "\n").rstrip("\n")
    except UnicodeDecodeError as error:
        raise PromptError(f"standard input is no text ({error}); give UTF-8") from error
