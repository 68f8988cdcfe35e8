"""The tags of tool calls in growing text. Knows how they are spelled; knows nothing of what they mean together.

Besides the family's own spelling <function=NAME> and <parameter=NAME> read what models make of it: a name in quotes, as
an attribute (<function name="NAME">), between tags (<function>NAME</function>), or without the > at a line's end.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum, auto

_TAG = re.compile(
    r"(?P<call></?tool_call>)"
    r"|<(?P<kind>function|parameter)(?:[ \t]*=|[ \t]+name[ \t]*=)(?P<name>[^<>\r\n]*)(?P<end>>|(?=\r?\n))"
    r"|<function>[ \t]*(?P<inner>[^<>\s]+)[ \t]*</function>"
    r"|</(?P<closed>[A-Za-z_][\w.:-]*)[ \t]*>"
)
_LONGEST = 300  # characters that a tag may have


class Kind(Enum):
    CALL = auto()
    CALL_END = auto()
    FUNCTION = auto()
    FUNCTION_END = auto()
    PARAMETER = auto()
    PARAMETER_END = auto()
    OTHER_END = auto()  # </anything else>


_ENDS = {"function": Kind.FUNCTION_END, "parameter": Kind.PARAMETER_END}


@dataclass(frozen=True)
class Tag:
    """One tag: text[start:end]. name: of a function or parameter, or of what OTHER_END closes. fresh: nothing but
    white space stands before it on its line. usual: it is written as the family writes it."""

    kind: Kind
    start: int
    end: int
    name: str = ""
    fresh: bool = False
    usual: bool = True


class Tags:
    """The tags of a text that grows; each is found once, however the text is cut. position: before it nothing will be a
    tag that is not found yet."""

    def __init__(self) -> None:
        self.found: list[Tag] = []
        self.position = 0

    def advance(self, text: str, *, final: bool = False) -> None:
        """text: all of it, from its beginning; final: it does not grow any more."""
        while True:
            at = text.find("<", self.position)
            if at < 0:
                self.position = len(text)
                return
            match = _TAG.match(text, at, at + _LONGEST)
            if match is None:
                if not final and _may_grow(text[at : at + _LONGEST]):
                    self.position = at
                    return
                self.position = at + 1
                continue
            tag = _tag(match, text)
            if tag is not None:
                self.found.append(tag)
            self.position = match.end() if tag is not None else at + 1


def _may_grow(rest: str) -> bool:
    """Whether more text could make a tag of `rest`, which begins with "<"."""
    open_yet = ">" not in rest or rest.startswith("<function>")
    return open_yet and len(rest) < _LONGEST and "\n" not in rest


def _tag(match: re.Match[str], text: str) -> Tag | None:
    start, end = match.span()
    line = text.rfind("\n", 0, start) + 1
    fresh = not text[line:start].strip()
    if match["call"]:
        return Tag(Kind.CALL_END if match["call"].startswith("</") else Kind.CALL, start, end, fresh=fresh)
    if match["closed"]:
        name = match["closed"]
        return Tag(_ENDS.get(name, Kind.OTHER_END), start, end, name, fresh)
    if match["inner"]:
        return Tag(Kind.FUNCTION, start, end, match["inner"], fresh, usual=False)
    written = match["name"].strip()
    name = written.strip("\"'").strip()
    if not name or (not match["end"] and re.search(r"\s", name)):
        return None
    kind = Kind.FUNCTION if match["kind"] == "function" else Kind.PARAMETER
    usual = match.group().startswith(f"<{match['kind']}=") and bool(match["end"]) and name == written
    return Tag(kind, start, end, name, fresh, usual)
