"""Regular expressions as Python reads them, written as llguidance (Rust) reads them: the same words, or fewer.

They differ in what looks alike: classes within classes, \\d, \\Z, the line end before $. So an expression is read by
Python's own parser and written anew, every character that is no letter by its number. What has no counterpart is
refused by name. Anchors may stand where the text begins and ends, and are dropped there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from mlx_qwen35.errors import ArgumentError

try:
    from re import _constants as _codes
    from re import _parser
except ImportError:  # before Python 3.11
    import sre_constants as _codes
    import sre_parse as _parser

ANYTHING = "(?s:.*)"
_BACKSPACE, _BACKSPACE_CLASS = 8, r"[\x{8}]"
_SIMPLE = re.compile(r"[A-Za-z0-9_ ]")
_REFUSED = {
    "ASSERT": "a look ahead or behind",
    "ASSERT_NOT": "a look ahead or behind",
    "GROUPREF": "a reference to a group",
    "GROUPREF_EXISTS": "a condition on a group",
    "ATOMIC_GROUP": "an atomic group",
    "POSSESSIVE_REPEAT": "a possessive repetition",
}
# A class, and what stands for it in [...]. Inside [^...] and for \D, \W, \S all that either Python or JSON Schema's
# dialect counts; elsewhere, in a schema, what both do.
_ASCII = {"DIGIT": "0-9", "WORD": "0-9A-Za-z_", "SPACE": r" \t\n\r\x0b\x0c"}
_UNICODE = {"DIGIT": r"\p{Nd}", "WORD": r"\p{L}\p{N}_", "SPACE": r"\s"}
_WIDEST = {**_UNICODE, "SPACE": r"\s\x1c-\x1f\x{feff}"}


def whole(pattern: str | re.Pattern[str]) -> str:
    """What matches the texts that the expression matches from end to end, as Rust writes it. Raises ArgumentError."""
    return _write(pattern, around="", schema=False)


def found(pattern: str) -> str:
    """What matches, from end to end, the texts in which a schema's `pattern` is found. Raises ArgumentError."""
    return _write(pattern, around=ANYTHING, schema=True)


def literal(text: str) -> str:
    """An expression that matches this text alone."""
    return "".join(map(_character, text))


def without(words: Sequence[str]) -> str:
    """An expression for all texts that hold none of these words. Each begins with "<" and has no other one."""
    rests = [word[1:] for word in words]

    def behind(passed: str) -> str:
        """What may follow "<" and `passed`, which is how a word goes on, up to the next "<"."""
        letters = sorted({rest[len(passed)] for rest in rests if rest.startswith(passed)})
        ways = [f"[^{literal('<')}{literal(''.join(letters))}][^{literal('<')}]*"]
        ways += [literal(letter) + behind(passed + letter) for letter in letters if passed + letter not in rests]
        return f"(?:{'|'.join(ways)})?"

    return f"[^{literal('<')}]*(?:{literal('<')}{behind('')})*"


def _character(character: str) -> str:
    return character if _SIMPLE.match(character) else f"\\x{{{ord(character):x}}}"


def _write(pattern: str | re.Pattern[str], *, around: str, schema: bool) -> str:
    text = pattern.pattern if isinstance(pattern, re.Pattern) else pattern
    if not isinstance(text, str):
        raise ArgumentError(f"{text!r} is an expression over bytes; write one over text")
    flags = pattern.flags if isinstance(pattern, re.Pattern) else 0
    try:
        parsed = _parser.parse(text, flags)
    except (re.error, RecursionError, OverflowError) as error:
        raise ArgumentError(f"{text!r} is no regular expression: {error}") from None
    try:
        return _Writer(text, around, schema).sequence(parsed, parsed.state.flags, True, True)
    except RecursionError:
        raise ArgumentError(f"the regular expression {text[:60]!r}... nests too deeply; write a flatter one") from None


