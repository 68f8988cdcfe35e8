"""Work on several threads: all of it done, errors raised when no thread works any more."""

import threading
import time

import pytest

from mlx_qwen35.conversion import pipeline


@pytest.mark.parametrize("count", [1, 2, 5])
def test_all_of_it(count: int) -> None:
    found = {}
    pipeline.run(range(100), lambda n: n * n, found.__setitem__, count)
    assert found == {n: n * n for n in range(100)}
    pipeline.run([], lambda n: n, found.__setitem__, count)


def test_several_at_a_time_and_no_more() -> None:
    together = threading.Barrier(3, timeout=20)
    now, most, lock = 0, 0, threading.Lock()

    def work(n: int) -> None:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        if n < 3:
            together.wait()  # goes on only when three are here
        with lock:
            now -= 1

    pipeline.run(range(30), work, lambda n, none: None, 3)
    assert most == 3


def test_only_so_many_are_taken_ahead() -> None:
    """Memory is that of the pieces that are being worked on."""
    taken, done = 0, 0

    def jobs():
        nonlocal taken
        for n in range(50):
            taken += 1
            assert taken - done <= 2 + 2
            yield n

    def take(n: int, none: None) -> None:
        nonlocal done
        done += 1

    pipeline.run(jobs(), lambda n: None, take, 2)
    assert done == 50


@pytest.mark.parametrize("where", ["work", "take", "jobs"])
def test_nobody_works_when_an_error_is_raised(where: str) -> None:
    """Else a thread would write to a file that is closed by then."""
    working, lock = 0, threading.Lock()

    def jobs():
        for n in range(100):
            if where == "jobs" and n == 10:
                raise KeyboardInterrupt
            yield n

    def work(n: int) -> int:
        nonlocal working
        with lock:
            working += 1
        time.sleep(0.005)
        with lock:
            working -= 1
        if where == "work" and n == 10:
            raise KeyboardInterrupt
        return n

    def take(n: int, result: int) -> None:
        if where == "take" and n == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline.run(jobs(), work, take, 4)
    assert working == 0
