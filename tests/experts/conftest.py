"""What tests of the reader begin with."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from mlx_qwen35.experts.guessing import Guessing

from .some_experts import Disk, Files, reader_threads, soon


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("experts"))


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


@pytest.fixture
def no_thread_is_left() -> Iterator[None]:
    gc.collect()
    soon(lambda: not reader_threads())
    yield
    gc.collect()
    soon(lambda: not reader_threads())


@pytest.fixture
def guesses_always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts are read ahead in every turn, whether that pays or not."""
    monkeypatch.setattr(Guessing, "pays", lambda self: True)
