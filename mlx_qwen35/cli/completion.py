"""`completion`: what a shell needs to complete commands, flags, their values and the names of models with Tab.

Knows which flags take the name of a model. Completing is argcomplete's, which has the shell run this program with what
was typed so far, in the environment; nothing of it is loaded otherwise.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable

DESCRIPTION = "Print a shell script that completes commands, flags and model names."
SHELLS = ("bash", "zsh", "fish")
_LINES = {
    "bash": 'in ~/.bashrc:  eval "$(mlx-qwen35 completion bash)"',
    "zsh": 'in ~/.zshrc, after compinit:  eval "$(mlx-qwen35 completion zsh)"',
    "fish": "in ~/.config/fish/config.fish:  mlx-qwen35 completion fish | source",
}
_MODELS = ("model", "draft_model", "ref", "source", "hf_path")  # flags and words that name one


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=SHELLS, help="; ".join(_LINES.values()))


def run(args: argparse.Namespace) -> int:
    from argcomplete import shellcode

    print(shellcode(["mlx-qwen35"], shell=args.shell))
    return 0


def asked() -> bool:
    """Whether a shell runs this program to know how what was typed may go on."""
    return "_ARGCOMPLETE" in os.environ


def answer(parser: argparse.ArgumentParser, commands: Iterable[argparse.ArgumentParser]) -> None:
    """Tells the shell, and ends the program."""
    from argcomplete import autocomplete
    from argcomplete.completers import FilesCompleter

    files = FilesCompleter()

    def models(prefix: str, **_: object) -> list[str]:
        from mlx_qwen35.library.listing import list_models

        here = [model.name for model in list_models() if model.complete and model.name.startswith(prefix)]
        return [*here, *files(prefix)]

    for command in commands:
        for action in command._actions:
            if action.dest in _MODELS:
                action.completer = models  # type: ignore[attr-defined]  # where argcomplete looks
    autocomplete(parser, always_complete_options="long")
