"""Large files of the store are read while others compute."""

import threading
import time
import warnings

import pytest

from mlx_qwen35 import Engine, Session, load, stream_generate
from mlx_qwen35.checkpoint.files import ReadError
from mlx_qwen35.errors import Qwen35Warning
from mlx_qwen35.sampling import Sampling
from mlx_qwen35.session import file, store

KEPT = [number * 7 % 90 for number in range(400)]
PROMPTS = PROMPT, LONGER, OTHER = [*KEPT, 5], [*KEPT, 5, 6], [number * 11 % 90 for number in range(30)]
OPTIONS = {"sampling": Sampling(), "max_tokens": 6}


class Disk:
    """A disk that reads when it is let. fails: from the array of this number on."""

    def __init__(self) -> None:
        self.let, self.fails, self.reads = threading.Event(), None, 0
        self._read = file.read

    def __call__(self, entry):
        assert self.let.wait(60)
        self.reads += 1
        if self.fails is not None and self.reads > self.fails:
            raise ReadError("the disk has failed")
        return self._read(entry)


@pytest.fixture
def disk(monkeypatch):
    disk = Disk()
    monkeypatch.setattr(file, "read", disk)
    monkeypatch.setattr(store, "AT_ONCE", 0)
    yield disk
    disk.let.set()


@pytest.fixture(scope="module")
def demo():
    return load()


@pytest.fixture(scope="module")
def alone(demo) -> list[list[int]]:
    """What PROMPTS say when nobody else is there and nothing was kept."""
    return [[part.token for part in stream_generate(*demo, prompt, **OPTIONS)] for prompt in PROMPTS]


@pytest.fixture
def folder(tmp_path, demo):
    with Engine(*demo, cache_dir=tmp_path) as engine:
        engine.submit(KEPT, **OPTIONS).result(60)
    return tmp_path


def test_others_go_on_while_a_file_is_read(demo, alone, folder, disk):
    with Engine(*demo, cache_dir=folder) as engine:
        waits = [engine.submit(PROMPT, **OPTIONS), engine.submit(LONGER, **OPTIONS)]
        assert list(engine.submit(OTHER, **OPTIONS).result(60).tokens) == alone[2]
        assert not any(answer.done for answer in waits) and not disk.reads
        held = engine.held_bytes
        disk.let.set()
        done = [answer.result(60) for answer in waits]
        assert held > 0 and all(answer.cached_tokens >= len(KEPT) - 1 for answer in done)
        assert engine.computed_tokens < len(OTHER) + 20
    assert [list(answer.tokens) for answer in done] == alone[:2]


def test_a_file_that_fails_in_the_middle_is_computed_again(demo, alone, folder, disk):
    with Engine(*demo, cache_dir=folder) as engine, warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        answer = engine.submit(PROMPT, **OPTIONS)
        disk.fails = 3
        disk.let.set()
        done = answer.result(60)
    assert done.cached_tokens == 0 and list(done.tokens) == alone[0]
    assert disk.reads == 4
    (line,) = [str(each.message) for each in told if each.category is Qwen35Warning]
    assert "the disk has failed" in line and "ignored" in line


@pytest.mark.parametrize("how", ["cancel", "deadline", "session"])
def test_who_leaves_while_a_file_is_read(demo, alone, folder, disk, how):
    """Ends at once, and with the last that wants it the reading ends."""
    session = Session(*demo)
    with Engine(*demo, cache_dir=folder) as engine:
        more = {"deadline": 0.05} if how == "deadline" else {"session": session} if how == "session" else {}
        answer = engine.submit(PROMPT, **OPTIONS, **more)
        if how != "deadline":
            time.sleep(0.05)
            answer.cancel()
        done = answer.result(60)
        assert (done.finish_reason, done.tokens) == ("deadline" if how == "deadline" else "cancelled", ())
        assert not session.in_use and not session.tokens
        kept = engine._worker.loop._store
        until = time.monotonic() + 10
        while kept._readings and time.monotonic() < until:
            time.sleep(0.01)
        assert not kept._readings and kept.pinned_bytes == 0
        disk.let.set()
        assert disk.reads <= 2
        assert list(engine.submit(PROMPT, **OPTIONS).result(60).tokens) == alone[0]


def test_small_files_are_read_at_once(demo, folder, disk, monkeypatch):
    monkeypatch.setattr(store, "AT_ONCE", 1 << 30)
    monkeypatch.setattr(store, "Reading", None)  # none is begun
    disk.let.set()
    with Engine(*demo, cache_dir=folder) as engine:
        assert engine.submit(PROMPT, **OPTIONS).result(60).cached_tokens >= len(KEPT) - 1
