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

from mlx_qwen35.errors import PromptError

STDIN = "-"
SOON = 1.0  # seconds in which a pipe has to begin
PATIENT = 3.0  # seconds without a word about what is waited for


def read_prompt(given: Sequence[str]) -> str | None:
    """The texts of all -p, in their order, with a blank line between; "-" is standard input. If none is "-", what is
    piped in comes last. None: there is no text at all.

    Raises PromptError if standard input is no text, or is asked for and empty.
    """
    if STDIN not in given:
        piped = _piped()
        return "\n\n".join([*given, *([piped] if piped else [])]) if given or piped else None
    if given.count(STDIN) > 1:
        raise PromptError("-p - is given twice, and standard input can be read only once; leave one out")
    text = _text(_everything())
    if not text:
        raise PromptError("standard input is empty; pipe a text into the command, or give one with -p TEXT")
    return "\n\n".join(text if piece == STDIN else piece for piece in given)


def _piped() -> str:
    """What a file or a program gives, "" if there is neither or nothing comes soon."""
    number = _number()
    if number is None:
        return "" if sys.stdin is None or sys.stdin.isatty() else _text(_everything())
    kind = os.fstat(number).st_mode
    if stat.S_ISREG(kind):
        return _text(_everything())
    if not (stat.S_ISFIFO(kind) or stat.S_ISSOCK(kind)):
        return ""
    if not _comes(number, SOON):
        print(
            f"Nothing came on standard input within {SOON:.0f} second: going on without. (-p - waits for it, "
            "</dev/null says that there is none.)",
            file=sys.stderr,
        )
        return ""
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
