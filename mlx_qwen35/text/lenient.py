"""JSON as models write it: what JSON's own reader takes, and what they make of it.

Read too: raw line ends and tabs in strings, commas before a closing bracket, single quotes, Python's True, False, None
and tuples, numbers such as .5 and +3. Never a guess: a text that needs one is no value. Knows nothing of schemas.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

_DEEPEST = 200  # brackets within one another
_SPACE = re.compile(r"\s*")
_NUMBER = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?(?![\w.])")
_WORD = re.compile(r"[A-Za-z]+(?!\w)")
_WORDS = {"true": True, "True": True, "false": False, "False": False, "null": None, "None": None}
_PLAIN = {'"': re.compile(r'[^"\\]*'), "'": re.compile(r"[^'\\]*")}
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "\n": ""}
_HEX = {"x": 2, "u": 4}
_CLOSERS = {"[": "]", "(": ")", "{": "}"}


class NoValue(ValueError):
    """The text is no value."""


def read_value(text: str) -> Any:
    """The value of the whole text; raises NoValue. Numbers are finite."""
    value, end = read_value_at(text, 0)
    if _SPACE.match(text, end).end() != len(text):
        raise NoValue("something follows the value")
    return value


def read_value_at(text: str, start: int) -> tuple[Any, int]:
    """(the value that begins at `start`, where it ends); raises NoValue."""
    try:
        return _STRICT.raw_decode(text, _SPACE.match(text, start).end())
    except (ValueError, RecursionError):
        return _Reader(text).value(start, 0)


def read_number(text: str) -> int | float:
    """The number that the whole text is, white space around it aside; raises NoValue."""
    found = _NUMBER.fullmatch(text.strip())
    if found is None:
        raise NoValue("no number")
    return _number(found.group())


def _number(text: str) -> int | float:
    try:
        if not set(text) & set(".eE"):
            return int(text)
        value = float(text)
    except ValueError as error:  # more digits than Python reads
        raise NoValue(str(error)) from None
    if not math.isfinite(value):
        raise NoValue(text)
    return value


def _refused(text: str) -> float:
    raise NoValue(text)


_STRICT = json.JSONDecoder(strict=False, parse_float=_number, parse_constant=_refused)


class _Reader:
    def __init__(self, text: str) -> None:
        self._text = text

    def value(self, at: int, depth: int) -> tuple[Any, int]:
        text, at = self._text, _SPACE.match(self._text, at).end()
        first = text[at : at + 1]
        if depth > _DEEPEST:
            raise NoValue("too deep")
        if first in _PLAIN:
            return self._string(at)
        if first in ("[", "("):
            return self._items(at, depth)
        if first == "{":
            return self._pairs(at, depth)
        word = _WORD.match(text, at)
        if word and word.group() in _WORDS:
            return _WORDS[word.group()], word.end()
        number = _NUMBER.match(text, at)
        if number is None:
            raise NoValue("no value")
        return _number(number.group()), number.end()

    def _items(self, at: int, depth: int) -> tuple[list[Any], int]:
        closer, items = _CLOSERS[self._text[at]], []
        at = self._after(at + 1)
        while not self._text.startswith(closer, at):
            item, at = self.value(at, depth + 1)
            items.append(item)
            at = self._comma(at, closer)
        return items, at + 1

    def _pairs(self, at: int, depth: int) -> tuple[dict[str, Any], int]:
        pairs: dict[str, Any] = {}
        at = self._after(at + 1)
        while not self._text.startswith("}", at):
            if self._text[at : at + 1] not in _PLAIN:
                raise NoValue("a name without quotes")
            name, at = self._string(at)
            at = self._after(at)
            if not self._text.startswith(":", at):
                raise NoValue("a name without a value")
            pairs[name], at = self.value(at + 1, depth + 1)
            at = self._comma(at, "}")
        return pairs, at + 1

    def _comma(self, at: int, closer: str) -> int:
        at = self._after(at)
        if self._text.startswith(",", at):
            return self._after(at + 1)
        if not self._text.startswith(closer, at):
            raise NoValue("no comma between two values")
        return at

    def _after(self, at: int) -> int:
        return _SPACE.match(self._text, at).end()

    def _string(self, at: int) -> tuple[str, int]:
        text, quote, pieces = self._text, self._text[at], []
        at += 1
        while True:
            plain = _PLAIN[quote].match(text, at)
            pieces.append(plain.group())
            at = plain.end()
            if text.startswith(quote, at):
                return "".join(pieces), at + 1
            escape = text[at + 1 : at + 2]
            if not escape:
                raise NoValue("a string without an end")
            at += 2
            if escape in _HEX:
                digits = text[at : at + _HEX[escape]]
                if len(digits) < _HEX[escape] or not all(c in "0123456789abcdefABCDEF" for c in digits):
                    raise NoValue("an escape without its digits")
                pieces.append(chr(int(digits, 16)))
                at += len(digits)
            elif escape in _ESCAPES:
                pieces.append(_ESCAPES[escape])
            else:
                pieces.append(escape if escape in "\"'\\/" else "\\" + escape)
