"""`mlx-qwen35`: the subcommands, and what every one of them does with errors, Ctrl-C and a closed pipe.

Knows which subcommands there are. Loads nothing heavy: --help and a wrong flag answer at once.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from mlx_qwen35 import __version__
from mlx_qwen35.cli import chat, convert, doctor, estimate, generate, ls
from mlx_qwen35.errors import Qwen35Error, Qwen35Warning

INTERRUPTED = 130
PIPE_CLOSED = 141


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mlx-qwen35", description="Run Qwen3.5 on MLX.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in (generate, chat, convert, ls, estimate, doctor):
        name = module.__name__.rpartition(".")[2]
        description = module.DESCRIPTION
        command = commands.add_parser(name, help=description, description=description, allow_abbrev=False)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status: 0, 2 for an error, 130 for Ctrl-C, 141 for a closed pipe."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # an answer does not end at a character that the terminal lacks
            stream.reconfigure(errors="replace")
    args = build_parser().parse_args(argv)
    try:
        with _plain_warnings():
            status = args.run(args)
        sys.stdout.flush()
        return status
    except Qwen35Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        with suppress(OSError, ValueError):  # so that the flush at exit does not fail once more
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """This package's warnings as a line for people, without a place in the code."""
    before = warnings.formatwarning

    def plain(message: Warning | str, category: type[Warning], *place: Any) -> str:
        return f"warning: {message}\n" if issubclass(category, Qwen35Warning) else before(message, category, *place)

    warnings.formatwarning = plain
    try:
        yield
    finally:
        warnings.formatwarning = before


if __name__ == "__main__":
    sys.exit(main())
