"""Paths on the disk: later processes compute only what is new, and nothing wrong with a folder harms anybody."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35.cache.kv import KVFormat
from mlx_qwen35.conversion.write import SafetensorsFile
from mlx_qwen35.errors import Qwen35Warning
from mlx_qwen35.processor import Prompt
from mlx_qwen35.session import Session, behind
from mlx_qwen35.session.lock import SessionLock
from mlx_qwen35.session.shelf import Shelf
from mlx_qwen35.session.store import Store
from tests.conftest import CHECKOUT
from tests.seeing_model import prompt_of, seeing_model, some_media
from tests.session.rows import Row, answered, fresh, together
from tests.session.test_store import TRUNK, asked
from tests.soak import examples
from tests.tiny_model import some_tokens, tiny_model

MODEL, _ = seeing_model(rms_norm_eps=1e-2)
ANOTHER = """
import sys
from tests.session.rows import together
from tests.session.test_shelf import MODEL, eight
from tests.session.test_store import Store
with_store = Store(MODEL, most_bytes=1 << 30, directory=sys.argv[1])
rows = together(with_store, eight(), 3)
with_store.close()
print(sum(row.computed for row in rows), [row.said for row in rows])
"""
KILLED = """
import sys
from tests.conversion import killed
from mlx_qwen35.machine import files
from mlx_qwen35.conversion import write
from tests.session.test_shelf import MODEL, Store, answered, asked, TRUNK
files.flush = write.flush = lambda handle: None
store = Store(MODEL, most_bytes=1 << 30, directory=sys.argv[1])
row = answered(store, asked(TRUNK[:100]), 30)
store.close()
calls = killed.die_at(int(sys.argv[2]))
answered(store, asked(row.session.tokens, TRUNK[300:400]), 30)
answered(store, asked(TRUNK[500:600]), 30)
store.close()
print(calls())
"""


def eight() -> list[Prompt]:
    return [asked(TRUNK, some_tokens(20 + n, seed=n, vocab=80)) for n in range(8)]


def python(script: str, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-W", "error::UserWarning", "-c", script, *map(str, arguments)]
    return subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=300)


def made(folder: Path, model=MODEL, most_bytes: int = 1 << 30, **options) -> Store:
    return Store(model, most_bytes=most_bytes, directory=folder, **options)


def paths(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.path"), key=lambda path: path.stat().st_mtime_ns)


def test_a_second_process_computes_only_what_is_new(tmp_path):
    store = made(tmp_path)
    rows = together(store, eight(), 3)
    store.close()
    assert sum(row.computed for row in rows) == 1500 + sum(20 + n for n in range(8))
    done = python(ANOTHER, tmp_path)
    assert done.returncode == 0, done.stderr
    computed, said = done.stdout.split(" ", 1)
    assert int(computed) == 8 and said.strip() == str([row.said for row in rows])


@pytest.mark.parametrize("form", [None, KVFormat(8, 32, 70)])
@pytest.mark.parametrize("most_bytes", [0, 1 << 30])
def test_it_comes_back_bit_for_bit(tmp_path, form, most_bytes):
    model, _ = tiny_model(head_dim=32, rope_parameters={"mrope_section": [4, 2, 2]})
    model.kv_form = form
    store = made(tmp_path, model, most_bytes)
    prompt = asked(TRUNK[:300])
    first = answered(store, prompt, 20)
    longer = asked(prompt.tokens, first.said, 1, 2, 3)
    store.close()
    wanted = answered(made(tmp_path / "none", model), prompt, 20)
    wanted = answered(wanted.store, longer, 5)
    again = answered(made(tmp_path, model), longer, 5)
    assert again.computed == wanted.computed == 3 and again.said == wanted.said
    assert (np.array(again.logits) == np.array(wanted.logits)).all()


def test_pictures_come_back(tmp_path):
    picture, film = some_media("image", 8, 8, seed=1), some_media("video", 2, 8, 8, seed=2)

    def shows(*parts):
        tokens, media = prompt_of(*parts)
        return Prompt(tokens, None, False, tuple(media), turns=(0, 5, len(tokens) - 1))

    store = made(tmp_path)
    answered(store, shows(90, picture, 9, film, 9), 3)
    store.close()
    store = made(tmp_path)
    row = answered(store, shows(90, some_media("image", 8, 8, seed=1), 9, film, 9, 4))
    assert row.computed == 5 and [medium.key for _, medium in row.session.shown] == [picture.key, film.key]
    np.testing.assert_allclose(np.array(row.logits), fresh(MODEL, row.prompt), atol=1e-3)
    assert answered(made(tmp_path), shows(90, some_media("image", 8, 8, seed=3), 9, film, 9)).computed > 100


def test_a_longer_self_takes_the_place_of_a_file(tmp_path):
    store = made(tmp_path)
    row = answered(store, asked(TRUNK[:100]), 5)
    store.close()
    (first,) = paths(tmp_path)
    size = first.stat().st_size
    row = answered(store, asked(row.session.tokens, TRUNK[:100]), 5)
    store.close()
    (second,) = paths(tmp_path)
    assert second != first and second.stat().st_size > size
    answered(store, asked(TRUNK[:99], some_tokens(100, seed=5)), 5)  # parts from it
    answered(store, asked(row.session.tokens, 4, 5))  # too little to be written
    store.close()
    assert len(paths(tmp_path)) == 2 and second in paths(tmp_path)
    assert answered(made(tmp_path), asked(TRUNK[:99], 7)).computed == 1


def test_one_that_goes_on_before_it_was_written_is_written_later(tmp_path):
    store = made(tmp_path)
    with SessionLock(tmp_path / "writing"):  # another process writes
        answered(store, asked(TRUNK[700:800]))
        row = answered(store, asked(TRUNK[:100]))
        longer = store.begin(asked(TRUNK[:100], 1))
        assert longer is row.session and len(store._shelf.jobs) == 1
        store.settled(longer)
        assert len(store._shelf.jobs) == 2 and not paths(tmp_path)
    store.close()
    assert len(paths(tmp_path)) == 2


def test_what_is_being_written_stays_as_it_was(tmp_path, monkeypatch):
    """The session goes on, in the same buffers, while a thread writes them."""
    store, going, write = made(tmp_path), threading.Event(), behind.file.write

    def slow(*given):
        assert going.wait(60)
        write(*given)

    monkeypatch.setattr(behind.file, "write", slow)
    row = answered(store, asked(TRUNK[:100]))
    while not store._shelf.jobs[0].begun:
        pass
    before = [np.array(array) for array in row.session.cache.arrays()]
    counted = store.nbytes
    longer = answered(store, asked(TRUNK[:100], TRUNK[200:230]))
    assert longer.session is row.session and store.nbytes > counted
    going.set()
    store.close()
    session = Session(MODEL)
    shelf = Shelf(tmp_path, MODEL, None, 1 << 30)
    assert len(paths(tmp_path)) == 1  # the longer one has taken the place of the first
    filed, point = shelf.best(store._tree.key(next(iter(store._tree))), 1000)
    assert point == 130 and shelf.read(filed, 1 << 30, session)
    for array, kept in zip(session.cache.arrays(), before, strict=True):
        if array.ndim == 4 and array.shape[2] == 130:
            assert (np.array(array)[:, :, :100] == kept[:, :, :100]).all()


def test_what_was_evicted_is_read_again(tmp_path):
    store = made(tmp_path, most_bytes=0)
    row = answered(store, asked(TRUNK[:300]), 10)
    assert len(store) == 0
    store.close()
    assert store.nbytes == 0
    again = answered(store, asked(row.session.tokens, 1))
    assert again.computed == 1
    np.testing.assert_allclose(np.array(again.logits), fresh(MODEL, again.prompt), atol=1e-3)
    own = Session(MODEL)
    assert answered(store, asked(TRUNK[:299], 5), own=own).computed == 1
    np.testing.assert_allclose(own.cache.offset, 300)


def test_what_is_on_its_way_is_worth_more_than_what_lies_there(tmp_path):
    store = made(tmp_path)
    answered(store, asked(TRUNK[:100]))
    store.close()
    store = made(tmp_path)
    leader = Row(store, asked(TRUNK[:1000]))
    assert leader.begin() and leader.session.cache.offset == 100
    leader.step()
    assert store.begin(asked(TRUNK[:500], 1)) is None
    assert store.begin(asked(TRUNK[:150], 1)).cache.offset in (99, 100)


def test_the_folder_has_a_bound_and_keeps_what_was_used_last(tmp_path):
    store = made(tmp_path)
    rows = [answered(store, asked(some_tokens(200, seed=n, vocab=80)), 20) for n in range(3)]
    store.close()
    size = paths(tmp_path)[0].stat().st_size
    for number, path in enumerate(paths(tmp_path)):
        os.utime(path, (number, number))
    store = made(tmp_path, most_disk_bytes=4 * size)
    assert answered(store, asked(rows[0].session.tokens, 1)).computed == 1
    answered(store, asked(some_tokens(200, seed=9, vocab=80)), 20)
    store.close()
    left = paths(tmp_path)
    assert sum(path.stat().st_size for path in left) <= 4 * size and len(left) == 3
    store = made(tmp_path)
    computed = [answered(store, asked(row.session.tokens, 2)).computed for row in rows]
    assert computed[0] == 1 and computed[1] == 221 and computed[2] == 1
    store = made(tmp_path / "small", most_disk_bytes=size // 2)
    answered(store, asked(some_tokens(200, seed=9, vocab=80)), 20)
    store.close()
    assert not paths(tmp_path / "small")


@pytest.fixture
def filled(tmp_path):
    store = made(tmp_path)
    answered(store, asked(TRUNK[:100]), 5)
    store.close()
    return tmp_path


@pytest.mark.parametrize("damage", ["cut", "header", "empty", "tokens", "values"])
def test_a_damaged_file_is_ignored_with_one_line(filled, damage):
    (path,) = paths(filled)
    data = bytearray(path.read_bytes())
    if damage == "cut":
        data = data[:-100]
    elif damage == "header":
        data[20:40] = b"x" * 20
    elif damage == "empty":
        data = b""
    else:
        data[len(data) // 2 if damage == "values" else -33] ^= 1
    path.write_bytes(data)
    with pytest.warns(Qwen35Warning) as said:
        store = made(filled)
        row = answered(store, asked(TRUNK[:100]), 5)
        store.begin(asked(TRUNK[:100], 6))
    assert row.computed == 100 and len(said) == 1 and "ignored" in str(said[0].message)
    assert "\n" not in str(said[0].message)
    store.close()


def test_files_of_other_models_are_left_alone(filled):
    other, _ = seeing_model(seed=5, rms_norm_eps=1e-2)
    packed, _ = seeing_model(rms_norm_eps=1e-2)
    packed.kv_form = KVFormat(8, 32, 0)
    (filled / "notes.txt").write_text("mine")
    for model in (other, packed):
        store = made(filled, model)
        assert not len(store._shelf._tree)
    answered(made(filled, other), asked(TRUNK[:100])).store.close()
    assert len(paths(filled)) == 2 and (filled / "notes.txt").read_text() == "mine"
    foreign = next(path for path in paths(filled) if path.name.startswith(made(filled, other)._shelf._prefix))
    foreign.rename(foreign.with_name(f"{made(filled)._shelf._prefix}-0.path"))
    with pytest.warns(Qwen35Warning, match="other weights"):
        store = made(filled)
    assert answered(store, asked(TRUNK[:100], 1)).computed == 2


def test_files_come_and_go_while_it_runs(filled):
    store = made(filled)
    second = made(filled)
    answered(second, asked(TRUNK[500:700]))
    second.close()
    assert answered(store, asked(TRUNK[500:700], 1)).computed == 1
    for path in paths(filled):
        path.unlink()
    assert answered(store, asked(TRUNK[:100], 1)).computed == 101
    answered(second, asked(TRUNK[900:1000]))
    second.close()
    held = Store(MODEL, most_bytes=0, directory=filled)
    filed, _ = held._on_disk(held._prompts.of(asked(TRUNK[900:1000], 1)), 0)
    for path in paths(filled):
        path.unlink()
    assert not held._shelf.read(filed, 99, Session(MODEL))  # gone between two looks: no line


def test_a_folder_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(Qwen35Warning, match="memory alone") as said:
        store = made(tmp_path / "file")
        row = answered(store, asked(TRUNK[:100]), 5)
        assert answered(store, asked(row.session.tokens, 1)).computed == 1
        store.close()
    assert len(said) == 1


def test_a_full_disk_is_said_once(tmp_path, monkeypatch):
    def full(self, *given):
        raise OSError(28, "No space left on device")

    store = made(tmp_path)
    monkeypatch.setattr("mlx_qwen35.conversion.write.reserve", full)
    with pytest.warns(Qwen35Warning, match="disk is full") as said:
        for n in range(4):
            answered(store, asked(some_tokens(100, seed=n)))
            store.close()
    assert len(said) == 1 and not list(tmp_path.glob("*")) and len(store) == 4


def test_killed_at_any_moment_whole_files_are_left(tmp_path):
    done = python(KILLED, tmp_path / "whole", 1 << 30)
    assert done.returncode == 0, done.stderr
    calls = int(done.stdout)
    assert calls > 8
    for moment in range(0, calls, max(1, calls // examples(9, 2, least=4))):
        folder = tmp_path / str(moment)
        done = python(KILLED, folder, moment)
        assert done.returncode == -9, done.stderr
        store = made(folder)
        assert store._shelf._tree
        assert answered(store, asked(TRUNK[:99], 1)).computed == 1
        store.close()
        answered(store, asked(TRUNK[1000:1200]))
        store.close()
        assert not list(folder.glob(".*.partial")) and not (folder / ".writing.lock").exists()
        for path in paths(folder):
            shelf = Shelf(folder, MODEL, None, 1 << 30)
            assert shelf.read(shelf._names[path.name], 1 << 30, Session(MODEL))


def test_what_a_kill_left_twice_is_deleted(filled):
    store = made(filled)
    row = answered(store, asked(TRUNK[:99], 1, 2, 3), 20)
    monkey = store._shelf.put
    store.close()
    assert monkey and row.computed
    (first,) = paths(filled)[:1]
    longer = Session(MODEL)
    shelf = Shelf(filled, MODEL, None, 1 << 30)
    assert shelf.read(shelf._names[first.name], 1 << 30, longer)
    key = shelf._names[first.name].key
    shelf.put(longer, longer.marks, key, None)  # the same once more
    shelf.close()
    before = len(paths(filled))
    Shelf(filled, MODEL, None, 1 << 30)
    assert len(paths(filled)) == before - 1


def test_two_processes_write_one_folder(tmp_path):
    running = [
        subprocess.Popen(
            [sys.executable, "-W", "error::UserWarning", "-c", ANOTHER, str(tmp_path)],
            cwd=CHECKOUT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=300) for process in running]
    assert [process.returncode for process in running] == [0, 0], outputs
    assert outputs[0][0].split(" ", 1)[1] == outputs[1][0].split(" ", 1)[1]
    store = made(tmp_path)
    assert sum(row.computed for row in together(store, eight())) == 8


def test_many_files_are_looked_at_and_not_read(filled, monkeypatch):
    monkeypatch.setattr(behind.file, "read_all", None)
    (path,) = paths(filled)
    for number in range(300):
        os.link(path, path.with_name(f"{path.name[:12]}-{number:016x}.path"))
    opened = []
    monkeypatch.setattr(SafetensorsFile, "open", lambda self: opened.append(self))
    shelf = Shelf(filled, MODEL, None, 1 << 30)
    assert len(shelf._tree) == 1 and not opened  # all say the same
    mx.synchronize()


@pytest.mark.parametrize("form", [None, KVFormat(8, 32, 70)])
def test_of_a_long_file_only_the_beginning_is_kept(tmp_path, form):
    model, _ = tiny_model(head_dim=32, rope_parameters={"mrope_section": [4, 2, 2]})
    model.kv_form = form
    store = made(tmp_path, model)
    answered(store, asked(TRUNK[:200], TRUNK, turns=(0, 200, 1699)), 3)
    store.close()
    store, prompt = made(tmp_path, model), asked(TRUNK[:200], 1, 2)
    row = answered(store, prompt, 3)
    wanted = answered(made(tmp_path / "none", model), prompt, 3)
    assert row.computed == 2 and row.said == wanted.said
    assert store.nbytes < 1.3 * wanted.store.nbytes
    np.testing.assert_allclose(np.array(row.logits), np.array(wanted.logits), atol=1e-4)
