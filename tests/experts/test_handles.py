"""A file of experts gives its bytes or an error that names it: never other bytes for good."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from mlx_qwen35.errors import ExpertReadError
from mlx_qwen35.experts import handles
from mlx_qwen35.experts.handles import Handle, open_all

DATA = np.random.RandomState(0).bytes(100_000)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "layer.safetensors"
    file.write_bytes(DATA)
    return file


def read(handle: Handle, offset: int, *sizes: int) -> bytes:
    buffers = [bytearray(size) for size in sizes]
    assert handle.read([memoryview(buffer) for buffer in buffers], offset) == sum(sizes)
    return b"".join(buffers)


@contextmanager
def no_root() -> Iterator[None]:
    """As somebody whom permissions hold back."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("sizes", [(1,), (100_000,), (0, 5, 0, 70, 1), (4096, 3), (99_990, 10)])
def test_buffers_are_filled_one_after_the_other(path: Path, sizes: tuple[int, ...]) -> None:
    handle = Handle(path, len(DATA))
    for offset in (0, (len(DATA) - sum(sizes)) // 2, len(DATA) - sum(sizes)):
        assert read(handle, offset, *sizes) == DATA[offset : offset + sum(sizes)]
    handle.check()
    handle.close()
    handle.close()


@pytest.mark.parametrize("most", [1, 7, 4096])
def test_the_system_may_give_less_than_was_asked_for(path: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    whole = os.preadv

    def some(number: int, buffers: list[memoryview], offset: int) -> int:
        given, left = [], most
        for buffer in buffers:
            given.append(buffer[:left])
            left -= given[-1].nbytes
        return whole(number, given, offset)

    handle = Handle(path)
    monkeypatch.setattr(os, "preadv", some)
    assert read(handle, 300, 10, 0, 600, 1, 13) == DATA[300:924]
    with pytest.raises(ExpertReadError, match="ends 5 bytes too early"):
        read(handle, len(DATA) - 20, 12, 13)


@pytest.mark.parametrize("at_hand", [0, 1, 611, 620, 623, 624, None])
def test_who_would_wait_for_the_disk_says_so(path: Path, monkeypatch: pytest.MonkeyPatch, at_hand: int | None) -> None:
    """at_hand: bytes of the file that are in memory; None: the system cannot tell."""
    whole, said = os.preadv, []

    def preadv(number: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        if not flags:
            assert said
            return whole(number, buffers, offset)
        if at_hand == 0:
            raise BlockingIOError
        given, left = [], at_hand
        for buffer in buffers:
            given.append(buffer[:left])
            left -= given[-1].nbytes
        return whole(number, given, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    monkeypatch.setattr(handles, "_AT_HAND", None if at_hand is None else 8)
    buffers = [bytearray(size) for size in (10, 0, 600, 1, 13)]
    assert Handle(path).read([memoryview(each) for each in buffers], 300, lambda: said.append(1)) == 624
    assert b"".join(buffers) == DATA[300:924]
    assert said == [1] * (at_hand != 624)
    with pytest.raises(ExpertReadError, match="ends 5 bytes too early"):
        Handle(path).read([memoryview(bytearray(13))], len(DATA) - 8, lambda: said.append(1))


def test_a_file_that_is_not_there_or_may_not_be_read(path: Path) -> None:
    with pytest.raises(ExpertReadError, match="none.safetensors cannot be opened .No such file.*put the file back"):
        Handle(path.parent / "none.safetensors")
    os.chmod(path.parent, 0o755)
    path.chmod(0)
    with no_root(), pytest.raises(ExpertReadError, match="cannot be opened .Permission denied.*change its permissions"):
        Handle(path)


def test_permissions_taken_away_later_change_nothing(path: Path) -> None:
    handle = Handle(path)
    path.chmod(0)
    with no_root():
        assert read(handle, 5, 50) == DATA[5:55]
        handle.check()


def test_a_file_that_is_too_short(path: Path) -> None:
    Handle(path, len(DATA)).close()
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    with pytest.raises(ExpertReadError, match=f"has {len(DATA)} bytes, its experts {len(DATA) + 1}: restore the file"):
        Handle(path, len(DATA) + 1)
    with pytest.raises(ExpertReadError, match="cannot be opened"):
        open_all([(path, 1), (path.parent / "none", 1)])
    if before:
        assert len(os.listdir("/proc/self/fd")) == before


def test_replaced_under_its_name_it_stays_the_old_one(path: Path) -> None:
    handle = Handle(path)
    other = path.with_suffix(".new")
    other.write_bytes(bytes(len(DATA)))
    os.replace(other, path)
    assert read(handle, 0, 1000) == DATA[:1000]
    handle.check()
    path.unlink()
    assert read(handle, 500, 1000) == DATA[500:1500]
    handle.check()


@pytest.mark.parametrize("change", ["byte", "cut", "longer", "same bytes"])
def test_changed_in_place_it_is_not_trusted(path: Path, change: str) -> None:
    handle = Handle(path)
    os.utime(path, ns=(0, 0)) if change == "same bytes" else None
    with open(path, "r+b") as file:
        if change == "byte":
            file.seek(70_000)
            file.write(b"\0")
        elif change == "cut":
            file.truncate(50_000)
        elif change == "longer":
            file.seek(0, 2)
            file.write(b"\0")
    if change == "cut":
        with pytest.raises(ExpertReadError, match="layer.safetensors ends 100 bytes too early.*Restore the file"):
            read(handle, 49_000, 1100)
    assert read(handle, 10, 40) == DATA[10:50]
    with pytest.raises(ExpertReadError, match="layer.safetensors was changed while .*Load the model again"):
        handle.check()


@pytest.mark.parametrize(
    "number, advice",
    [(errno.EIO, "check the disk.*then ask again"), (errno.EACCES, "permissions, then ask again"),
     (errno.ESTALE, "load the model again"), (errno.ENODEV, "load the model again")],
)  # fmt: skip
def test_errors_of_the_disk(path: Path, monkeypatch: pytest.MonkeyPatch, number: int, advice: str) -> None:
    handle = Handle(path)

    def broken(*args: object) -> int:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", broken)
        with pytest.raises(ExpertReadError, match=f"layer.safetensors cannot be read .{os.strerror(number)}.*{advice}"):
            read(handle, 0, 5)
        patch.setattr(os, "fstat", broken)
        with pytest.raises(ExpertReadError, match=f"cannot be read .*{advice}"):
            handle.check()
    assert read(handle, 0, 5) == DATA[:5]
    handle.check()


def test_closed_it_reads_nothing(path: Path) -> None:
    handle = Handle(path)
    handle.close()
    for ask in (lambda: read(handle, 0, 5), handle.check):
        with pytest.raises(ExpertReadError, match="not open any more, load the model again"):
            ask()


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ExpertReadError, match=str(tmp_path)):
        read(Handle(tmp_path), 0, 5)
