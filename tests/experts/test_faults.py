"""Whatever happens to the disk, the threads or the user's patience: an error or the right bits, and then it goes on.

The resident model says what is right. A turn that failed leaves the cache where it was (as generation does it), and the
same model and the same cache then go on.
"""

from __future__ import annotations

import ctypes
import errno
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35.cache import Cache
from mlx_qwen35.checkpoint.load import load_model
from mlx_qwen35.conversion.convert import convert
from mlx_qwen35.errors import CheckpointError, ExpertReadError
from mlx_qwen35.experts import handles
from mlx_qwen35.experts.budget import StreamPlan
from mlx_qwen35.generation import prefill
from mlx_qwen35.model import Model

from ..checkpoints import random_tensors, tiny_config, write_checkpoint
from .interrupts import Interrupt
from .test_handles import no_root

pytestmark = pytest.mark.usefixtures("guesses_always")

LAYERS, CHOSEN = 4, 3
PLAN = StreamPlan(slots=(4,) * LAYERS, group=2, chunk=32, tile=16, cache_limit=1 << 24, memory=1 << 30)
PROMPT = np.random.RandomState(1).randint(0, 80, 80).tolist()
ANSWER = np.random.RandomState(2).randint(0, 80, 100).tolist()
CHUNK = 32


class Case:
    """One random model: its folder, and what is right."""

    def __init__(self, folder: Path):
        config = tiny_config(
            "moe", num_experts=10, num_experts_per_tok=CHOSEN, moe_intermediate_size=32, hidden_size=64,
            shared_expert_intermediate_size=32, num_hidden_layers=LAYERS,
        )  # fmt: skip
        source = write_checkpoint(folder / "source", config, random_tensors(config))
        self.folder = convert(source, folder / "four", bits=4, group_size=32)
        resident = load_model(self.folder)
        cache = resident.make_cache()
        self.loaded: list[Model] = []
        # In the tiles and chunks of the streamed one, so that every sum is the same.
        tiled = load_model(self.folder, stream=replace(PLAN, slots=(9,) * LAYERS))
        self.prompt = np.array(prefill(tiled, PROMPT, cache))
        other = resident.make_cache()
        np.testing.assert_allclose(self.prompt, np.array(prefill(resident, PROMPT, other)), atol=1e-3)
        tiled.unload()
        self.answer = [step(resident, cache, token) for token in ANSWER]

    def load(self, folder: Path | None = None, **changes: Any) -> Model:
        self.loaded.append(load_model(folder or self.folder, stream=replace(PLAN, **changes)))
        return self.loaded[-1]


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("faults"))


@pytest.fixture(autouse=True)
def unloaded(right: Case) -> Iterator[None]:
    yield
    while right.loaded:
        right.loaded.pop().unload()


@pytest.fixture
def copied(right: Case, tmp_path: Path) -> Path:
    """A checkpoint of its own, to be damaged."""
    return Path(shutil.copytree(right.folder, tmp_path / "copied"))


def step(model: Model, cache: Cache, token: int) -> np.ndarray:
    """The logits of one token; what goes wrong leaves the cache as it was."""
    before = cache.snapshot()
    try:
        logits = model(mx.array([[token]]), cache)
        mx.eval(logits, cache.arrays())
    except BaseException:
        cache.restore(before)
        raise
    return np.array(logits)


def read_prompt(model: Model, cache: Cache) -> np.ndarray:
    """What the cache does not hold of it yet."""
    return np.array(prefill(model, PROMPT[cache.offset :], cache))


