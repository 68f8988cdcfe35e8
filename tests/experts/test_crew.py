"""Nobody waits for good, and no memory is written to that was taken for free: closed, killed, interrupted, forked."""

from __future__ import annotations

import ctypes
import gc
import os
import random
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from mlx_qwen35.errors import ExpertReadError
from mlx_qwen35.experts.crew import _FAILED, Crew
from mlx_qwen35.experts.handles import Handle
from mlx_qwen35.experts.layout import Extent, LayerLayout, Tensor
from mlx_qwen35.experts.reader import Read, Reader, Target

from .interrupts import Interrupt
from .some_experts import EXPERTS, Disk, Files, Memory, reader_threads, soon

pytestmark = pytest.mark.usefixtures("no_thread_is_left")


def test_settling(files: Files, disk: Disk) -> None:
    with Reader(files.layouts, threads=2, bounce=False) as reader:
        with disk.shut():
            reads = [reader.submit(0, n, Memory().targets) for n in range(6)]
            reads[4].cancel()
            ended = threading.Event()
            waiter = threading.Thread(target=lambda: (reader.settle(), ended.set()))
            waiter.start()
            time.sleep(0.02)
            assert not ended.is_set()
        waiter.join(20)
        assert ended.is_set() and all(read.done for read in reads)
        assert [read.good for read in reads] == [True, True, True, True, False, True]
        disk.before = lambda: 1 / 0
        reader.settle([reader.submit(0, 1, Memory().targets)])  # raises nothing


def test_abandoning(files: Files, disk: Disk) -> None:
    """What nobody kept is cancelled, or has ended when abandon() returns."""
    with Reader(files.layouts, threads=2, bounce=False, job_bytes=5000) as reader:
        with disk.shut():
            memories = [Memory() for _ in range(5)]
            for n, memory in enumerate(memories):
                reader.submit(0, n, memory.targets)
            for _ in range(2):
                assert disk.entered.acquire(timeout=20)
            threading.Timer(0.05, disk.opened.set).start()
            reader.abandon()
            done = [memory.holds(files.values[0, n]) for n, memory in enumerate(memories)]
            assert done == [not memory.untouched for memory in memories] and not all(done) and any(done)
        assert not reader._crew.alive()


def test_closing_while_reads_wait(files: Files, disk: Disk) -> None:
    reader = Reader(files.layouts, threads=2, bounce=False)
    with disk.shut():
        memories = [Memory() for _ in range(6)]
        reads = [reader.submit(0, n, memory.targets, urgent=n < 4) for n, memory in enumerate(memories)]
        for _ in range(2):
            assert disk.entered.acquire(timeout=20)
        found: list[str] = []

        def wait(read: Read) -> None:
            try:
                read.wait()
                found.append("good")
            except ExpertReadError as error:
                found.append(str(error))

        waiters = [threading.Thread(target=wait, args=(read,)) for read in reads]
        for waiter in waiters:
            waiter.start()
        threading.Timer(0.05, disk.opened.set).start()
        reader.close()
    for waiter in waiters:
        waiter.join(20)
        assert not waiter.is_alive()
    closed = [text for text in found if text != "good"]
    assert len(found) == 6 and len(closed) == 4
    assert all("its reader was closed. Load the model again" in text for text in closed)
    for read, memory, n in zip(reads, memories, range(6), strict=True):
        assert memory.holds(files.values[0, n]) if read.good else memory.untouched
    for _ in range(2):
        reader.close()
        with pytest.raises(ExpertReadError, match="layer 1, expert 2: its reader was closed"):
            reader.submit(1, 2, Memory().targets)
    assert all(handle._number == -1 for handle in reader._crew._handles.values())


def test_what_is_forgotten_closes_itself(files: Files) -> None:
    reader = Reader(files.layouts, threads=3, bounce=False)
    crew = reader._crew
    reader.submit(0, 1, Memory().targets).wait()
    del reader
    gc.collect()
    soon(lambda: not reader_threads())
    soon(lambda: all(handle._number == -1 for handle in crew._handles.values()))


def kill(thread: threading.Thread) -> None:
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_threads_that_are_killed(files: Files) -> None:
    """Whenever they are: what they were at is right or an error, and what comes later is right."""
    rng, wrong, failed = random.Random(0), 0, 0
    stop = threading.Event()

    def killer() -> None:
        while not stop.is_set():
            threads = reader_threads()
            if threads:
                kill(rng.choice(threads))
            time.sleep(rng.random() * 0.002)

    with Reader(files.layouts, threads=4, bounce=False, job_bytes=5000) as reader:
        attack = threading.Thread(target=killer)
        attack.start()
        try:
            for number in range(20_000):
                if number >= 150 and failed:
                    break
                key, memory = (number % 2, number % EXPERTS), Memory()
                read = reader.submit(*key, memory.targets)
                try:
                    read.wait()
                    wrong += not memory.holds(files.values[key])
                except ExpertReadError as error:
                    assert "ask again" in str(error)
                    failed += 1
        finally:
            stop.set()
            attack.join()
        assert wrong == 0 and failed > 0
        for number in range(20):
            memory = Memory()
            reader.submit(0, number % EXPERTS, memory.targets).wait()
            assert memory.holds(files.values[0, number % EXPERTS])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("name", ["_run", "_take", "_do", "_finish", "_end", "_call", "_wait_for_disk"])
