"""Ranks that are threads of one process: what a group does, without MLX's and without a network."""

import threading
from collections.abc import Callable, Sequence
from queue import Queue
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_qwen35.parallel.group import Group, Traffic
from mlx_qwen35.parallel.progress import Progress


class Threads(Group):
    """One rank's face of a group; `meeting` is what all share."""

    def __init__(self, rank: int, size: int, meeting: "Meeting") -> None:
        self.rank, self.size, self.traffic, self.alike, self._meeting = rank, size, Traffic(), True, meeting
        self.progress = Progress()

    def sum(self, x: mx.array) -> mx.array:
        self.traffic.sums += 1
        self.traffic.nbytes += x.nbytes
        given = self._meeting.exchange(self.rank, np.array(x))
        total = given[0]
        for other in given[1:]:
            total = total + other
        return mx.array(total)


    def send(self, x: mx.array, to: int) -> None:
        self.traffic.sends += 1
        self.traffic.nbytes += x.nbytes
        self._meeting.mail[to].put(np.array(x))

    def receive(self, shape: Sequence[int], dtype: mx.Dtype, source: int) -> mx.array:
        x = mx.array(self._meeting.mail[self.rank].get(timeout=60))
        assert x.shape == tuple(shape) and x.dtype == dtype
        return x


class Meeting:
    """mail: of each rank what was sent to it, which in a pipeline is always by the same one."""

    def __init__(self, size: int) -> None:
        self.mail = [Queue() for _ in range(size)]
        self._given: list[Any] = [None] * size
        self._barrier = threading.Barrier(size, timeout=60)

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self._given[rank] = value
        self._barrier.wait()
        found = list(self._given)
        self._barrier.wait()
        return found


def together(works: Sequence[Callable[[], Any]]) -> list[Any]:
    """What each gives, all at once, each in a thread."""
    found: list[Any] = [None] * len(works)

    def run(number: int) -> None:
        try:
            found[number] = works[number]()
        except BaseException as error:
            found[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for each in found:
        if isinstance(each, BaseException):
            raise each
    return found
