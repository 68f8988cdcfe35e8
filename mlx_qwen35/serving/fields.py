"""The fields of a request's JSON body: null is as good as absent, and what is of another type is refused by name.

Knows JSON types. Knows no interface.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mlx_qwen35.serving.refusal import Refusal


class Fields:
    """One JSON object, read field by field. where: its place in the body ("options."), for messages.

    `unread` are the fields that nobody asked for: they are ignored, and counted in the log.
    """

    def __init__(self, given: Any, where: str = "") -> None:
        if not isinstance(given, Mapping):
            raise Refusal(
                "invalid", f"{where.rstrip('.') or 'the body'} is no JSON object: send one", where.rstrip(".") or None
            )
        self._given, self._where = given, where
        self._read: set[str] = set()

    @property
    def unread(self) -> list[str]:
        return sorted(name for name, value in self._given.items() if name not in self._read and value is not None)

    def any(self, name: str, default: Any = None) -> Any:
        """Whatever it is."""
        self._read.add(name)
        value = self._given.get(name)
        return default if value is None else value

    def text(self, name: str, default: str | None = None) -> str | None:
        return self._of(name, str, "a string", default)

    def flag(self, name: str, default: bool | None = None) -> bool | None:
        return self._of(name, bool, "true or false", default)

    def whole(
        self, name: str, least: int | None = None, most: int | None = None, default: int | None = None
    ) -> int | None:
        """A whole number; 3.0 is one."""
        value = self.number(name, least, most)
        if value is None:
            return default
        if value != int(value):
            raise self.refused(name, "a whole number")
        return int(value)

    def number(
        self, name: str, least: float | None = None, most: float | None = None, default: float | None = None
    ) -> float | None:
        """A finite number, from least to most."""
        value = self.any(name)
        if value is None:
            return default
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or (isinstance(value, float) and not math.isfinite(value))
        ):
            raise self.refused(name, "a number")
        if least is not None and value < least or most is not None and value > most:
            limits = (
                f"at least {least}"
                if most is None
                else f"at most {most}"
                if least is None
                else f"from {least} to {most}"
            )
            raise self.refused(name, f"a number, {limits}")
        return value

    def list(self, name: str, default: Sequence[Any] = ()) -> Sequence[Any]:
        return self._of(name, list, "a list", default)

    def object(self, name: str) -> Fields | None:
        """The fields of an object inside this one."""
        value = self.any(name)
        return None if value is None else Fields(value, f"{self._where}{name}.")

    def strings(self, name: str) -> list[str]:
        """A string or a list of them, as `stop` is given."""
        value = self.any(name, [])
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            raise self.refused(name, "a string or a list of strings")
        return value

    def one_of(self, name: str, allowed: Sequence[str], default: str | None = None) -> str | None:
        value = self.text(name)
        if value is not None and value not in allowed:
            raise self.refused(name, "one of " + ", ".join(allowed))
        return default if value is None else value

    def refused(self, name: str, wanted: str) -> Refusal:
        """The error for a field that is something else."""
        place = self._where + name
        return Refusal("invalid", f"{place} is {_shown(self._given.get(name))}; give {wanted}", place)

    def _of(self, name: str, kind: type, words: str, default: Any) -> Any:
        value = self.any(name)
        if value is None:
            return default
        if not isinstance(value, kind):
            raise self.refused(name, words)
        return value


def _shown(value: Any) -> str:
    """A value in a message: never the user's text in full."""
    if isinstance(value, (Mapping, list)):
        return "an object" if isinstance(value, Mapping) else f"a list of {len(value)}"
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 40 else text[:37] + "..."
