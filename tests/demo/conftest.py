"""The curriculum of the demo checkpoint, whose modules lie outside of the package."""

import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from tests.conftest import CHECKOUT


@pytest.fixture(scope="session")
def curriculum() -> Iterator[SimpleNamespace]:
    """The names of its modules: cases, makers of text and picture questions, and their files."""
    folder = str(CHECKOUT / "tools" / "train_demo")
    sys.path.insert(0, folder)
    names: dict = {}
    for module in ("case", "text_skills", "picture_skills", "media_files"):
        names |= vars(__import__(module))
    yield SimpleNamespace(**names)
    sys.path.remove(folder)
