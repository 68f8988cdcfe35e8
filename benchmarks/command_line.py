"""Questions asked through the command line, as a user asks them: flags in, one JSON object out.

Knows the flags of `generate` and its --json. Knows nothing of what is asked, and nothing of the model.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from mlx_qwen35.cli.main import main

ROOT = Path(__file__).resolve().parents[1]


class CommandFailed(Exception):
    """The command left with another status than 0."""


@dataclass(frozen=True)
class Answer:
    reasoning: str
    content: str


@dataclass(frozen=True)
class CommandLine:
    """model: a checkpoint folder (None: the demo); processes: start one for each question, or call `main` in this one.
    Answers are greedy."""

    model: str | None = None
    processes: bool = False
    max_tokens: int = 160

    def ask(self, question: str, media: Sequence[tuple[str, Path]], *, think: bool) -> Answer:
        """media: ("image" or "video", file), in order. Raises CommandFailed with what the command said."""
        argv = ["generate", "-p", question, "--json", "--temperature", "0", "-n", str(self.max_tokens)]
        argv.append("--think" if think else "--no-think")
        if self.model is not None:
            argv += ["--model", self.model]
        for kind, file in media:
            argv += [f"--{kind}", str(file)]
        status, out, err = self._run_process(argv) if self.processes else _run_here(argv)
        if status != 0:
            raise CommandFailed(f"mlx-qwen35 {' '.join(argv)}\nleft with {status}: {err}")
        record = json.loads(out)
        return Answer(record["reasoning"], record["content"])

    @staticmethod
    def _run_process(argv: list[str]) -> tuple[int, str, str]:
        command = [sys.executable, "-m", "mlx_qwen35.cli.main", *argv]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", check=False)
        return done.returncode, done.stdout, done.stderr


def _run_here(argv: list[str]) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = main(argv)
    return status, out.getvalue(), err.getvalue()