class Disk:
    """Stands before preadv and fstat. fault: called with the bytes asked for, before a read, with what reads then."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.fault: Callable[[Callable[[], int], list[memoryview]], int] | None = None
        whole = os.preadv

        def preadv(number: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
            if self.fault is None:
                return whole(number, buffers, offset, flags)
            if flags:  # nothing is in memory already
                raise BlockingIOError
            return self.fault(lambda: whole(number, buffers, offset), buffers)

        monkeypatch.setattr(handles.os, "preadv", preadv)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def attacked(attempt: Callable[[], np.ndarray], *errors: type[BaseException]) -> tuple[np.ndarray, int]:
    """What it gives when it succeeds at last, and how often it failed, always in one of these ways."""
    for failures in range(1000):
        try:
            return attempt(), failures
        except errors:
            continue
    raise AssertionError("it never succeeds")


def failing(number: int) -> Callable[..., int]:
    def fault(read: Callable[[], int], buffers: list[memoryview]) -> int:
        raise OSError(number, os.strerror(number))

    return fault


def scribbled(read: Callable[[], int], buffers: list[memoryview]) -> int:
    """Fails, but not before it has written what is wrong into memory."""
    read()
    for buffer in buffers:
        buffer[:] = bytes(buffer.nbytes)
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def sometimes(rng: random.Random, part: float, fault: Callable[..., int]) -> Callable[..., int]:
    return lambda read, buffers: fault(read, buffers) if rng.random() < part else read()


def nothing(read: Callable[[], int], buffers: list[memoryview]) -> int:
    return 0


FAULTS = {"EIO": failing(errno.EIO), "end of file": nothing, "scribbled": scribbled}


@pytest.mark.parametrize(
    "name, slots",
    [("EIO", CHOSEN), ("end of file", 7), ("scribbled", CHOSEN), pytest.param("scribbled", 7, marks=pytest.mark.soak)],
)
def test_reads_that_fail_now_and_then(right: Case, disk: Disk, name: str, slots: int) -> None:
    """While a prompt is read and while an answer is decoded; every token is tried until it succeeds."""
    model, rng = right.load(slots=(slots,) * LAYERS), random.Random(name)
    cache, failures = model.make_cache(), 0
    disk.fault = sometimes(rng, 0.002, FAULTS[name])
    logits, failures = attacked(lambda: read_prompt(model, cache), ExpertReadError)
    np.testing.assert_array_equal(logits, right.prompt)
    disk.fault = sometimes(rng, 0.05, FAULTS[name])
    for token, expected in zip(ANSWER[:30], right.answer, strict=False):
        logits, more = attacked(lambda token=token: step(model, cache, token), ExpertReadError)
        np.testing.assert_array_equal(logits, expected)
        failures += more
    assert failures > 5
    disk.fault = None
    for token, expected in zip(ANSWER[30:40], right.answer[30:], strict=False):
        np.testing.assert_array_equal(step(model, cache, token), expected)
    assert not model._pool.reader._crew.alive()


def test_reads_that_are_short_or_slow_are_right(right: Case, disk: Disk) -> None:
    rng = random.Random(0)

    def fault(read: Callable[[], int], buffers: list[memoryview]) -> int:
        if rng.random() < 0.05:
            time.sleep(0.003)
        return read()

    model = right.load()
    cache = model.make_cache()
    whole, disk.fault = os.preadv, None

    def short(number: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        most = rng.choice([1, 100, 1 << 20])
        return whole(number, [buffers[0][:most], *(buffers[1:] if most >= buffers[0].nbytes else [])], offset, flags)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(handles.os, "preadv", short)
        np.testing.assert_array_equal(read_prompt(model, cache), right.prompt)
        for token, expected in zip(ANSWER[:30], right.answer, strict=False):
            np.testing.assert_array_equal(step(model, cache, token), expected)
    disk.fault = fault
    for token, expected in zip(ANSWER[30:60], right.answer[30:], strict=False):
        np.testing.assert_array_equal(step(model, cache, token), expected)


def weights(folder: Path) -> Path:
    (file,) = folder.glob("*.safetensors")
    return file


def change_experts(file: Path) -> None:
    """Other bytes in place, in the second half of the file."""
    with open(file, "r+b") as opened:
        opened.seek(file.stat().st_size // 2)
        opened.write(os.urandom(file.stat().st_size // 3))


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut": (lambda file: os.truncate(file, 3000), "ends .* bytes too early.*load the model again"),
    "emptied": (lambda file: os.truncate(file, 0), "ends .* bytes too early.*load the model again"),
    "changed": (change_experts, "was changed while it was in use.*Load the model again"),
    "longer": (lambda file: open(file, "ab").write(b"x"), "was changed while it was in use.*Load the model again"),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("bounce", [False, True])
def test_a_file_that_changes_is_not_read_any_more(
    right: Case, copied: Path, monkeypatch: pytest.MonkeyPatch, name: str, bounce: bool
) -> None:
    monkeypatch.setattr("mlx_qwen35.experts.reader.is_mac", lambda: bounce)
    change, message = CHANGES[name]
    model = right.load(copied)
    cache = model.make_cache()
    read_prompt(model, cache)
    for token, expected in zip(ANSWER[:5], right.answer, strict=False):
        np.testing.assert_array_equal(step(model, cache, token), expected)
    change(weights(copied))
    failures = 0
    for token, expected in zip(ANSWER[5:20], right.answer[5:], strict=False):
        try:
            np.testing.assert_array_equal(step(model, cache, token), expected)  # all that it needs is in memory
        except ExpertReadError as error:
            assert str(weights(copied)) in str(error)
            failures += 1
            with pytest.raises(ExpertReadError, match=message):
                step(model, cache, token)
            break
    assert failures
    # The file comes back, and the same cache goes on with the model loaded again.
    done = cache.offset - len(PROMPT)
    model.unload()
    shutil.copy(weights(right.folder), weights(copied))
    model = right.load(copied)
    for token, expected in zip(ANSWER[done : done + 10], right.answer[done:], strict=False):
        np.testing.assert_array_equal(step(model, cache, token), expected)


@pytest.mark.parametrize("what", ["replaced", "deleted", "permission lost"])
def test_a_file_that_is_not_changed_itself_is_read_on(right: Case, copied: Path, what: str) -> None:
    model = right.load(copied)
    cache = model.make_cache()
    np.testing.assert_array_equal(read_prompt(model, cache), right.prompt)
    file = weights(copied)
    if what == "replaced":
        other = file.with_suffix(".part")
        other.write_bytes(os.urandom(file.stat().st_size))
        os.replace(other, file)
    elif what == "deleted":
        file.unlink()
    else:
        file.chmod(0)
    with no_root():
        for token, expected in zip(ANSWER[:20], right.answer, strict=False):
            np.testing.assert_array_equal(step(model, cache, token), expected)


def test_no_permission_at_the_start(right: Case, copied: Path) -> None:
    for folder in (copied, *copied.parents):
        if folder.stat().st_uid == os.getuid() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o011)
    weights(copied).chmod(0)
    with no_root(), pytest.raises(CheckpointError, match="cannot be (read|listed).*[Pp]ermission"):
        right.load(copied)


def kill_readers(rng: random.Random) -> None:
    found = [thread for thread in threading.enumerate() if thread.name.startswith("expert-reader")]
    if found:
        ident = ctypes.c_ulong(rng.choice(found).ident)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, ctypes.py_object(SystemExit))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_threads_are_killed(right: Case) -> None:
    model, rng, stop = right.load(), random.Random(0), threading.Event()
    cache, failures = model.make_cache(), 0

    def attack() -> None:
        while not stop.wait(rng.random() * 0.01):
            kill_readers(rng)

    thread = threading.Thread(target=attack)
    thread.start()
    try:
        logits, failures = attacked(lambda: read_prompt(model, cache), ExpertReadError)
        np.testing.assert_array_equal(logits, right.prompt)
        for token, expected in zip(ANSWER[:60], right.answer, strict=False):
            logits, more = attacked(lambda token=token: step(model, cache, token), ExpertReadError)
            np.testing.assert_array_equal(logits, expected)
            failures += more
    finally:
        stop.set()
        thread.join()
    for token, expected in zip(ANSWER[60:70], right.answer[60:], strict=False):
        np.testing.assert_array_equal(step(model, cache, token), expected)


def interrupted(work: Callable[[], np.ndarray], at: int) -> np.ndarray | None:
    """What it gives; None if it was interrupted before that."""
    try:
        with Interrupt(at):
            return work()
    except KeyboardInterrupt:
        return None


@pytest.mark.parametrize("slots", [CHOSEN, pytest.param(6, marks=pytest.mark.soak)])
def test_ctrl_c_at_points_all_over_decoding(right: Case, slots: int) -> None:
    """A step is interrupted at one point, then made; the next at another."""
    model = right.load(slots=(slots,) * LAYERS)
    cache = model.make_cache()
    read_prompt(model, cache)
    with Interrupt() as points:
        step(model, cache, ANSWER[0])
    assert points.count > 200
    where = sorted(random.Random(slots).sample(range(points.count), 80))
    hit = 0
    for number, at in enumerate(where, 1):
        token = ANSWER[number]
        logits = interrupted(lambda token=token: step(model, cache, token), at)
        hit += logits is None
        logits = step(model, cache, token) if logits is None else logits
        np.testing.assert_array_equal(logits, right.answer[number], err_msg=f"point {at} of {points.count}")
    assert hit > 60
    assert not model._pool.reader._crew.alive()


def test_ctrl_c_at_points_all_over_a_prompt(right: Case) -> None:
    model = right.load()
    with Interrupt() as points:
        read_prompt(model, model.make_cache())
    where = sorted(random.Random(1).sample(range(points.count), 12))
    for at in where:
        cache = model.make_cache()
        if interrupted(lambda cache=cache: read_prompt(model, cache), at) is None:
            assert cache.offset % CHUNK == 0 or cache.offset == len(PROMPT)
        if cache.offset == len(PROMPT):  # interrupted behind the last chunk
            cache = model.make_cache()
        np.testing.assert_array_equal(read_prompt(model, cache), right.prompt, err_msg=f"point {at} of {points.count}")
        np.testing.assert_array_equal(step(model, cache, ANSWER[0]), right.answer[0])


@pytest.fixture
def alarm() -> Iterator[None]:
    """Ctrl-C by the clock."""

    def press(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, press)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def test_ctrl_c_at_moments_all_over(right: Case, disk: Disk, alarm: None) -> None:
    """Real signals, also while the disk is slow and somebody waits for it."""
    rng = random.Random(5)
    disk.fault = lambda read, buffers: (time.sleep(0.001 * (rng.random() < 0.2)), read())[1]
    model = right.load()
    cache, hits = model.make_cache(), 0
    np.testing.assert_array_equal(read_prompt(model, cache), right.prompt)
    start = time.perf_counter()
    step(model, cache, ANSWER[0])
    usual = time.perf_counter() - start
    for number in range(1, 91):
        token, logits = ANSWER[number], None
        try:
            signal.setitimer(signal.ITIMER_REAL, max(1e-5, rng.random() * usual))
            logits = step(model, cache, token)
            signal.setitimer(signal.ITIMER_REAL, 0)
        except KeyboardInterrupt:
            hits += 1
        signal.setitimer(signal.ITIMER_REAL, 0)
        if cache.offset == len(PROMPT) + number:  # interrupted before it was done
            logits = step(model, cache, token)
        if logits is not None:
            np.testing.assert_array_equal(logits, right.answer[number])
    assert hits > 15


def test_errors_of_one_thread_are_not_those_of_another(right: Case, disk: Disk) -> None:
    """Two conversations on one model: one meets a bad disk now and then, and neither gets a wrong bit."""
    model, wrong = right.load(), []
    disk.fault = sometimes(random.Random(3), 0.002, FAULTS["scribbled"])

    def talk() -> None:
        cache = model.make_cache()
        logits, _ = attacked(lambda: read_prompt(model, cache), ExpertReadError)
        if not np.array_equal(logits, right.prompt):
            wrong.append("prompt")
        for token, expected in zip(ANSWER[:30], right.answer, strict=False):
            logits, _ = attacked(lambda token=token: step(model, cache, token), ExpertReadError)
            if not np.array_equal(logits, expected):
                wrong.append(token)

    threads = [threading.Thread(target=talk) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    assert not wrong
