"""Files as macOS has them, on whatever system this is: what is flushed, what is not cached, what lies among them."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_qwen35.conversion.convert import convert
from mlx_qwen35.conversion.disk import LEAST, Writer
from mlx_qwen35.machine import files
from mlx_qwen35.session.file import write
from tests.checkpoints import random_tensors, tiny_config, write_checkpoint
from tests.conftest import CHECKOUT


class Fcntl:
    """Stands in for the module: notes what was asked of which file, and may refuse it."""

    LOCK_EX, LOCK_NB = 2, 4

    def __init__(self, refuses: int | None = None):
        self.calls: list[tuple[int, int]] = []  # inode, command
        self.arguments: list[tuple[int, ...]] = []
        self.refuses = refuses

    def fcntl(self, handle: int, command: int, *argument: int) -> int:
        if self.refuses is not None:
            raise OSError(self.refuses, os.strerror(self.refuses))
        self.calls.append((os.fstat(handle).st_ino, command))
        self.arguments.append((command, *argument))
        return 0

    def flock(self, handle: int, operation: int) -> None:
        if self.refuses is not None:
            raise OSError(self.refuses, os.strerror(self.refuses))


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> Fcntl:
    monkeypatch.setattr(files, "is_mac", lambda: True)
    for name in ("O_DIRECT", "posix_fadvise", "posix_fallocate"):
        monkeypatch.delattr(os, name, raising=False)
    found = Fcntl()
    monkeypatch.setattr(files, "fcntl", found)
    return found


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Inodes that os.fsync was asked for."""
    asked: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda handle: asked.append(os.fstat(handle).st_ino))
    return asked


