"""Packages that take seconds to import, and that few tests use. Knows no package."""

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import pytest


class Later(ModuleType):
    """A module that is imported when something of it is asked for."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("_"):  # what pytest asks of everything that it finds
            raise AttributeError(name)
        return getattr(import_module(self.__name__), name)


def later(name: str) -> ModuleType:
    """As pytest.importorskip, but the import waits for the first test that needs it: each of the processes that share
    the tests collects all of them."""
    if find_spec(name) is None:
        pytest.skip(f"{name} is not installed", allow_module_level=True)
    return Later(name)
