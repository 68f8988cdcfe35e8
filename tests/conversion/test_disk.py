"""Bytes past the page cache: they lie where they belong, whatever the places, the file system and the threads."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from mlx_qwen35.conversion.disk import LEAST, PAGE, Writer

SIZE = 5 * LEAST + 12345


@pytest.fixture(params=["/dev/shm", None])
def path(request, tmp_path):
    """In memory and on a disk: not every file system takes both ways."""
    if request.param is None:
        yield tmp_path / "file"
    elif not Path(request.param).is_dir():
        pytest.skip("this system has no disk in memory")
    else:
        file = Path(request.param) / f"mlx-qwen35-{os.getpid()}"
        yield file
        file.unlink()


def written(path, cuts, threads=1):
    """What lies in a file after stretches of random bytes were written that end at `cuts`; and the bytes."""
    data = np.random.default_rng(0).bytes(cuts[-1])
    handle = os.open(path, os.O_RDWR | os.O_CREAT)
    os.truncate(handle, len(data))
    writer = Writer(path, handle)
    try:
        with ThreadPoolExecutor(threads) as pool:
            places = zip([0, *cuts], cuts, strict=False)
            list(pool.map(lambda place: writer.write(memoryview(data)[slice(*place)], place[0]), places))
    finally:
        writer.close()
        writer.close()  # a second call does nothing
        os.close(handle)
    return path.read_bytes(), data


@pytest.mark.parametrize(
    "cuts",
    [
        [SIZE],  # begins with a page, does not end with one
        [7, SIZE],
        [PAGE, PAGE + LEAST, SIZE],
        [PAGE - 1, PAGE + LEAST + 1, 3 * LEAST, SIZE],
        [LEAST, LEAST + PAGE - 1, LEAST + PAGE + 1, SIZE],
        [(4 << 20) + 3, (13 << 20) + 5],  # more than is written at once
    ],
)
def test_all_of_it_lies_where_it_belongs(path, cuts):
    there, data = written(path, cuts)
    assert there == data


def test_threads_do_not_mix(path):
    rng = np.random.default_rng(1)
    there, data = written(path, np.cumsum(rng.integers(1, 3 * LEAST, 40)).tolist(), threads=5)
    assert there == data


@pytest.mark.parametrize("answer", [OSError(errno.EINVAL, "Invalid argument"), 4096])
def test_a_file_system_that_refuses(path, answer, monkeypatch):
    """It says so only when something is written; or it takes a part."""
    write, ordinary, refused = os.pwrite, [], []
    init = Writer.__init__

    def noted(self, path, handle):
        init(self, path, handle)
        ordinary.append(handle)

    def refusing(handle, data, offset):
        if handle in ordinary:
            return write(handle, data, offset)
        refused.append(offset)
        if isinstance(answer, OSError):
            raise answer
        return write(handle, data[:answer], offset)

    monkeypatch.setattr(Writer, "__init__", noted)
    monkeypatch.setattr(os, "pwrite", refusing)
    there, data = written(path, [PAGE, 2 * LEAST, SIZE])
    assert there == data
    assert refused or not hasattr(os, "O_DIRECT")


def test_a_full_disk_is_said(path, monkeypatch):
    def full(handle, data, offset):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space"):
        written(path, [SIZE])
