"""Shares of a store's paths that are written later: whole, in their room, and read as they were."""

import os
import threading
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_qwen35.cache import Cache, DeltaState, KVCache
from mlx_qwen35.errors import SessionError
from mlx_qwen35.parallel import kept, later
from mlx_qwen35.parallel.later import Job, Later

BIG = 1 << 30


def a_cache(seed: int, length: int = 7) -> Cache:
    mx.random.seed(seed)
    delta, keys = DeltaState(), KVCache()
    delta.update(mx.random.normal((1, 3, 10)), mx.random.normal((1, 2, 4, 6)))
    keys.keys, keys.values, keys.offset = mx.random.normal((1, 2, 16, 8)), mx.random.normal((1, 2, 16, 8)), length
    cache = Cache([delta, keys])
    cache.offset = length
    return cache


def empty() -> Cache:
    return Cache([DeltaState(), KVCache()])


def job(folder: Path, name: str, seed: int = 0, *, replaced: str | None = None, most_bytes: int = BIG) -> Job:
    cache = a_cache(seed)
    share = kept.packed([(cache, cache.snapshot())])
    return Job(folder / f"{name}.path", name, share, replaced and folder / f"{replaced}.path", most_bytes)


def shares(folder: Path) -> list[str]:
    return sorted(path.name.partition(".")[0] for path in folder.iterdir())


def test_a_share_is_what_was_given_whatever_the_cache_does_meanwhile(tmp_path: Path) -> None:
    writer, cache, folder = Later(1, 3), a_cache(3), tmp_path / "new"
    before = mx.array(cache.layers[1].keys[..., :7, :]), mx.array(cache.layers[0].state[1])
    mx.eval(before)
    path = folder / "a.path"
    writer.put(Job(path, "n", kept.packed([(cache, cache.snapshot()), None]), None, BIG))
    cache.layers[1].keys[..., :7, :] = 0
    writer.wait()
    made = kept.path_of(path, 1, 3, "n")
    assert made.name == "a.path.rank1of3-n"
    (found, snapshot), nothing = kept.read(made, "n", empty)
    assert nothing is None and snapshot.offset == 7
    assert mx.array_equal(found.layers[1].keys[..., :7, :], before[0])
    assert mx.array_equal(snapshot.delta[0][1], before[1])
    with pytest.raises(SessionError, match="of another session"):
        kept.read(made, "m", empty)


def test_what_says_less_goes_and_so_does_what_was_used_longest_ago(tmp_path: Path) -> None:
    writer, other = Later(1, 2), tmp_path / "x.path.rank2of3-x"
    other.write_bytes(bytes(100))  # not its own
    (tmp_path / "mine.path").write_bytes(bytes(100))
    for number, name in enumerate("abc"):
        writer.put(job(tmp_path, name, number))
        writer.wait()
        os.utime(kept.path_of(tmp_path / f"{name}.path", 1, 2, name), (1000 + number, 1000 + number))
    writer.put(job(tmp_path, "d", replaced="b"))
    writer.wait()
    assert shares(tmp_path) == ["a", "c", "d", "mine", "x"]
    size = kept.path_of(tmp_path / "a.path", 1, 2, "a").stat().st_size
    writer.put(job(tmp_path, "e", most_bytes=int(2.2 * size)))
    writer.wait()
    assert shares(tmp_path) == ["d", "e", "mine", "x"]


def test_what_went_wrong_is_said_with_the_next_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    writer = Later(1, 2)
    with monkeypatch.context() as patched:
        patched.setattr(later.kept, "put", full)
        writer.put(job(tmp_path, "a"))
        writer.wait()
    with pytest.raises(OSError, match="No space left"):
        writer.put(job(tmp_path, "b"))
    writer.put(job(tmp_path, "c"))
    writer.wait()
    assert shares(tmp_path) == ["c"]
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match="file"):
        writer.put(job(tmp_path / "file" / "folder", "d"))


def test_whatever_goes_wrong_ends_neither_the_thread_nor_who_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ValueError("no such dtype")

    writer = Later(1, 2)
    with monkeypatch.context() as patched:
        patched.setattr(later.kept, "put", broken)
        writer.put(job(tmp_path, "a"))
        waiting = threading.Thread(target=writer.wait, daemon=True)
        waiting.start()
        waiting.join(20)
    assert not waiting.is_alive()
    with pytest.raises(OSError, match="ValueError: no such dtype"):
        writer.put(job(tmp_path, "b"))
    writer.put(job(tmp_path, "c"))
    writer.wait()
    assert shares(tmp_path) == ["c"]


def test_those_that_wait_are_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written, writer = [], Later(1, 2)
    monkeypatch.setattr(later.threading.Thread, "start", lambda thread: None)
    monkeypatch.setattr(Later, "_write", lambda own, job: written.append(job.name))
    for name in "abcdef":
        writer.put(job(tmp_path, name))
    writer._work()
    assert written == ["c", "d", "e", "f"]