def test_killed_at_every_line(files: Files, disk: Disk, name: str) -> None:
    """An exception before each line of what a thread does: no read is lost, and none that is wrong counts."""
    code = getattr(Crew, name).__code__
    lines = sorted({line for _, _, line in code.co_lines() if line is not None} - {code.co_firstlineno})
    struck = []
    for at in lines:

        def line(frame: FrameType, event: str, value: Any, at: int = at) -> Any:
            if event == "line" and frame.f_lineno == at and at not in struck:
                struck.append(at)
                raise SystemExit
            return line

        threading.settrace(lambda frame, event, value, line=line: line if frame.f_code is code else None)
        try:
            with Reader(files.layouts, threads=2, bounce=False, job_bytes=9000) as reader:
                memories = [Memory() for _ in range(4)]
                reads = [reader.submit(0, n, memory.targets) for n, memory in enumerate(memories)]
                for n, (memory, read) in enumerate(zip(memories, reads, strict=True)):
                    read.settle()
                    assert not read.good or memory.holds(files.values[0, n]), at
                last = [reader.submit(1, 3, memory.targets) for memory in memories[:2]]
                reader.settle(last)  # one of them may be the first to come to that line
                assert any(read.good for read in last), at
                for memory, read in zip(memories[:2], last, strict=True):
                    assert not read.good or memory.holds(files.values[1, 3]), at
                assert not reader._crew.alive()
        finally:
            threading.settrace(None)
    assert len(struck) > 0.7 * len(lines)


@pytest.mark.parametrize("helped", [False, True])
def test_interrupted_at_every_point(files: Files, helped: bool) -> None:
    """Ctrl-C while experts are asked for, promoted, waited for, read by who waits and given up: afterwards all is in
    order."""

    def work(reader: Reader, memories: list[Memory]) -> None:
        how = {"urgent": helped, "helped": helped}
        reads = [reader.submit(n % 2, n, memory.targets, **how) for n, memory in enumerate(memories)]
        asked[:] = reads
        if helped:
            reader.help()
            assert all(read.done for read in reads)
        reads[3].promote()
        reads[2].cancel()
        reads[0].wait()
        reader.settle(reads)
        assert reader.stats.records

    asked: list[Read] = []
    with Reader(files.layouts, threads=2, bounce=False) as reader:
        with Interrupt() as points:
            work(reader, [Memory() for _ in range(5)])
        assert points.count > 100
        for at in range(points.count):
            memories = [Memory() for _ in range(5)]
            asked.clear()
            try:
                with Interrupt(at):
                    work(reader, memories)
            except KeyboardInterrupt:
                pass
            reader.abandon()
            broken = {read.expert for read in asked if read.state == _FAILED}  # interrupted while it was read here
            assert len(broken) <= helped and all(read.done for read in asked)
            for n, memory in enumerate(memories):
                assert memory.untouched or memory.holds(files.values[n % 2, n]) or n in broken, at
                for array in memory.arrays:
                    array[:] = 0xA5
            memory = Memory()
            reader.submit(1, at % EXPERTS, memory.targets).wait()
            assert memory.holds(files.values[1, at % EXPERTS])
            assert all(memory.untouched for memory in memories)
        assert not reader._crew.alive() and not reader._crew._at and len(reader_threads()) == 2


def test_a_fork_says_what_it_cannot_do(files: Files) -> None:
    """And its end takes nothing from the process that it was forked from."""
    with Reader(files.layouts, threads=2, bounce=False) as reader:
        for _ in range(3):
            child = os.fork()
            if not child:
                status = 1
                try:
                    reader.submit(0, 1, Memory().targets)
                except ExpertReadError as error:
                    status = 0 if "fork" in str(error) else 2
                finally:
                    os._exit(status)
            assert os.waitpid(child, 0)[1] == 0
            memory = Memory()
            reader.submit(0, 1, memory.targets).wait()
            assert memory.holds(files.values[0, 1])


def test_other_threads_go_on_while_experts_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's lock is let go of: with a switch interval of minutes nobody else would run otherwise."""
    size, path = 8 << 20, tmp_path / "experts"
    path.write_bytes(os.urandom(size))
    layout = LayerLayout(0, 1, (Tensor("gate_proj.weight", "U8", (size,)),), ((Extent(path, 0, size),),), (size,))
    turns, seen, read, check = [0], [], Handle.read, Handle.check
    stop = threading.Event()

    def take_turns() -> None:
        while not stop.is_set():
            turns[0] += 1
            time.sleep(0)

    def noted_read(self: Handle, *args: Any) -> int:
        count = read(self, *args)
        seen.append(turns[0])  # from here to the check nothing but a copy
        return count

    def noted_check(self: Handle) -> None:
        seen.append(turns[0])
        check(self)

    monkeypatch.setattr(Handle, "read", noted_read)
    monkeypatch.setattr(Handle, "check", noted_check)
    out = bytearray(size)
    other, interval = threading.Thread(target=take_turns), sys.getswitchinterval()
    with Reader({0: layout}, threads=1, bounce=True, job_bytes=size) as reader:
        sys.setswitchinterval(100)
        try:
            other.start()
            for _ in range(50):
                reader.submit(0, 0, [Target(memoryview(out))]).wait()
        finally:
            stop.set()
            sys.setswitchinterval(interval)
        other.join(20)
    assert bytes(out) == path.read_bytes() and len(seen) == 100
    assert any(after > before for before, after in zip(seen[::2], seen[1::2], strict=True))
