"""Experts arrive whole where they belong, or an error says why not."""

from __future__ import annotations

import mmap
import random
import threading
import time
from pathlib import Path

import pytest

from mlx_qwen35.errors import ExpertReadError
from mlx_qwen35.experts import handles
from mlx_qwen35.experts.cast import converter
from mlx_qwen35.experts.layout import Extent, LayerLayout
from mlx_qwen35.experts.reader import Reader, Target

from .some_experts import EXPERTS, SIZE, TENSORS, Disk, Files, Memory, soon

pytestmark = pytest.mark.usefixtures("no_thread_is_left")


@pytest.mark.parametrize("convert", [None, "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("bounce", [False, True])
@pytest.mark.parametrize("threads, job", [(1, 1 << 30), (1, 1), (3, 5000), (8, 4096), (8, SIZE // 2)])
def test_what_arrives(files: Files, convert: str | None, bounce: bool, threads: int, job: int) -> None:
    with Reader(files.layouts, threads=threads, bounce=bounce, job_bytes=job) as reader:
        asked = []
        for _ in range(2):
            for key in files.values:
                memory = Memory(convert)
                asked.append((key, memory, reader.submit(*key, memory.targets, urgent=bool(key[1] % 2))))
        for key, memory, read in asked:
            read.wait()
            assert read.done and read.good and read.expert == key[1]
            assert memory.holds(files.values[key]), key
        stats = reader.stats
        padding = sum(files.layouts[key[0]].read_bytes - SIZE for key, *_ in asked if key[0] == 0)
        assert stats.records == len(asked) and stats.bytes_read >= SIZE * len(asked) + padding
        assert 1 <= stats.max_depth <= threads and 0 < stats.mean_depth <= threads
        assert 0 < stats.busy_seconds <= stats.read_seconds + 1e-9


@pytest.mark.parametrize("bounce", [False, True])
def test_bytes_are_counted_exactly(files: Files, bounce: bool) -> None:
    with Reader(files.layouts, threads=4, bounce=bounce, job_bytes=6000) as reader:
        for expert in range(EXPERTS):
            reader.submit(0, expert, Memory().targets).wait()
            assert reader.stats.bytes_read == (expert + 1) * files.layouts[0].read_bytes
            assert reader.stats.records == expert + 1
        reader.submit(0, 2, Memory("float32").targets).wait()
        assert reader.stats.bytes_read == (EXPERTS + 1) * files.layouts[0].read_bytes


def test_depth_is_how_many_read_at_once(files: Files, disk: Disk) -> None:
    with Reader(files.layouts, threads=3, bounce=False) as reader:
        with disk.shut():
            reads = [reader.submit(0, expert, Memory().targets) for expert in range(5)]
            for _ in range(3):
                assert disk.entered.acquire(timeout=20)
            running = reader.stats
            assert running.max_depth == 3 and running.records == 0 and running.bytes_read == 0
            time.sleep(0.05)
            later = reader.stats  # what is under way counts, too
            assert later.read_seconds - running.read_seconds >= 3 * 0.05
            assert later.busy_seconds - running.busy_seconds >= 0.05
        reader.settle(reads)
        assert reader.stats.records == 5 and 1 < reader.stats.mean_depth <= 3


def test_many_ask_at_once(files: Files) -> None:
    """Threads that submit, promote, cancel and wait all the time."""
    wrong: list[object] = []
    with Reader(files.layouts, threads=4, bounce=False, job_bytes=5000) as reader:

        def ask(seed: int) -> None:
            rng = random.Random(seed)
            for _ in range(60):
                asked = []
                for _ in range(rng.randrange(1, 6)):
                    key, memory = (rng.randrange(2), rng.randrange(EXPERTS)), Memory()
                    asked.append((key, memory, reader.submit(*key, memory.targets, urgent=rng.random() < 0.5)))
                for key, memory, read in asked:
                    what = rng.randrange(4)
                    if what == 0 and read.cancel():
                        if not memory.untouched or read.good or not read.done:
                            wrong.append(("cancelled", key))
                        continue
                    if what == 1:
                        read.promote()
                        read.promote()
                    read.wait()
                    if not memory.holds(files.values[key]):
                        wrong.append(key)

        workers = [threading.Thread(target=ask, args=(seed,)) for seed in range(6)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(60)
            assert not worker.is_alive()
        soon(lambda: not reader._crew.alive())
    assert not wrong


@pytest.mark.parametrize("cores", [1, 2, 8])
@pytest.mark.parametrize("in_memory", [False, True])
def test_who_copies_and_who_waits_for_the_disk(
    files: Files, disk: Disk, monkeypatch: pytest.MonkeyPatch, cores: int, in_memory: bool
) -> None:
    """What is in memory is copied by as many as there are processors, what is not is waited for by all there are."""
    monkeypatch.setattr("mlx_qwen35.experts.crew.processors", lambda: cores)
    if in_memory:
        monkeypatch.setattr(handles, "_AT_HAND", 8)  # a Mac has no such call
        monkeypatch.setattr(handles.os, "preadv", lambda *args: disk._preadv(*args[:3]))
    with Reader(files.layouts, threads=5, bounce=False) as reader:
        assert reader.stats.mean_depth == 0.0
        with disk.shut():
            reads, memories = [], [Memory() for _ in range(7)]
            expected = min(cores, 5) if in_memory else 5
            for n, memory in enumerate(memories):
                reads.append(reader.submit(0, n, memory.targets))
                assert n >= expected or disk.entered.acquire(timeout=20)
            assert not disk.entered.acquire(timeout=0.05)
            assert reader.stats.max_depth == expected
        reader.wait(reads)
        assert all(memory.holds(files.values[0, n]) for n, memory in enumerate(memories))


def test_who_waits_reads_what_no_thread_was_called_for(files: Files, disk: Disk) -> None:
    """What is small; and who has to wait for the disk calls the others."""
    with Reader(files.layouts, threads=2, bounce=False) as reader:
        memories = [Memory() for _ in range(3)]
        with disk.shut():
            reads = [reader.submit(0, n, memory.targets, helped=True) for n, memory in enumerate(memories)]
            assert not disk.entered.acquire(timeout=0.05)
            helper = threading.Thread(target=reader.help)
            helper.start()
            for _ in reads:
                assert disk.entered.acquire(timeout=20)
        helper.join(20)
        reader.wait(reads)
        assert all(memory.holds(files.values[0, n]) for n, memory in enumerate(memories))
        assert reader.stats.records == 3 and not reader._crew._helping


def test_what_fails_for_who_helps_is_the_reads(files: Files, disk: Disk) -> None:
    with Reader(files.layouts, threads=1, bounce=False) as reader:
        disk.before = lambda: 1 / 0
        reads = [reader.submit(0, n, Memory().targets, helped=True) for n in range(2)]
        reader.help()
        assert all(read.done for read in reads)
        with pytest.raises(ExpertReadError, match="layer 0, expert 0: ZeroDivisionError"):
            reader.wait(reads)


def test_waiting_for_several_raises_what_the_first_failed_with(files: Files, disk: Disk) -> None:
    with Reader(files.layouts, threads=1, bounce=False) as reader:
        with disk.shut():
            memories = [Memory() for _ in range(4)]
            reads = [reader.submit(0, n, memory.targets) for n, memory in enumerate(memories)]
            assert disk.entered.acquire(timeout=20)
            assert reads[2].cancel() and reads[1].cancel()
        with pytest.raises(ExpertReadError, match="layer 0, expert 1: was cancelled"):
            reader.wait(reads)
        assert all(read.done for read in reads) and memories[3].holds(files.values[0, 3])
        reader.wait([])


def test_urgent_reads_come_first(files: Files, disk: Disk) -> None:
    with Reader(files.layouts, threads=1, bounce=False) as reader:
        order: list[int] = []

        with disk.shut():
            first = reader.submit(0, 0, Memory().targets)
            assert disk.entered.acquire(timeout=20)
            later = [reader.submit(0, expert, Memory().targets, urgent=False) for expert in (1, 2, 3)]
            urgent = [reader.submit(0, expert, Memory().targets) for expert in (4, 5)]
            later[2].promote()
            later[2].promote()
            waiting = [first, *later, *urgent]
            watchers = [
                threading.Thread(target=lambda r=read: (r.settle(), order.append(r.expert))) for read in waiting
            ]
            for watcher in watchers:
                watcher.start()

            def paced() -> None:  # so that whoever waits for one is there before the next is read
                time.sleep(0.05)

            disk.before = paced
        for watcher in watchers:
            watcher.join(20)
        assert order == [0, 4, 5, 3, 1, 2]
        assert reader.stats.records == 6


def test_cancelling(files: Files, disk: Disk) -> None:
    with Reader(files.layouts, threads=1, bounce=False) as reader:
        with disk.shut():
            memories = [Memory() for _ in range(3)]
            reads = [reader.submit(0, n, memory.targets) for n, memory in enumerate(memories)]
            assert disk.entered.acquire(timeout=20)
            assert not reads[0].cancel() and not reads[0].done  # it has begun
            assert reads[1].cancel() and reads[1].cancel() and reads[1].done and not reads[1].good
            reads[1].promote()
            with pytest.raises(ExpertReadError, match="layer 0, expert 1: was cancelled"):
                reads[1].wait()
            reads[1].settle()
        reads[0].wait()
        reads[2].wait()
        assert not reads[2].cancel() and reads[2].good
        assert memories[1].untouched and memories[2].holds(files.values[0, 2])
        assert reader.stats.records == 2


def test_an_expert_of_several_jobs_that_fails_once_fails(files: Files, disk: Disk) -> None:
    """And no thread is still at it when it is said to have ended."""
    count = [0]

    def second_fails() -> None:
        count[0] += 1
        if count[0] == 2:
            raise OSError(5, "Input/output error")
        time.sleep(0.02)

    with Reader(files.layouts, threads=4, bounce=False, job_bytes=4096) as reader:
        disk.before = second_fails
        memory = Memory()
        read = reader.submit(1, 3, memory.targets)
        for _ in range(2):
            with pytest.raises(ExpertReadError, match="layer 1, expert 3: .*cannot be read .Input.*ask again") as e:
                read.wait()
            assert isinstance(e.value.__cause__, OSError)
        assert not read.good and reader.stats.records == 0
        for array in memory.arrays:
            array[:] = 0xA5
        time.sleep(0.05)
        assert memory.untouched
        memory = Memory()
        reader.submit(1, 3, memory.targets).wait()
        assert memory.holds(files.values[1, 3])


def test_a_failed_read_keeps_no_memory(files: Files, disk: Disk) -> None:
    def fail() -> None:
        raise OSError(5, "Input/output error")

    for error in (fail, lambda: 1 / 0):
        with Reader(files.layouts, threads=2, bounce=False) as reader:
            disk.before = error
            space = [mmap.mmap(-1, tensor.nbytes) for tensor in TENSORS]
            read = reader.submit(0, 1, [Target(memoryview(part)) for part in space])
            with pytest.raises(ExpertReadError) as kept:
                read.wait()
            assert kept.value.__cause__ is not None
            soon(lambda space=space: all(closes(part) for part in space))


def closes(part: mmap.mmap) -> bool:
    try:
        part.close()
    except BufferError:
        return False
    return True


def test_wrong_questions(files: Files) -> None:
    with pytest.raises(ValueError, match="threads is 0"):
        Reader(files.layouts, threads=0)
    gone = LayerLayout(2, 1, TENSORS[:1], ((Extent(Path("none"), 0, TENSORS[0].nbytes),),))
    with pytest.raises(ExpertReadError, match="none cannot be opened"):
        Reader(files.layouts | {2: gone})
    with Reader(files.layouts, threads=1) as reader:
        targets = Memory().targets
        with pytest.raises(ValueError, match="3 targets for 4 tensors"):
            reader.submit(0, 1, targets[:3])
        with pytest.raises(ValueError, match="up_proj.weight has 12289 bytes, its target 6100"):
            reader.submit(0, 1, [targets[0], targets[1], targets[3], targets[3]])
        with pytest.raises(IndexError, match="experts 0 to 6, not 7"):
            reader.submit(0, 7, targets)
        with pytest.raises(KeyError):
            reader.submit(5, 0, targets)
        small = Target(memoryview(bytearray(2 * TENSORS[3].nbytes + 4)), converter("BF16", "float32"))
        read = reader.submit(0, 1, [*targets[:3], small])
        with pytest.raises(ExpertReadError, match="layer 0, expert 1: ValueError .*do not fill"):
            read.wait()
        memory = Memory()
        reader.submit(0, 1, memory.targets).wait()
        assert memory.holds(files.values[0, 1])
