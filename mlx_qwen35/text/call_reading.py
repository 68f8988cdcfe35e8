"""One way through the tags of a tool call: which of them are its own, and which are text of a value.

Knows a text that is there whole, its tags and the tools. calls.py has the ways and says when which of them is taken.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from mlx_qwen35.text.arguments import ToolSchemas
from mlx_qwen35.text.tags import Kind, Tag

OPENING, BARE = "<tool_call>", "<function="
FRAMES = ("</tool_call>", "</function>")
CALLABLE = re.compile(r"<function[=>\s]|\{")  # what makes a call of an opening tag
PREFIX = re.compile(r"(<(f(u(n(c(t(i(o(n)?)?)?)?)?)?)?)?)?$")  # what may become that
SPACE = re.compile(r"\s*")

_PAIRS = {Kind.CALL_END: Kind.CALL, Kind.FUNCTION_END: Kind.FUNCTION, Kind.PARAMETER_END: Kind.PARAMETER}
STRAY = {"function_invocation", "function_call", "function_calls", "invoke", "tool_calls", "tool"}


@dataclass(frozen=True)
class WrittenCall:
    """One call: its name, and its parameters as texts, or its arguments as JSON has them; raw: what was written."""

    name: str
    texts: dict[str, str] = field(default_factory=dict)
    values: dict[str, Any] | None = None
    raw: str = ""


class Unreadable(Exception):
    """A text is no call when it is read in some way; says why."""


@dataclass(frozen=True)
class Way:
    pairs: bool
    slips: bool


def follows(text: str, at: int, schemas: ToolSchemas) -> bool | None:
    """Whether what comes next is another call; None: that cannot be told yet, or the text ends here."""
    at = SPACE.match(text, at).end()
    rest = text[at : at + 300]
    if rest.startswith(OPENING):
        inner = SPACE.match(text, at + len(OPENING)).end()
        return True if CALLABLE.match(text, inner) else None if PREFIX.match(text, inner) else False
    if OPENING.startswith(rest) or BARE.startswith(rest):
        return None
    if rest.startswith(BARE):
        name, closed, _ = rest[len(BARE) :].partition(">")
        return schemas.offers(name.strip()) if closed else None if "\n" not in rest else False
    return False


@dataclass
class _Value:
    """A value that is being read: its parameter, where its text begins, and what closed it last. run: where closing
    tags begin behind which nothing but white space came; closed: where such begin and end, words behind them or not.
    stray: where tags begin that close nothing, behind which nothing but white space came."""

    key: str
    start: int
    run: int | None = None
    closed: tuple[int, int] | None = None
    stray: int | None = None

    def forget(self) -> None:
        self.run = self.closed = self.stray = None


class Reading:
    """One way through the tags of a text; see the module for the ways. only: where the call has to end; None: the text
    does not grow any more."""

    def __init__(
        self, text: str, tags: list[Tag], schemas: ToolSchemas, way: Way, *, cut: bool, only: int | None
    ) -> None:
        self._text, self._schemas, self._way = text, schemas, way
        self._cut, self._only = cut, only
        self._tags = [tag for tag in tags if only is None or tag.end <= only]
        self._wrapped = text.startswith(OPENING)
        self._quoted = frozenset() if way.pairs else self._quoted_calls()

    def read(self) -> tuple[tuple[WrittenCall, ...], int]:
        """-> (the calls, where they end); raises Unreadable."""
        calls: list[WrittenCall] = []
        start, index, more = 0, int(self._wrapped), True
        while more:
            name, texts, index = self._function(index)
            index, end, more = self._frames(index)
            calls.append(WrittenCall(name, texts, raw=self._text[start:end]))
            start = end
        rest = Counter(tag.kind for tag in self._tags if tag.start >= end)
        if not self._way.pairs and any(rest[closing] > rest[opening] for closing, opening in _PAIRS.items()):
            raise Unreadable("tags are left over behind the call")
        return tuple(calls), end

    def _quoted_calls(self) -> frozenset[int]:
        """The tags of calls inside this one that have both their ends; the last end is its own, but for slips."""
        found: set[int] = set()
        opened: list[int] = []
        ends = [index for index, tag in enumerate(self._tags) if tag.kind is Kind.CALL_END]
        own = ends[-1] if ends and self._wrapped and not self._way.slips else len(self._tags)
        for index in range(int(self._wrapped), own):
            tag = self._tags[index]
            if tag.kind is Kind.CALL and self._opens_call(tag):
                opened.append(index)
            elif tag.kind is Kind.CALL_END and opened:
                start = opened.pop()
                if not opened:
                    found.update(range(start, index + 1))
        return frozenset(found)

    def _opens_call(self, tag: Tag) -> bool:
        return bool(CALLABLE.match(self._text, SPACE.match(self._text, tag.end).end()))

    def _next(self, index: int) -> Tag | None:
        return self._tags[index] if index < len(self._tags) else None

    def _start(self, index: int) -> int:
        """Where a tag begins; the end of the text where there is none."""
        return self._tags[index].start if index < len(self._tags) else len(self._text)

    def _blank(self, start: int, index: int) -> bool:
        """Whether only white space stands before a tag."""
        return not self._text[start : self._start(index)].strip()

    def _is_closed(self, tag: Tag) -> bool:
        return self._text.endswith(">", tag.start, tag.end)

    def _is_stray(self, tag: Tag) -> bool:
        return tag.kind is Kind.OTHER_END and tag.name in STRAY

    def _function(self, index: int) -> tuple[str, dict[str, str], int]:
        """-> (name, parameters, the tag that closes the function, or that stands in its place)"""
        opening = self._next(index)
        if opening is None:
            raise Unreadable("the reply ends before the call names a function")
        if opening.kind is not Kind.FUNCTION or not (opening.usual or self._way.slips):
            raise Unreadable("no function is named where a call begins")
        name, texts, names = opening.name, {}, self._schemas.names(opening.name)
        at, index = opening.end, index + 1
        words = False
        while True:
            tag, blank = self._next(index), self._blank(at, index)
            words = words or not blank
            if not blank and tag is None and self._text[at:].lstrip()[:1] == "<":
                raise Unreadable(f"the reply ends inside a tag of {name}")
            if not blank and (tag is None or not self._way.slips):
                raise Unreadable(f"words stand where a parameter of {name} or its end is due")
            if tag is None:
                self._check_end(name, texts, names)
                return name, texts, index
            if tag.kind is Kind.PARAMETER and tag.name not in texts and (tag.usual or self._way.slips):
                if names is not None and tag.name not in names:
                    names = None  # the names are not the tool's: whatever they are, they are what was written
                texts[tag.name], index = self._value(tag, index + 1, name, names, texts)
                at = self._start(index)
            elif tag.kind is Kind.FUNCTION_END or (
                self._way.slips and (texts or names == frozenset()) and tag.kind in (Kind.CALL_END, Kind.FUNCTION)
            ):
                if words and not texts:
                    raise Unreadable(f"words stand where a parameter of {name} is due")
                return name, texts, index
            elif self._way.slips and (tag.kind is Kind.PARAMETER_END or self._is_stray(tag)):
                at, index = tag.end, index + 1
            else:
                raise Unreadable(f"{self._text[tag.start : tag.end]} stands where {name} or its end is due")

    def _check_end(self, name: str, texts: dict[str, str], names: frozenset[str] | None) -> None:
        """Whether a function may end with the reply."""
        missing = sorted(self._schemas.required(name) - texts.keys())
        if missing:
            raise Unreadable(f"the reply ends before {', '.join(missing)} of {name}")
        if not self._way.slips or self._cut or not (texts or names == frozenset()):
            raise Unreadable(f"the reply ends before the end of {name}")

    def _frames(self, index: int) -> tuple[int, int, bool]:
        """-> (the tag of a further function, where this call ends, whether there is a further one)"""
        at, closed = self._start(index), False
        while (tag := self._next(index)) is not None and self._blank(at, index):
            if tag.kind is Kind.CALL_END and (closed or self._way.slips):
                return index + 1, self._past_doubled(tag.end), False
            if tag.kind is Kind.FUNCTION and self._way.slips and self._may_follow(tag):
                return index, at, True
            if tag.kind is not Kind.FUNCTION_END and not (closed and self._is_doubled(tag)):
                break
            closed, at, index = True, tag.end, index + 1
        if closed and not self._wrapped:
            return index, at, False
        if self._only is None and self._way.slips and not self._text[at:].strip():
            return index, at, False
        raise Unreadable("</tool_call> is missing, and something else follows")

    def _is_doubled(self, tag: Tag) -> bool:
        return self._is_stray(tag) or (self._way.slips and tag.kind is Kind.PARAMETER_END)

    def _may_follow(self, tag: Tag) -> bool:
        """Whether a function may be a second one."""
        return tag.fresh and (self._schemas.offers(tag.name) or not self._schemas.offers_any)

    def _value(
        self, opening: Tag, index: int, name: str, names: frozenset[str] | None, given: dict[str, str]
    ) -> tuple[str, int]:
        """-> (the text of a value, the first tag behind those that close it)"""
        value = _Value(opening.name, opening.end)
        pairs: list[Kind] = []
        at = opening.end
        doubted = False  # what ends a function was text, if the value goes on
        paired = False  # the last tag closed what was opened inside the value
        perhaps: tuple[str, int] | None = None
        while (tag := self._next(index)) is not None:
            if self._text[at : tag.start].strip():
                value.run, value.stray, paired = None, None, False
            if value.run is not None and not pairs and self._is_further(tag):
                if not self._way.slips:
                    raise Unreadable(f"{tag.name} stands behind a value of {name}, which has no end")
                return self._cut_out(value, value.run), index
            at = tag.end
            starts = (
                tag.kind is Kind.PARAMETER
                and tag.name not in given
                and tag.name != value.key
                and (names is None or tag.name in names)
                and (tag.fresh or value.run is not None)
                and (tag.usual or value.run is not None or not (opening.usual and self._is_closed(tag)))
            )
            if starts and not pairs and not (tag.usual or self._way.slips):
                raise Unreadable(f"{tag.name} of {name} has no usual tag")
            if index in self._quoted:
                value.forget()
            elif self._way.pairs and self._is_paired(tag, pairs, value, starts):
                value.forget()
                paired = tag.kind is Kind.PARAMETER_END and not pairs
            elif self._closes(tag, value):
                if self._way.slips and value.run is None and value.closed is not None and tag.fresh:
                    raise Unreadable(f"</parameter> stands inside {value.key} of {name}, or words behind its end")
                value.run = tag.start if value.run is None else value.run
                value.closed = (value.run, tag.end) if tag.fresh or value.closed else None
                paired = False
            elif value.run is not None and self._way.slips and self._is_stray(tag):
                value.closed = (value.run, tag.end)
            elif self._is_stray(tag) and tag.fresh:
                value.stray, value.run = tag.start if value.stray is None else value.stray, None
            elif starts:
                end = None if paired else self._end_of(value, tag)
                if end is None:
                    raise Unreadable(f"</parameter> is missing before {tag.name} of {name}")
                return self._cut_out(value, end), index
            else:
                ends = tag.kind in (Kind.FUNCTION_END, Kind.CALL_END)
                end = self._end_of(value, tag) if ends else None
                sure = None if end is None else self._ends_call(index)
                if sure and doubted and value.run is None:
                    raise Unreadable(f"</function> stands inside {value.key} of {name}, or words behind it")
                if sure:
                    return self._cut_out(value, end), index
                if sure is False and perhaps is None:
                    perhaps = self._cut_out(value, end), index
                doubted = doubted or (tag.kind is Kind.FUNCTION_END and value.run is not None)
                value.forget()
            index += 1
        if perhaps is not None:
            return perhaps
        if self._only is None and self._way.slips and value.run is not None and not self._text[at:].strip():
            return self._cut_out(value, value.run), index
        raise Unreadable(f"the reply ends inside {value.key} of {name}")

    def _is_further(self, tag: Tag) -> bool:
        """Whether another function begins with a tag, though the one before it has no end."""
        return (self._way.slips or not self._way.pairs) and tag.kind is Kind.FUNCTION and self._may_follow(tag)

    def _closes(self, tag: Tag, value: _Value) -> bool:
        """Whether a tag closes a value, if what follows it agrees."""
        another = self._way.slips and tag.kind is Kind.OTHER_END and tag.name == value.key and tag.fresh
        return tag.kind is Kind.PARAMETER_END or another

    def _end_of(self, value: _Value, tag: Tag) -> int | None:
        """Where a value ends if this tag is not of it; None: it cannot end before it."""
        if value.run is not None or not self._way.slips:
            return value.run
        if value.closed is not None:
            start, end = value.closed
            return start if "\n" not in self._text[end : tag.start].strip() else None
        return (tag.start if value.stray is None else value.stray) if tag.fresh else None

    def _is_paired(self, tag: Tag, pairs: list[Kind], value: _Value, starts: bool) -> bool:
        """Whether a tag is text because it opens something inside a value, or stands within that, or closes it."""
        closed = _PAIRS.get(tag.kind)
        if closed is not None:
            if closed not in pairs:
                return bool(pairs)
            while pairs.pop() is not closed:
                pass
            return True
        if tag.kind is Kind.CALL:
            opens = self._opens_call(tag)
        elif tag.kind is Kind.FUNCTION:
            opens = tag.fresh and tag.usual
        else:
            plain = value.run is None and not starts
            opens = tag.kind is Kind.PARAMETER and tag.fresh and tag.usual and (bool(pairs) or plain)
        if opens:
            pairs.append(tag.kind)
        return bool(pairs)

    def _ends_call(self, index: int) -> bool | None:
        """Whether a call ends with this tag behind a value: True; False: it may, if nothing else ends it later; None:
        it does not."""
        tag = self._tags[index]
        if tag.kind is Kind.CALL_END:
            return self._boundary(tag.end) if self._way.slips and self._wrapped else None
        at, index = tag.end, index + 1
        while (tag := self._next(index)) is not None and self._blank(at, index):
            if tag.kind is Kind.CALL_END:
                return self._boundary(tag.end)
            if tag.kind is Kind.FUNCTION and self._may_follow(tag) and not self._way.slips:
                raise Unreadable(f"{tag.name} stands behind another function in one <tool_call>")
            if tag.kind is Kind.FUNCTION and self._may_follow(tag):
                return True
            if tag.kind is not Kind.FUNCTION_END and not self._is_doubled(tag):
                break
            at, index = tag.end, index + 1
        if not self._wrapped:
            return self._boundary(at)
        return True if self._way.slips and self._only is None and not self._text[at:].strip() else None

    def _boundary(self, at: int) -> bool | None:
        """The same by what follows the last tag of a call."""
        if self._only is not None:
            return True if at == self._only else None
        rest = self._text[self._past_doubled(at) :].lstrip()
        if not rest or follows(rest, 0, self._schemas):
            return True
        if not self._way.pairs:
            return None
        return None if rest.startswith("</parameter>") else False

    def _past_doubled(self, at: int) -> int:
        """Behind tags that close what is closed already."""
        while self._only is None and (self._way.pairs or self._way.slips):
            after = SPACE.match(self._text, at).end()
            closer = next((tag for tag in FRAMES if self._text.startswith(tag, after)), None)
            if closer is None:
                break
            at = after + len(closer)
        return at

    def _cut_out(self, value: _Value, end: int) -> str:
        return without_line_ends(self._text[value.start : end])


def without_line_ends(value: str) -> str:
    """The template puts a value on lines of its own: one line end before it and one after belong to the tags."""
    value = value.removeprefix("\r\n") if value.startswith("\r\n") else value.removeprefix("\n")
    return value.removesuffix("\r\n") if value.endswith("\r\n") else value.removesuffix("\n")
