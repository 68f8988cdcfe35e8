"""Grammars in llama.cpp's GBNF. Knows how they are spelled; what becomes of their rules is gbnf_rules.py's."""

from __future__ import annotations

import re
from collections.abc import Callable

from mlx_qwen35.errors import ArgumentError
from mlx_qwen35.grammar.gbnf_rules import Node, Ranges, lark_of_rules, without
from mlx_qwen35.grammar.regex import literal

_TOKENS = re.compile(
    r"""(?P<space>[ \t\r\n]+|\#[^\n]*)
      | (?P<text>"(?:\\.|[^"\\\n])*")
      | (?P<set>\[(?:\\.|[^\]\\\n])*\])
      | (?P<rule>[A-Za-z][A-Za-z0-9_-]*)
      | (?P<times>\{\s*\d*\s*(?:,\s*\d*\s*)?\})
      | (?P<sign>::=|[|()*+?.])""",
    re.VERBOSE,
)
_ESCAPE = re.compile(r"\\(?:x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8})|(.))", re.DOTALL)
_LETTERS = {"n": "\n", "r": "\r", "t": "\t", '"': '"', "\\": "\\", "[": "[", "]": "]", "-": "-", "^": "^", "/": "/"}
_DEEPEST = 100


def lark_of(text: str) -> str:
    """The same grammar in Lark, from its rule "root". Raises ArgumentError, naming the line."""
    return _Reader(text).lark()


class _Reader:
    def __init__(self, text: str) -> None:
        self._text, self._at = text, 0
        self._tokens = self._scanned()
        self._uses: dict[str, int] = {}  # rules that are named, and where in the text

    def lark(self) -> str:
        rules: dict[str, Node] = {}
        while self._peek()[0] != "end":
            kind, name, place = self._next()
            if kind != "rule" or self._next()[1] != "::=":
                raise self._refusal(place, "a rule begins with its name and ::=")
            if name in rules:
                raise self._refusal(place, f"the rule {name!r} is there twice")
            rules[name] = self._choice(lambda: self._begins_rule() or self._peek()[0] == "end", 0)
        for name, place in self._uses.items():
            if name not in rules:
                raise self._refusal(place, f"there is no rule {name!r}")
        if "root" not in rules:
            raise ArgumentError("the grammar has no rule 'root'; the answer begins there")
        return lark_of_rules(rules)

    def _scanned(self) -> list[tuple[str, str, int]]:
        found, at = [], 0
        while at < len(self._text):
            match = _TOKENS.match(self._text, at)
            if match is None:
                raise self._refusal(at, f"{self._text[at : at + 20]!r} cannot be read")
            if match.lastgroup != "space":
                found.append((match.lastgroup or "", match.group(), at))
            at = match.end()
        return [*found, ("end", "", at)]

    def _peek(self) -> tuple[str, str, int]:
        return self._tokens[self._at]

    def _next(self) -> tuple[str, str, int]:
        token = self._tokens[self._at]
        self._at = min(self._at + 1, len(self._tokens) - 1)
        return token

    def _begins_rule(self) -> bool:
        return self._peek()[0] == "rule" and self._tokens[min(self._at + 1, len(self._tokens) - 1)][1] == "::="

    def _choice(self, ended: Callable[[], bool], depth: int) -> Node:
        if depth > _DEEPEST:
            raise self._refusal(self._peek()[2], "brackets nest too deeply")
        ways: list[list[Node]] = [[]]
        while not ended():
            kind, text, place = self._next()
            if text == "|" and kind == "sign":
                ways.append([])
            elif kind == "times" or (kind == "sign" and text in "*+?"):
                if not ways[-1]:
                    raise self._refusal(place, f"{text!r} repeats nothing")
                ways[-1][-1] = Node("times", self._times(kind, text), [ways[-1][-1]])
            else:
                ways[-1] += self._items(kind, text, place, depth)
        return Node("choice", parts=[Node("row", parts=way) for way in ways])

    def _times(self, kind: str, text: str) -> str:
        if kind == "sign":
            return text
        least, comma, most = "".join(text.strip("{}").split()).partition(",")
        return f"{{{least or 0},{most}}}" if comma else f"{{{least or 0}}}"

    def _items(self, kind: str, text: str, place: int, depth: int) -> list[Node]:
        if kind == "text":
            characters = [
                Node("one", literal(each), ranges=_ranges([each])) for each in self._characters(text[1:-1], place)
            ]
            return [Node("row", parts=characters)]
        if kind == "set":
            return [self._set(text[1:-1], place)]
        if kind == "rule":
            self._uses.setdefault(text, place)
            return [Node("rule", text)]
        if text == ".":
            return [Node("one", "(?s:.)", ranges=without(()))]
        if text == "(":
            inner = self._choice(lambda: self._peek()[1] == ")" or self._peek()[0] == "end", depth + 1)
            if self._next()[1] != ")":
                raise self._refusal(place, "the bracket is not closed")
            return [inner]
        raise self._refusal(place, f"{text!r} is found where a rule, a text or a set is expected")

    def _set(self, inner: str, place: int) -> Node:
        negated = inner.startswith("^")
        parts = self._characters(inner[negated:], place, ranges=True)
        if not parts:
            raise self._refusal(place, "the set is empty")
        written = ["-".join(map(literal, part)) if isinstance(part, tuple) else literal(part) for part in parts]
        ranges = _ranges(parts)
        text = f"[{'^' if negated else ''}{''.join(written)}]"
        return Node("one", text, ranges=without(ranges) if negated else ranges)

    def _characters(self, text: str, place: int, *, ranges: bool = False) -> list[str | tuple[str, str]]:
        """The characters of a text or a set; ranges: "a-z" is a pair."""
        found: list[str | tuple[str, str]] = []
        at = 0
        open_range = False
        while at < len(text):
            within = ranges and found and not open_range and at + 1 < len(text)
            if within and text[at] == "-" and isinstance(found[-1], str):
                open_range, at = True, at + 1
                continue
            character, at = self._character(text, at, place)
            if open_range:
                first = found.pop()
                if not isinstance(first, str) or first > character:
                    raise self._refusal(place, f"the range {first}-{character} runs backwards")
                found.append((first, character))
            else:
                found.append(character)
            open_range = False
        return found

    def _character(self, text: str, at: int, place: int) -> tuple[str, int]:
        if text[at] != "\\":
            return text[at], at + 1
        match = _ESCAPE.match(text, at)
        if match is None or (match[4] is not None and match[4] not in _LETTERS):
            raise self._refusal(place, f"the escape {text[at : at + 2]!r} is not known")
        if match[4] is not None:
            return _LETTERS[match[4]], match.end()
        code = int(match[1] or match[2] or match[3], 16)
        if code > 0x10FFFF or 0xD800 <= code < 0xE000:
            raise self._refusal(place, f"{match.group()!r} is no character")
        return chr(code), match.end()

    def _refusal(self, place: int, what: str) -> ArgumentError:
        line = self._text.count("\n", 0, place) + 1
        return ArgumentError(f"the grammar, line {line}: {what}")


def _ranges(parts: list[str | tuple[str, str]]) -> Ranges:
    return tuple((ord(part[0]), ord(part[-1])) for part in parts)