class _Writer:
    def __init__(self, text: str, around: str, schema: bool) -> None:
        self._text, self._around, self._schema = text, around, schema

    def sequence(self, items: Any, flags: int, left: bool, right: bool) -> str:
        """left, right: whether the sequence begins and ends where the text does."""
        items = list(items)
        anchored = [False, False]
        while left and items and self._is_anchor(items[0], flags, _codes.AT_BEGINNING, _codes.AT_BEGINNING_STRING):
            items.pop(0)
            anchored[0] = True
        while right and items and self._is_anchor(items[-1], flags, _codes.AT_END, _codes.AT_END_STRING):
            items.pop()
            anchored[1] = True
        passed = [left and not anchored[0], right and not anchored[1]]
        if not items:
            return self._around if any(passed) else ""
        written = []
        for at, item in enumerate(items):
            edges = (passed[0] and at == 0, passed[1] and at == len(items) - 1)
            written.append(self._edged(item, flags, *edges))
        return "".join(written)

    def _edged(self, item: Any, flags: int, left: bool, right: bool) -> str:
        op, value = item
        if op is _codes.BRANCH:
            return "(?:" + "|".join(self.sequence(part, flags, left, right) for part in value[1]) + ")"
        if op is _codes.SUBPATTERN:
            _, added, removed, inner = value
            return "(?:" + self.sequence(inner, (flags | added) & ~removed, left, right) + ")"
        before, after = (self._around if edge else "" for edge in (left, right))
        return before + self._item(op, value, flags) + after

    def _item(self, op: Any, value: Any, flags: int) -> str:
        folded: Callable[[str], str] = (lambda text: f"(?i:{text})") if flags & re.IGNORECASE else str
        if op is _codes.LITERAL:
            self._check_backspace({value})
            return folded(self._literal(value))
        if op is _codes.NOT_LITERAL:
            return folded(self._but_backspace(f"[^{self._literal(value)}]"))
        if op is _codes.ANY:
            any_other = self._but_backspace(r"[^\n\r\x{2028}\x{2029}]") if self._schema else r"[^\n]"
            return "(?s:.)" if flags & re.DOTALL else any_other
        if op is _codes.IN:
            return folded(self._class(value, flags))
        if op in (_codes.MAX_REPEAT, _codes.MIN_REPEAT):
            least, most, inner = value
            bounds = f"{{{least},{'' if most is _codes.MAXREPEAT else most}}}"
            return f"(?:{self.sequence(inner, flags, False, False)}){bounds}"
        if op is _codes.AT:
            raise self._refusal("an anchor or \\b inside")
        raise self._refusal(_REFUSED.get(str(op), str(op).lower()))

    def _class(self, parts: Sequence[Any], flags: int) -> str:
        negated = bool(parts) and parts[0][0] is _codes.NEGATE
        written = []
        for op, value in parts[negated:]:
            if op is _codes.LITERAL:
                written.append(self._literal(value))
            elif op is _codes.RANGE:
                written.append("-".join(map(self._literal, value)))
            elif op is _codes.CATEGORY:
                written.append(self._category(str(value).removeprefix("CATEGORY_"), flags, negated))
            else:
                raise self._refusal(str(op).lower())
        if not negated:
            self._check_backspace({value for op, value in parts})
        return self._but_backspace(f"[{'^' if negated else ''}{''.join(written)}]")

    def _but_backspace(self, written: str) -> str:
        """A class of a schema's pattern, without U+0008: where a class has that, llguidance lets every escape of two
        characters through it, \\" and \\\\ too, whatever the class says of them."""
        return f"[{written}--{_BACKSPACE_CLASS}]" if self._schema else written

    def _check_backspace(self, codes: set[Any]) -> None:
        """What is U+0008 alone is refused: beside a class, as in x|[^y], it would be one class with it again."""
        if self._schema and codes in ({_BACKSPACE}, {(_BACKSPACE, _BACKSPACE)}):
            raise self._refusal("the control character U+0008")

    def _category(self, name: str, flags: int, negated: bool) -> str:
        opposite = name.startswith("NOT_")
        name = name.removeprefix("NOT_")
        if opposite == negated:
            table = _ASCII if self._schema or flags & re.ASCII else _UNICODE
        else:
            table = _ASCII if flags & re.ASCII else _WIDEST
        return f"[^{table[name]}]" if opposite else table[name]

    def _literal(self, code: int) -> str:
        if 0xD800 <= code < 0xE000:
            raise self._refusal("half of a surrogate pair")
        return _character(chr(code))

    def _is_anchor(self, item: Any, flags: int, *kinds: Any) -> bool:
        return item[0] is _codes.AT and item[1] in kinds and not flags & re.MULTILINE

    def _refusal(self, what: str) -> ArgumentError:
        return ArgumentError(f"the expression {self._text!r} has {what}, which cannot be followed; leave it out")
