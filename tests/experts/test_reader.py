"""Experts arrive whole where they belong, or an error says why not; and nobody waits for good."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

from mlx_qwen35.errors import ExpertReadError
from mlx_qwen35.experts import handles
from mlx_qwen35.experts.cast import converter
from mlx_qwen35.experts.crew import Crew
from mlx_qwen35.experts.layout import Extent, LayerLayout, Tensor
from mlx_qwen35.experts.reader import Read, Reader, Target

from .interrupts import Interrupt

EXPERTS = 7
TENSORS = (
    Tensor("gate_proj.weight", "U32", (40, 37)), Tensor("gate_proj.scales", "F16", (40, 5)),
    Tensor("up_proj.weight", "U8", (12_289,)), Tensor("down_proj.weight", "BF16", (50, 61)),
)  # fmt: skip
SIZE = sum(tensor.nbytes for tensor in TENSORS)


class Files:
    """Two layers: 0 stacked, in one file with a bit of everything between; 1 with every expert for itself, in two."""

    def __init__(self, folder: Path):
        rng = np.random.RandomState(3)
        self.values = {
            (layer, expert): [rng.bytes(tensor.nbytes) for tensor in TENSORS]
            for layer in range(2) for expert in range(EXPERTS)
        }  # fmt: skip
        blob, first = bytearray(b"h" * 113), []
        for number, tensor in enumerate(TENSORS):
            first.append(Extent(folder / "a", len(blob), tensor.nbytes))
            for expert in range(EXPERTS):
                blob += self.values[0, expert][number]
        (folder / "a").write_bytes(blob)
        steps = tuple(tensor.nbytes for tensor in TENSORS)
        blobs, places = {"b": bytearray(), "c": bytearray(b"h" * 20)}, []
        for expert in range(EXPERTS):
            place = []
            for number in range(len(TENSORS)):
                name = "bc"[(expert + number) % 2]
                data = self.values[1, expert][number]
                place.append(Extent(folder / name, len(blobs[name]), len(data)))
                blobs[name] += data + bytes(10 * expert)
            places.append(tuple(place))
        for name, data in blobs.items():
            (folder / name).write_bytes(data)
        self.layouts = {
            0: LayerLayout(0, EXPERTS, TENSORS, (tuple(first),), steps),
            1: LayerLayout(1, EXPERTS, TENSORS, tuple(places)),
        }  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("experts"))


class Memory:
    """Where one expert goes, filled with what was there before."""

    def __init__(self, convert: str | None = None):
        self.arrays, self.targets = [], []
        for tensor in TENSORS:
            made = converter(tensor.dtype, convert) if convert and tensor.dtype in ("F16", "BF16") else None
            size = tensor.nbytes * (2 if made and convert == "float32" else 1)
            self.arrays.append(np.full(size, 0xA5, np.uint8))
            self.targets.append(Target(memoryview(self.arrays[-1]), made))
        self._convert = convert

    def holds(self, values: list[bytes]) -> bool:
        expected = []
        for tensor, value, target in zip(TENSORS, values, self.targets, strict=True):
            if target.convert is not None:
                out = bytearray(target.view.nbytes)
                converter(tensor.dtype, self._convert)(memoryview(value), memoryview(out))
                value = bytes(out)
            expected.append(value)
        return [array.tobytes() for array in self.arrays] == expected

    @property
    def untouched(self) -> bool:
        return all((array == 0xA5).all() for array in self.arrays)


class Disk:
    """Stands before preadv: lets nobody through while it is shut, takes time, or fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.opened, self.before, self.entered = threading.Event(), lambda: None, threading.Semaphore(0)
        self.opened.set()
        self._whole = os.preadv
        monkeypatch.setattr(handles.os, "preadv", self._preadv)

    def _preadv(self, *args: object) -> int:
        self.entered.release()
        assert self.opened.wait(20)
        self.before()
        return self._whole(*args)

    @contextmanager
    def shut(self) -> Iterator[None]:
        self.opened.clear()
        try:
            yield
        finally:
            self.opened.set()


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def soon(true: Callable[[], bool]) -> None:
    """Wait for what does not take long."""
    for _ in range(4000):
        if true():
            return
        time.sleep(0.005)
    raise AssertionError("it did not happen")


def reader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("expert-reader")]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    gc.collect()
    soon(lambda: not reader_threads())
    yield
    gc.collect()
    soon(lambda: not reader_threads())


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
        reader.reset_stats()
        assert (reader.stats.bytes_read, reader.stats.records, reader.stats.read_seconds) == (0, 0, 0)
        assert reader.stats.mean_depth == 0.0
        reader.submit(0, 2, Memory("float32").targets).wait()
        assert reader.stats.bytes_read == files.layouts[0].read_bytes


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
            reader.reset_stats()
            assert reader.stats.max_depth == 3
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
            for number in range(150):
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
@pytest.mark.parametrize("name", ["_run", "_take", "_do", "_finish", "_end"])
def test_killed_at_every_line(files: Files, name: str) -> None:
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
                memory = Memory()
                reader.submit(1, 3, memory.targets).wait()
                assert memory.holds(files.values[1, 3]), at
                assert not reader._crew.alive()
        finally:
            threading.settrace(None)
    assert len(struck) > 0.7 * len(lines)


def test_interrupted_at_every_point(files: Files) -> None:
    """Ctrl-C while experts are asked for, promoted, waited for and given up: afterwards all is in order."""

    def work(reader: Reader, memories: list[Memory]) -> None:
        reads = [reader.submit(n % 2, n, memory.targets, urgent=False) for n, memory in enumerate(memories)]
        reads[3].promote()
        reads[2].cancel()
        reads[0].wait()
        reader.settle(reads)
        assert reader.stats.records

    with Reader(files.layouts, threads=2, bounce=False) as reader:
        with Interrupt() as points:
            work(reader, [Memory() for _ in range(5)])
        assert points.count > 100
        for at in range(points.count):
            memories = [Memory() for _ in range(5)]
            try:
                with Interrupt(at):
                    work(reader, memories)
            except KeyboardInterrupt:
                pass
            reader.abandon()
            for n, memory in enumerate(memories):
                assert memory.untouched or memory.holds(files.values[n % 2, n]), at
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
