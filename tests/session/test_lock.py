"""One program at a time on a session file."""

import os
import subprocess
import sys

import pytest

from mlx_qwen35.errors import SessionError
from mlx_qwen35.session.lock import SessionLock
from tests.conftest import CHECKOUT

HOLD = """
import sys
from mlx_qwen35.session.lock import SessionLock
with SessionLock(sys.argv[1]):
    print(1, flush=True)
    input()
"""


def test_another_program_is_refused_and_a_dead_one_is_not(tmp_path):
    file = tmp_path / "kept"
    held = subprocess.Popen([sys.executable, "-c", HOLD, file], cwd=CHECKOUT, stdin=-1, stdout=-1)
    assert held.stdout.readline() == b"1\n"
    with pytest.raises(SessionError, match=rf"in use by another program \(process {held.pid}\)"), SessionLock(file):
        pass
    held.kill()
    held.communicate()
    assert (tmp_path / ".kept.lock").exists()
    with SessionLock(file):
        pass
    assert not [*tmp_path.iterdir()]


def test_who_waits_with_a_deleted_file_open_takes_the_new_one(tmp_path, monkeypatch):
    """Between opening the lock and locking it, its owner leaves and deletes it."""
    first, opened = SessionLock(tmp_path / "kept"), os.open

    def open_slowly(path, *given):
        handle = opened(path, *given)
        monkeypatch.setattr(os, "open", opened)
        first.__exit__(None, None, None)
        return handle

    first.__enter__()
    monkeypatch.setattr(os, "open", open_slowly)
    with SessionLock(tmp_path / "kept"):
        with pytest.raises(SessionError), SessionLock(tmp_path / "kept"):
            pass


def test_a_folder_that_cannot_be_written_is_for_others_to_refuse(tmp_path):
    with SessionLock(tmp_path / "none" / "kept"):
        pass
