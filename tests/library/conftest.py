"""A faked machine, and a Hub that answers from memory."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fake_hub import Hub, serving
from tests.machine import Machine


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path / "home", monkeypatch)


@pytest.fixture
def hub(machine: Machine) -> Iterator[Hub]:
    served = Hub()
    machine.monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serving(served) as address:
        machine.monkeypatch.setenv("HF_ENDPOINT", address)
        yield served