def test_a_mac_flushes_the_drive(mac: Fcntl, synced: list[int], tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x")
    files.flush_path(path)
    files.flush_names(tmp_path)
    assert mac.calls == [(path.stat().st_ino, 51), (tmp_path.stat().st_ino, 51)] and not synced  # F_FULLFSYNC


@pytest.mark.parametrize("refuses", [errno.ENOTSUP, errno.ENOTTY, errno.EINVAL])
def test_a_disk_that_cannot_is_synced(mac: Fcntl, synced: list[int], tmp_path: Path, refuses: int) -> None:
    mac.refuses = refuses
    files.flush_path(tmp_path)
    assert synced == [tmp_path.stat().st_ino]


def test_elsewhere_it_is_fsync(monkeypatch: pytest.MonkeyPatch, synced: list[int], tmp_path: Path) -> None:
    found = Fcntl()
    monkeypatch.setattr(files, "is_mac", lambda: False)
    monkeypatch.setattr(files, "fcntl", found)
    files.flush_path(tmp_path)
    assert synced == [tmp_path.stat().st_ino] and not found.calls
    assert files.flush_names(tmp_path / "nowhere") is None


def test_a_write_that_is_lost_is_said(mac: Fcntl, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(handle: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    mac.refuses = errno.EIO
    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output"):
        files.flush_path(tmp_path)


def test_a_conversion_is_durable(mac: Fcntl, synced: list[int], tmp_path: Path) -> None:
    """Every file of the target, its folders, the journal before it is removed, and the target's own name."""
    config = tiny_config("moe")
    source = write_checkpoint(tmp_path / "source", config, random_tensors(config))
    (source / "tokenizer.json").write_text("{}")
    target = convert(source, tmp_path / "out" / "target", dtype="float16", pack_experts=True)
    flushed = {inode for inode, command in mac.calls if command == 51}
    wanted = [target.parent, target, *target.rglob("*")]
    assert {"config.json", "tokenizer.json", "experts"} <= {path.name for path in wanted}
    assert {path.stat().st_ino for path in wanted} <= flushed and not synced
    assert len(flushed) > len(wanted)  # the journal


def test_a_session_is_durable(mac: Fcntl, synced: list[int], tmp_path: Path) -> None:
    path = tmp_path / "a.session"
    write(path, {"tokens": [1]}, {})
    assert {path.stat().st_ino, tmp_path.stat().st_ino} <= {inode for inode, _ in mac.calls} and not synced


def test_what_is_written_is_not_kept_in_memory(mac: Fcntl, tmp_path: Path) -> None:
    path, data = tmp_path / "file", os.urandom(3 * LEAST + 77)
    handle = os.open(path, os.O_RDWR | os.O_CREAT)
    files.reserve(handle, len(data))
    writer = Writer(path, handle)
    writer.write(memoryview(data), 0)
    writer.close()
    os.close(handle)
    assert path.read_bytes() == data and mac.arguments == [(48, 1)]  # F_NOCACHE
    mac.refuses = errno.ENOTSUP
    before = open_files()
    assert files.open_uncached(path) == -1 and open_files() == before


def open_files() -> int:
    number = os.open(os.devnull, os.O_RDONLY)  # the lowest that is free
    os.close(number)
    return number


def test_what_is_in_memory_is_thrown_out(mac: Fcntl, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As far as that is known: whole pages of a shared mapping are invalidated, and nobody says that it worked."""
    calls = []

    class Library:
        def msync(self, place: object, nbytes: object, flags: int) -> int:
            calls.append((place.value, nbytes.value, flags))
            return 0

    monkeypatch.setattr(files.ctypes, "CDLL", lambda name: Library())
    path = tmp_path / "file"
    path.write_bytes(bytes(300_000))
    handle = os.open(path, os.O_RDONLY)
    assert not files.can_forget()
    assert not files.forget(handle) and not files.forget(handle, 200_000, 50_000)
    (_, whole, flags), (place, part, _) = calls
    page = files.mmap.ALLOCATIONGRANULARITY
    assert (whole, flags) == (300_000, 2) and place % page == 0 and part == 50_000 + 200_000 % page
    os.close(handle)
    assert not files.forget(handle)  # nothing is raised
    assert len(calls) == 2


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system forgets no files")
def test_linux_forgets(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(100))
    with open(path, "rb") as file:
        assert files.forget(file.fileno()) and files.can_forget()


def test_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT) for _ in range(2))
    assert files.lock(first)
    with pytest.raises(BlockingIOError):
        files.lock(second)
    os.close(first)
    assert files.lock(second)
    for module, expected in ((Fcntl(errno.ENOTSUP), False), (Fcntl(errno.ENOLCK), False), (None, False)):
        monkeypatch.setattr(files, "fcntl", module)
        assert files.lock(second) is expected
    monkeypatch.setattr(files, "fcntl", Fcntl(errno.EBADF))
    with pytest.raises(OSError, match="Bad file"):
        files.lock(second)
    os.close(second)


def test_litter_is_not_listed(tmp_path: Path) -> None:
    names = "b.json", "a.json", "._a.json", ".DS_Store", ".hidden.json", "__MACOSX/c.json", "in/._d.json", "in/d.json"
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [path.name for path in files.listed(tmp_path, "*.json")] == [".hidden.json", "a.json", "b.json"]
    deep = [str(path.relative_to(tmp_path)) for path in files.listed(tmp_path, "**/*.json")]
    assert deep == [".hidden.json", "a.json", "b.json", "in/d.json"]
    assert not [*files.listed(tmp_path / "nowhere")]
    inside = tmp_path / "__MACOSX"  # a folder that is given is somebody's choice
    assert [path.name for path in files.listed(inside)] == ["c.json"]


def test_the_module_comes_without_fcntl() -> None:
    code = "import sys; sys.modules['fcntl'] = None\nfrom mlx_qwen35.machine import files; print(files.lock(0))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert told.stdout.strip() == "False", told.stderr


FEW = """
import resource, sys
from pathlib import Path
import mlx.core as mx
mx.set_default_device(mx.cpu)
from mlx_qwen35.conversion import write
from mlx_qwen35.conversion.convert import convert
from mlx_qwen35.experts.handles import open_all
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (24, hard))
write.plan_shards.__defaults__ = (1,)  # a shard for every group of tensors
target = convert(sys.argv[1], sys.argv[2], dtype="float16")
shards = sorted(target.glob("*.safetensors"))
resource.setrlimit(resource.RLIMIT_NOFILE, (24, hard))
handles = open_all([(shard, 1) for shard in shards])
print(len(shards), len(handles))
"""


def test_many_files_at_once(tmp_path: Path) -> None:
    """macOS lets a process have 256 files open, of which a large conversion needs more: the limit is raised."""
    config = tiny_config("dense")
    source = write_checkpoint(tmp_path / "source", config, random_tensors(config))
    command = [sys.executable, "-c", FEW, str(source), str(tmp_path / "target")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=CHECKOUT)
    assert done.returncode == 0, done.stderr[-2000:]
    shards, opened = map(int, done.stdout.split())
    assert shards == opened > 24


def test_a_hard_limit_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(files.resource, "setrlimit", lambda kind, limits: seen.append(limits))
    for limits in ((256, 1000), (256, files.resource.RLIM_INFINITY), (9000, 9000), (files.resource.RLIM_INFINITY,) * 2):
        monkeypatch.setattr(files.resource, "getrlimit", lambda kind, limits=limits: limits)
        files.allow_open(5000)
    (few, hard), (many, unlimited) = seen
    assert (few, hard, unlimited) == (1000, 1000, files.resource.RLIM_INFINITY) and 5000 < many < 6000
