"""The arguments of a call while they are written: JSON in pieces, which together are that of the whole call.

Knows which tags every reading of calls.py takes in the same way, whatever follows. Gives nothing out beyond the first
that it may not.

    <tool_call> <function=NAME> <parameter=KEY>     NAME is offered, and the tool says that KEY is one of its names, and
                                                    has no others: the call has begun
    any text, </div> and the like                   text of the value, in every reading
    </parameter> <parameter=KEY>                    another of its names, not given yet: the value has ended
    whatever else                                   may be text or not: nothing more is given until the call is whole

A value whose schema says nothing but text is given as it comes, any other at its end. What a value ends with waits: the
line end before </parameter> is not of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mlx_qwen35.text.arguments import ToolSchemas
from mlx_qwen35.text.call_reading import OPENING, STRAY, without_line_ends
from mlx_qwen35.text.tags import Kind, Tag, Tags


def as_json(arguments: Any) -> str:
    """Arguments, or one of them, as the pieces have them."""
    return json.dumps(arguments, ensure_ascii=False)


def remaining(arguments: Mapping[str, Any], said: str) -> str:
    """What follows the pieces of a call, now that it is whole."""
    whole = as_json(arguments)
    if not whole.startswith(said):  # a fault of this module
        raise RuntimeError("pieces of a call were told that are not its own")
    return whole[len(said) :]


class CallPieces:
    """Of one call. name: of the function, once the call has begun."""

    def __init__(self, schemas: ToolSchemas) -> None:
        self.name: str | None = None
        self._schemas = schemas
        self._looked = 0  # tags that are behind it
        self._key: Tag | None = None  # the parameter whose value is being written
        self._text = False  # whether its value is given as it comes
        self._given: set[str] = set()  # names of parameters
        self._said = 0  # characters of the value that were given out
        self._stopped = False

    def advance(self, text: str, tags: Tags) -> str:
        """text: of the call so far, whose tags these are -> what is new of the arguments' JSON."""
        if self._stopped:
            return ""
        found, new = tags.found, ""
        if self._key is None:
            if len(found) < 3:
                return ""
            if not self._begins(text, *found[:3]):
                self._stopped = True
                return ""
            new, self._looked = self._opened(found[2]), 3
        while self._looked < len(found):
            tag = found[self._looked]
            if tag.kind is Kind.OTHER_END and tag.name not in STRAY and tag.name != self._key.name:
                self._looked += 1
                continue
            after = found[self._looked + 1] if self._looked + 1 < len(found) else None
            if tag.kind is Kind.PARAMETER_END and after is None and not text[tag.end : tags.position].strip():
                break  # what follows decides
            if tag.kind is not Kind.PARAMETER_END or after is None or not self._follows(text, tag, after):
                self._stopped = True
                break
            new += self._ended(text[self._key.end : tag.start]) + self._opened(after)
            self._looked += 2
        end = found[self._looked].start if self._looked < len(found) else tags.position
        return new + self._more(text[self._key.end : end])

    def _begins(self, text: str, call: Tag, function: Tag, parameter: Tag) -> bool:
        blank = not (text[call.end : function.start] + text[function.end : parameter.start]).strip()
        usual = text.startswith(OPENING) and function.kind is Kind.FUNCTION and function.usual
        self.name = function.name
        if blank and usual and self._schemas.offers(function.name) and self._is_new(parameter):
            return True
        self.name = None
        return False

    def _is_new(self, tag: Tag) -> bool:
        names = self._schemas.names(self.name)
        known = names is not None and tag.name in names and tag.name not in self._given
        return tag.kind is Kind.PARAMETER and tag.usual and tag.fresh and known

    def _follows(self, text: str, closing: Tag, tag: Tag) -> bool:
        return self._is_new(tag) and not text[closing.end : tag.start].strip()

    def _opened(self, tag: Tag) -> str:
        begin = ", " if self._given else "{"
        self._key, self._said, self._text = tag, 0, self._schemas.is_text(self.name, tag.name)
        self._given.add(tag.name)
        return f"{begin}{as_json(tag.name)}: " + ('"' if self._text else "")

    def _more(self, value: str) -> str:
        """What is certain of a value that goes on; line ends at its end are not."""
        return self._new(without_line_ends(value.rstrip("\r\n"))) if self._text else ""

    def _ended(self, value: str) -> str:
        value = without_line_ends(value)
        if self._text:
            return self._new(value) + '"'
        return as_json(self._schemas.arguments(self.name, {self._key.name: value})[self._key.name])

    def _new(self, value: str) -> str:
        new, self._said = value[self._said :], max(self._said, len(value))
        return as_json(new)[1:-1]
