"""`chat`: a conversation in the terminal. What is said is conversation.py's; here are lines and commands."""

from __future__ import annotations

import argparse
import errno
import os
import sys

from mlx_qwen35.cli import opening, options
from mlx_qwen35.machine.interrupt import Terminated, ending_on_signals

DESCRIPTION = "Chat with a model."
HUNG_UP = 128 + 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model_arguments(parser)
    options.add_answer_arguments(parser)


def run(args: argparse.Namespace) -> int:
    if (status := opening.follows(args)) is not None:
        return status
    from mlx_qwen35.cli.chat.running import converse

    with ending_on_signals() as ending:
        try:
            return converse(args, ending)
        except Terminated as ended:
            status = ended.status
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            status = HUNG_UP  # the terminal is gone, whether or not its signal has come
        _flush_or_drop()
        return status


def _flush_or_drop() -> None:
    """A terminal that is gone takes no more; the exit status is not to suffer for it."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            try:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            except (OSError, ValueError):
                pass
