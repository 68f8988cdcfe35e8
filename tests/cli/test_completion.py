"""Tab in bash, zsh and fish, each run as a user runs it, with what `completion` prints."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_qwen35.cli.completion import SHELLS
from tests.conftest import CHECKOUT

# What each shell offers after `$1`, a line a word.
ASK = {
    "bash": """
        eval "$(mlx-qwen35 completion bash)"
        COMP_LINE="$1" COMP_POINT=${#1} COMP_TYPE=9
        _python_argcomplete mlx-qwen35
        printf '%s\\n' "${COMPREPLY[@]}"
    """,
    "fish": """
        mlx-qwen35 completion fish | source
        complete --do-complete $argv[1]
    """,
    # In a terminal of its own Tab is pressed, and the line shown as it is then.
    "zsh": """
        zmodload zsh/zpty
        zpty z "PS1= zsh -f -i"
        zpty -w z 'autoload -Uz compinit; compinit -u -D; eval "$(mlx-qwen35 completion zsh)"'
        zpty -w z 'press() { zle complete-word; print -r -- "{$BUFFER}"; zle send-break; }; zle -N press'
        zpty -w z 'bindkey "^I" press; print rea""dy'
        zpty -r -m z line '*ready*'
        zpty -n -w z "$1"$'\\t'
        zpty -r -m z line '*{mlx*}*'
        print -r -- $line
    """,
}


def offered(shell: str, typed: str, folder: Path) -> str:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    program = folder / "mlx-qwen35"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m mlx_qwen35 "$@"\n')
    program.chmod(0o755)
    (folder / "shape.png").touch()
    home = {name: str(folder) for name in ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "HF_HOME")}
    found = [str(CHECKOUT), *filter(None, [os.environ.get("PYTHONPATH")])]
    path = {"PATH": os.pathsep.join([str(folder), os.environ["PATH"]]), "PYTHONPATH": os.pathsep.join(found)}
    words = ["-c", ASK[shell], *([] if shell == "fish" else ["shell"]), typed]
    done = subprocess.run(
        [shell, *(["-f"] if shell == "zsh" else []), *words],
        cwd=folder, env={**os.environ, **home, **path}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("shell", SHELLS)
def test_what_tab_offers(shell: str, tmp_path: Path) -> None:
    assert "doctor" in offered(shell, "mlx-qwen35 doc", tmp_path)


@pytest.mark.parametrize("shell", ["bash", "fish"])
def test_flags_values_and_models(shell: str, tmp_path: Path) -> None:
    assert "--thinking-budget" in offered(shell, "mlx-qwen35 chat --thinking-b", tmp_path)
    assert {"affine", "mxfp4", "nvfp4"} <= set(offered(shell, "mlx-qwen35 convert --q-mode ", tmp_path).split())
    models = offered(shell, "mlx-qwen35 generate --model ", tmp_path)
    assert "demo" in models and "shape.png" in models
    assert "shape.png" in offered(shell, "mlx-qwen35 generate --image sh", tmp_path)
