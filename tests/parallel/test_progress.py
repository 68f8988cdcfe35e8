"""A rank that lives and does nothing more: who is told from what all say of their progress; that every other ends."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlx_qwen35.parallel import progress, ranks, wire
from mlx_qwen35.parallel.progress import IDLE, WAITS, WORKS, Progress, Sign, hanging
from mlx_qwen35.parallel.ranks import Ranks
from tests.conftest import CHECKOUT

from .test_lost import MOST, lives
from .test_meeting import pair


def sign(state: int, met: int, seconds: float) -> tuple[Sign, float]:
    return Sign(state, 100 + met, met, 15.0), seconds


@pytest.mark.parametrize(
    ("signs", "found"),
    [
        ([sign(IDLE, 7, 900), sign(IDLE, 7, 900)], []),  # nobody asks anything
        ([sign(WORKS, 9, 16), sign(WORKS, 8, 16)], [1]),  # rank 0 waits in its ninth sum
        ([sign(WORKS, 9, 16), sign(WORKS, 8, 3)], []),  # rank 1 is slow
        ([sign(WORKS, 8, 16), sign(WORKS, 9, 3)], [0]),
        ([sign(WORKS, 9, 16), sign(WORKS, 9, 17)], [0, 1]),  # both inside of MLX
        ([sign(WORKS, 9, 16), sign(WORKS, 9, 2)], []),
        ([sign(WORKS, 9, 16), sign(WAITS, 9, 16)], [0]),  # of many rows
        ([sign(WAITS, 2, 20), sign(WORKS, 1, 16), sign(WAITS, 1, 20)], [1]),  # a pipeline
        ([sign(WAITS, 2, 20), sign(WORKS, 1, 14), sign(WAITS, 1, 20)], []),
        ([sign(WAITS, 2, 16), sign(IDLE, 2, 99), sign(WAITS, 1, 16)], [2]),  # a message is lost
        ([sign(WORKS, 9, 16), sign(IDLE, 9, 16)], [0]),
        ([sign(IDLE, 9, 99), (Sign(WORKS, 4, 9, progress.WRITES), 100)], []),  # a session is saved
    ],
)
def test_who_hangs_is_who_the_others_wait_for(signs: list[tuple[Sign, float]], found: list[int]) -> None:
    assert hanging(dict(enumerate(signs))) == found


def test_signs_say_what_a_rank_is_at() -> None:
    own = Progress()
    with own.working(progress.allowed(1000)):
        own.meet()
        with own.waiting():
            assert Sign.read(own.sign().packed()) == Sign(WAITS, 3, 1, progress.STANDS + 20)
        own.step()
        assert own.sign()[:3] == (WORKS, 5, 1)
    assert own.sign().state == IDLE and own.sign().count == 6
    with pytest.raises(ValueError, match="no rank"):
        Sign.read(b"x")


def test_rank_0_tells_all_who_hangs_the_one_that_does_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "EVERY", 0.02)
    group, ends = Ranks(3), [pair(), pair()]
    group.names = ["rank 0", "rank 1 (mini, process 7)", "rank 2"]
    for rank, (near, _) in enumerate(ends, start=1):
        group.admit(rank, near)
    standing = [Sign(WORKS, 12, met, 0.2).packed() for met in (3, 4)]
    until = time.monotonic() + 20
    while group.lost is None and time.monotonic() < until:
        for (_, far), said in zip(ends, standing, strict=True):
            far.send(wire.PING, said)
        time.sleep(0.02)
    assert group.lost.startswith("rank 1 (mini, process 7) hangs: it lives")
    for _, far in ends:
        assert far.receive(20) == (wire.FAILED, group.lost.encode())
    group.close()


def hang(folder: Path, ranks: int, plan: str, victim: int, call: int, seconds: float) -> float:
    """Seconds from the time that a rank hangs until all have ended, who name it."""
    command = [sys.executable, "-m", "tests.parallel.hanging", *map(str, (ranks, plan, victim, call, seconds))]
    errors = folder / "errors"
    with open(errors, "w") as written:
        rank_0 = subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=written, text=True)
    try:
        until = time.monotonic() + 120
        while "hangs\n" not in errors.read_text() and time.monotonic() < until and rank_0.poll() is None:
            time.sleep(0.05)
        since = time.monotonic()
        assert rank_0.wait(MOST) == 70, errors.read_text()
        others = [int(line.split()[2]) for line in rank_0.stdout if line.startswith("rank")]
        while any(map(lives, others)):
            assert time.monotonic() - since < MOST
            time.sleep(0.05)
    finally:
        rank_0.kill()
        rank_0.wait()
    told = errors.read_text()
    assert told.count(f"error: rank {victim} (") >= ranks - 1 and "hangs: it lives, and has done nothing" in told, told
    return time.monotonic() - since


def test_a_rank_that_hangs_and_lives_ends_all_and_is_named(tmp_path: Path) -> None:
    hang(tmp_path, 2, "experts", 1, 30, 2.0)


@pytest.mark.soak
@pytest.mark.parametrize(
    ("count", "plan", "victim", "call"),
    [(2, "experts", 1, 30), (2, "experts", 0, 30), (3, "pipeline", 1, 2), (3, "pipeline", 0, 20), (3, "experts", 2, 1),
     (2, "tensor", 1, 25), (2, "tensor", 0, 3)],
)  # fmt: skip
def test_whichever_hangs_all_end_within_the_bound(
    tmp_path: Path, count: int, plan: str, victim: int, call: int
) -> None:
    assert hang(tmp_path, count, plan, victim, call, progress.STANDS) < MOST
