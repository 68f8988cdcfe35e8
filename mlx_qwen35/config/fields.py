"""Typed access to an object of a JSON file; what is missing or of another type is an error that names file and key.

Knows JSON's types and no key.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mlx_qwen35.errors import CheckpointError

# Far above any published size: a larger number is a damaged file, and arrays of it could not even be described.
LARGEST_SIZE = 2**20
LARGEST_COUNT = 2**31 - 1


def kind_of(value: Any) -> str:
    """The JSON name of a value's type, for errors."""
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list"}
    return names.get(type(value), "an object")


class Fields:
    """One object of config.json: typed access that names the file and the full key when something is wrong."""

    def __init__(self, values: Mapping[str, Any], where: str, prefix: str = ""):
        self.values, self.where, self.prefix = values, where, prefix

    def fail(self, key: str, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {self.prefix}{key} {problem}")

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def section(self, key: str) -> Fields | None:
        """The object under `key`; None where it is absent or null."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.fail(key, f"is {kind_of(value)} where an object is expected: restore the published config.json")
        return Fields(value, self.where, f"{self.prefix}{key}.")

    def required(self, key: str) -> Any:
        if not self.has(key):
            raise self.fail(key, "is missing and has no default: copy it from the published config.json")
        return self.values[key]

    def size(self, key: str, *, least: int = 1, most: int = LARGEST_SIZE) -> int:
        value = self.required(key)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self.fail(key, f"is {value!r:.80} where a whole number from {least} to {most} is expected")
        return value

    def number(self, key: str, *, above: float = 0.0) -> float:
        value = self.required(key)
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300
        if not good or not math.isfinite(value) or value <= above:
            raise self.fail(key, f"is {value!r:.80} where a number above {above:g} is expected")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.fail(key, f"is {value!r:.80} where true or false is expected")
        return value

    def token(self, key: str) -> int | None:
        return self.size(key, least=0, most=LARGEST_COUNT) if self.has(key) else None

    def tokens(self, key: str) -> tuple[int, ...]:
        """A token id, a list of them, or nothing."""
        value = self.values.get(key)
        if value is None:
            return ()
        ids = value if isinstance(value, list) else [value]
        return tuple(Fields({key: i}, self.where, self.prefix).size(key, least=0, most=LARGEST_COUNT) for i in ids)

    def only(self, key: str, *allowed: Any) -> None:
        """Refuse a value that would be another architecture; absent or null is as published."""
        value = self.values.get(key)
        if value is not None and value not in allowed:
            supported = " or ".join(repr(a) for a in allowed)
            raise self.fail(key, f"is {value!r:.80}, which this package does not compute (it supports {supported})")
