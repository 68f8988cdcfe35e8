"""docs/GUIDE.md says which flags of mlx-lm are not supported: all others are, in `generate` and in `chat`."""

import argparse
import re

import pytest

from mlx_qwen35.cli.main import build_parser
from tests.conftest import CHECKOUT


def flags(parser: argparse.ArgumentParser) -> set[str]:
    return {flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")}


def not_here() -> str:
    guide = (CHECKOUT / "docs/GUIDE.md").read_text()
    told = " ".join(guide.split()).partition("flags of mlx-lm are not supported:")[2].partition("`--help` lists")[0]
    assert told
    return told


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_flags_of_mlx_lm_bear_their_names(command):
    module = pytest.importorskip(f"mlx_lm.{command}", reason="mlx-lm is not installed")
    (commands,) = [action for action in build_parser()._actions if isinstance(action.choices, dict)]
    theirs, ours = flags(module.setup_arg_parser()), flags(commands.choices[command])
    told = not_here()
    missing = set(re.findall(r"`(--[a-z-]+)`", told)) - {"--session"}
    assert theirs - ours <= missing
    assert not missing & ours


def test_the_list_is_no_longer_than_it_has_to_be():
    modules = [pytest.importorskip(f"mlx_lm.{name}", reason="mlx-lm is not installed") for name in ("generate", "chat")]
    theirs = set().union(*(flags(module.setup_arg_parser()) for module in modules))
    told = not_here()
    assert set(re.findall(r"`(--[a-z-]+)`", told)) - {"--session"} <= theirs
