"""`mlx-qwen35`: the subcommands, and what every one of them does with errors, Ctrl-C and a closed pipe.

Knows which subcommands there are, and what to install where a package is missing. Loads nothing heavy: --help and a
wrong flag answer at once.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mlx_qwen35 import __version__
from mlx_qwen35.cli import chat, completion, convert, doctor, estimate, generate, ls, serve
from mlx_qwen35.cli.demo import DEMO_HINT
from mlx_qwen35.cli.wrong import Parser, command_named, near
from mlx_qwen35.errors import Qwen35Error, Qwen35Warning, RankLostError
from mlx_qwen35.machine import system
from mlx_qwen35.parallel import early, place

INTERRUPTED = 130
PIPE_CLOSED = 141


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="mlx-qwen35", description="Run Qwen3.5, 3.6 and 3.8 on MLX.", epilog=DEMO_HINT)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=Parser)
    for module in (generate, chat, serve, convert, ls, estimate, doctor, completion):
        name = module.__name__.rpartition(".")[2]
        epilog = DEMO_HINT if module in (generate, chat) else None
        command = commands.add_parser(name, help=module.DESCRIPTION, description=module.DESCRIPTION, epilog=epilog)
        module.add_arguments(command)
        command.set_defaults(run=module.run, parser=command)
        command.others = commands.choices
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status: 0, 2 for an error, 70 where a rank is lost, 130 for Ctrl-C, 141 for
    a closed pipe."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # an answer does not end at a character that the terminal lacks
            stream.reconfigure(errors="replace")
    args = _parsed(sys.argv[1:] if argv is None else list(argv))
    status = _run(args)
    place.say_status(status)
    if status == early.STATUS:  # MLX's threads may wait for a rank that is lost, and with them an end in good order
        sys.stderr.flush()
        os._exit(status)
    return status


def _run(args: argparse.Namespace) -> int:
    try:
        with _plain_warnings():
            status = args.run(args)
        sys.stdout.flush()
        return status
    except RankLostError as error:
        print(f"error: {error}", file=sys.stderr)
        return early.STATUS
    except Qwen35Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ImportError as error:
        if (advice := _what_to_install(error)) is None:
            raise
        print(f"error: {advice}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        with suppress(OSError, ValueError):  # so that the flush at exit does not fail once more
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED


def _parsed(argv: list[str]) -> argparse.Namespace:
    """What the words mean; ends the program where they mean nothing, with what was probably meant."""
    parser = build_parser()
    (commands,) = (action.choices for action in parser._actions if isinstance(action.choices, dict))
    if completion.asked():
        completion.answer(parser, commands.values())
    first = argv[0] if argv else ""
    if not argv:
        parser.print_help(sys.stderr)
        parser.exit(2)
    if first == "help":
        argv = [word for word in argv[1:] if word in commands] + ["--help"]
    elif first.startswith("-") and first.partition("=")[0] not in parser._option_string_actions:
        name = next((word for word in argv if word in commands), None)
        rest = [word for word in argv if word != name]
        if name is None and (alike := near(first, parser._option_string_actions)):
            parser.error(f"{first} is no flag: did you mean {alike[0]}?")
        parser.error(f"a command comes before its flags: `mlx-qwen35 {shlex.join([name or 'generate', *rest])}`")
    elif not first.startswith("-") and first not in commands:
        parser.error(f"{first!r} is no command{_command_meant(commands, first, argv[1:])}")
    if first in commands and (odd := commands[first].long_after_one_dash(argv[1:])):
        commands[first].refuse(odd)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        args.parser.refuse(unknown)
    return args


def _command_meant(commands: Iterable[str], word: str, rest: list[str]) -> str:
    if name := command_named(commands, word):
        model = ["--model"] if name in ("chat", "generate") and rest and not rest[0].startswith("-") else []
        return f": did you mean `mlx-qwen35 {shlex.join([name, *model, *rest])}`?"
    if " " in word or word.endswith("?"):
        return f": a question is asked by `mlx-qwen35 {shlex.join(['generate', '-p', word, *rest])}`"
    return f"; there are {', '.join(commands)}"


_PACKAGES = {"PIL": "pillow", "mlx_lm": "mlx-lm", "mlx_vlm": "mlx-vlm", "IPython": "ipython"}
_NEEDED = ("mlx", "mlx_lm", "numpy", "safetensors", "PIL", "tokenizers", "jinja2", "huggingface_hub", "prompt_toolkit")
_NEEDED += ("argcomplete",)


def _what_to_install(error: ImportError) -> str | None:
    """One line where a package that is needed is not there, or none of its files fit this machine; None otherwise."""
    name = (error.name or "").partition(".")[0]
    if name not in _NEEDED:
        return None
    package = _PACKAGES.get(name, name)
    if find_spec("mlx") is None and (why := system.without_mlx()):
        return f"MLX is not installed, and is not made for {why}"
    if not isinstance(error, ModuleNotFoundError):
        return f"{package} is installed and does not start ({error}): `{_pip()} --force-reinstall {package}`"
    return f"{package} is not installed for {sys.executable}: {_how_to_install()}"


def _how_to_install() -> str:
    root = Path(__file__).resolve().parents[2]
    if not (root / "pyproject.toml").exists():
        return f"install this package again with what it needs, `{_pip()} --force-reinstall PATH`, PATH being its clone"
    made = root / ".venv" / "bin" / "python"
    if made.exists() and made != Path(sys.executable):
        return f"{made} has what is needed: run that one, or `{_pip()} {shlex.quote(str(root))}`"
    return f"in {root} run `make demo`, which makes a .venv with all that is needed, or `{_pip()} .`"


def _pip() -> str:
    name = os.path.basename(sys.executable)
    return f"{shlex.quote(name if shutil.which(name) == sys.executable else sys.executable)} -m pip install"


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
