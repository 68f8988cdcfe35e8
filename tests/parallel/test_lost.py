"""A rank that dies or hangs: all others end within a bounded time, name it, and what was said and written is right."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlx_qwen35 import Sampling, load
from mlx_qwen35.generation import stream_generate
from mlx_qwen35.machine.system import said
from mlx_qwen35.parallel.wire import SILENCE
from mlx_qwen35.session import file
from tests.conftest import CHECKOUT

MOST = 30.0  # seconds until all others have ended


def lives(process: int) -> bool:
    return (said("ps", "-o", "stat=", "-p", str(process)) or "Z")[0] not in "ZX"


def lose(
    folder: Path, *, ranks: int, plan: str, victim: int, how: int, moment: str, after: float, silence: float = SILENCE
) -> list[str]:
    """Lose a rank some seconds after something was done first; -> the lines that rank 0 printed. silence: of another,
    after which rank 0 takes it for lost; it computes all that time, or tries to."""
    command = [sys.executable, "-m", "tests.parallel.victim", str(ranks), plan, str(folder), str(silence)]
    with open(folder / "errors", "w") as errors:
        rank_0 = subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=errors, text=True)
    processes, lines = {0: rank_0.pid}, []
    try:
        for line in rank_0.stdout:
            lines.append(line.strip())
            kind, *rest = line.split()
            if kind == "rank":
                processes[int(rest[0])] = int(rest[1])
            if kind == moment and len(processes) == ranks:
                break
            if moment == "load" and len(processes) == ranks:
                break
        time.sleep(after)
        os.kill(processes[victim], how)
        until = time.monotonic() + MOST
        others = [process for rank, process in processes.items() if rank != victim]
        lines += [line.strip() for line in rank_0.stdout] if victim else []
        rank_0.poll() if victim == 0 else rank_0.wait(MOST)
        while any(map(lives, others)) and time.monotonic() < until:
            time.sleep(0.05)
        left = [process for process in others if lives(process)]
        assert not left, f"{left} of {processes} live {MOST} s after rank {victim} was lost"
    finally:
        for process in processes.values():
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                pass
        rank_0.wait()
    told = (folder / "errors").read_text()
    assert f"rank {victim}" in told, told
    ended = -signal.SIGKILL if "MLX has not connected" in told else 70  # where MLX lets nothing else run
    if victim:
        assert rank_0.returncode == ended, (rank_0.returncode, told)
    return lines


def check_said(lines: list[str]) -> None:
    """No token is another than a single process says."""
    found: dict[int, list[int]] = {}
    numbers: list[int] = []
    for line in lines:
        kind, *rest = line.split()
        if kind == "prompt":
            numbers.append(-1)
        if kind == "token":
            question, token = map(int, rest)
            if numbers[-1] == -1:
                numbers[-1] = question
                found[question] = []
            found[question].append(token)
    model, processor = load()
    for question, tokens in list(found.items())[-2:]:
        right = [
            part.token
            for part in stream_generate(
                model, processor, f"What is {question} + 25?", max_tokens=12, sampling=Sampling(temperature=0)
            )
        ]
        assert tokens == right[: len(tokens)]


@pytest.mark.parametrize(
    ("victim", "how", "moment"),
    [(1, signal.SIGKILL, "token"), (1, signal.SIGSTOP, "token"), (0, signal.SIGKILL, "prompt")],
)
def test_a_lost_rank_ends_all_and_is_named(tmp_path: Path, victim: int, how: int, moment: str) -> None:
    silence = 4.0 if how == signal.SIGSTOP else SILENCE
    lines = lose(
        tmp_path, ranks=2, plan="experts", victim=victim, how=how, moment=moment, after=0.3, silence=silence
    )
    check_said(lines)


@pytest.mark.soak
def test_ranks_are_lost_at_random_moments(tmp_path: Path) -> None:
    rng = random.Random()
    for number in range(20):
        folder = tmp_path / str(number)
        folder.mkdir()
        how = {
            "ranks": rng.choice((2, 3)), "plan": rng.choice(("experts", "pipeline")),
            "how": rng.choice((signal.SIGKILL, signal.SIGSTOP)),
            "moment": rng.choice(("load", "prompt", "token", "save")), "after": rng.random() * 3,
        }  # fmt: skip
        how["victim"] = rng.randrange(how["ranks"])
        print(how)
        check_said(lose(folder, **how))
        path = folder / "lost.session"
        if path.exists():
            file.read_all(path)  # whole
