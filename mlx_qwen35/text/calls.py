"""Tool calls in growing text: where they end, what they name and with which arguments.

    <tool_call>
    <function=NAME>
    <parameter=KEY>
    VALUE, any text, several lines
    </parameter>
    ...
    </function>
    </tool_call>

A value may hold tags, whole calls too, and models leave tags out, double them and put others in. So the tools that
were offered decide: inside a value a parameter begins only where its name is one of the function's and was not given
yet. The text is read in up to four ways, and the first that makes a call of it counts:

    as it is written       calls and parameters inside a value are text together with what closes them; a value ends
                           where </parameter> is followed by a parameter or by </function></tool_call>
    without pairs          as it is written, where a value holds a tag that nothing closes, and that could begin nothing
    with slips             </parameter> or </function> left out, other closing tags, words between parameters, a name
                           without its >, several functions in one <tool_call>, frames missing at the end of the reply
    the last two together

Where a call ends is certain only by what follows it: the end of the reply, or another call. Only a call that is read
as it is written is given out before the reply ends; everything else waits for that. A value that ends in </parameter>
is read as one with its tag doubled. What cannot be read in any way is no call. Knows tags and names; types are
arguments.py's.
"""

from __future__ import annotations

from dataclasses import replace
from enum import Enum, auto

from mlx_qwen35.text.arguments import ToolSchemas
from mlx_qwen35.text.call_json import read_json
from mlx_qwen35.text.call_reading import (
    CALLABLE,
    FRAMES,
    OPENING,
    PREFIX,
    SPACE,
    Reading,
    Unreadable,
    Way,
    WrittenCall,
    follows,
)
from mlx_qwen35.text.tags import Kind, Tags

__all__ = ["OPENING", "CallReader", "CallState", "WrittenCall"]

_AS_WRITTEN = Way(pairs=True, slips=False)
_WAYS = (_AS_WRITTEN, Way(pairs=False, slips=False), Way(pairs=True, slips=True), Way(pairs=False, slips=True))


class CallState(Enum):
    OPEN = auto()  # more text may complete it
    WHOLE = auto()
    BROKEN = auto()  # no call, whatever follows


class CallReader:
    """Reads the calls that stand at the start of a text which may still grow: those of one <tool_call>, or of one
    <function=...> that has none.

    `advance(text)` gets the whole text every time, and looks only at what it has not passed yet; `finish` once nothing
    follows. After WHOLE: `calls`, and `end`, where they end in the text. After finish() is BROKEN: `reason`, and
    `name`, that of the call if it was read. tags: those of the text so far.
    """

    def __init__(self, schemas: ToolSchemas) -> None:
        self._schemas = schemas
        self.tags = Tags()
        self._looked = 0  # tags whose surroundings are known
        self._judged = 0  # the same, of ended_before()
        self.calls: tuple[WrittenCall, ...] = ()
        self.end = 0
        self.reason = ""
        self.begun = False  # it has begun as a call does

    @property
    def name(self) -> str | None:
        first = next((tag for tag in self.tags.found if tag.kind is Kind.FUNCTION), None)
        return first.name if first else None

    def advance(self, text: str) -> CallState:
        state = self._begins(text)
        if state is not None:
            return state
        self.tags.advance(text)
        start = self._json_start(text)
        if start is not None:
            return self._advance_json(text, start, final=False)
        found = self.tags.found
        ending = Kind.CALL_END if text.startswith(OPENING) else Kind.FUNCTION_END
        while self._looked < len(found):
            tag = found[self._looked]
            if tag.kind is ending:
                after = follows(text, tag.end, self._schemas)
                if after is None:
                    return CallState.OPEN
                if after and self._read(text, _AS_WRITTEN, only=tag.end):
                    return CallState.WHOLE
            self._looked += 1
        return CallState.OPEN

    @property
    def waits(self) -> bool:
        """Whether the next character, whichever it is, may decide."""
        return not self.begun or self._looked < len(self.tags.found)

    def ended_before(self, text: str, but: str) -> bool:
        """Whether a call that is as it should be ends in the text, before that which advance() found if it found one,
        and is followed by something else than a call, or `but`, or a beginning of them."""
        found = self.tags.found
        while self._judged < len(found) and not 0 < self.end <= found[self._judged].end:
            tag = found[self._judged]
            if tag.kind is Kind.CALL_END:
                after = SPACE.match(text, tag.end).end()
                another = follows(text, tag.end, self._schemas)
                if another is None or but.startswith(text[after : after + len(but)]):
                    return False
                if not another and self._read(text, _AS_WRITTEN, only=tag.end):
                    return True
            self._judged += 1
        return False

    def finish(self, text: str, *, cut: bool) -> CallState:
        """WHOLE or BROKEN, now that nothing follows. cut: the reply was ended by a limit, not by the model: frames that
        are missing may have stood for more."""
        state = self._begins(text, final=True)
        if state is not None:
            return state
        self.tags.advance(text, final=True)
        start = self._json_start(text)
        if start is not None:
            return self._advance_json(text, start, final=True)
        body = text[: len(text) - _partial_end(text)]
        for way in _WAYS:
            if self._read(body, way, cut=cut):
                if body != text and not body[self.end :].strip():
                    last = self.calls[-1]
                    self.calls = (*self.calls[:-1], replace(last, raw=last.raw + text[self.end :]))
                    self.end = len(text)
                return CallState.WHOLE
        return CallState.BROKEN

    def _begins(self, text: str, *, final: bool = False) -> CallState | None:
        """None: it begins as a call does."""
        if self.begun:
            return None
        wrapped = text.startswith(OPENING)
        at = SPACE.match(text, len(OPENING) if wrapped else 0).end()
        if CALLABLE.match(text, at):
            begun = wrapped or self._bare_begins(text, final)
            self.begun = bool(begun)
            return None if begun else CallState.BROKEN if begun is False else CallState.OPEN
        if not PREFIX.match(text, at):
            return CallState.BROKEN
        self.begun, self.reason = final and wrapped, "the reply ends before the call names a function"
        return CallState.BROKEN if final else CallState.OPEN

    def _bare_begins(self, text: str, final: bool) -> bool | None:
        """A function without <tool_call> is one that is offered, followed by what a call has; None: not known yet."""
        self.tags.advance(text, final=final)
        if not self.tags.found:
            return None if not final and len(text) < 300 and "\n" not in text.strip() else False
        first = self.tags.found[0]
        if first.kind is not Kind.FUNCTION or first.start or not self._schemas.offers(first.name):
            return False
        rest = text[SPACE.match(text, first.end).end() :]
        if any(rest.startswith(word) for word in ("<parameter", "</function>", "{")):
            return True
        more = any(word.startswith(rest) for word in ("<parameter", "</function>", "{"))
        return None if more and not final else False

    # A body in JSON

    def _json_start(self, text: str) -> int | None:
        """Where JSON begins: behind <tool_call>, or behind the function's tag; None: the body is no JSON."""
        at = SPACE.match(text, len(OPENING) if text.startswith(OPENING) else 0).end()
        if text.startswith("{", at):
            return at
        first = self.tags.found[1:2] if text.startswith(OPENING) else self.tags.found[:1]
        if not first or first[0].kind is not Kind.FUNCTION:
            return None
        at = SPACE.match(text, first[0].end).end()
        return at if text.startswith("{", at) else None

    def _advance_json(self, text: str, start: int, *, final: bool) -> CallState:
        found = self.tags.found
        if final or any(tag.kind in (Kind.CALL_END, Kind.FUNCTION_END) for tag in found[self._looked :]):
            self._looked = len(found)
            try:
                self.calls, self.end = read_json(text, start, found, self._schemas, final)
                return CallState.WHOLE
            except Unreadable as error:
                self.reason = str(error)
        return CallState.BROKEN if final else CallState.OPEN

    def _read(self, text: str, way: Way, *, only: int | None = None, cut: bool = False) -> bool:
        """Whether the text is a call when it is read in a way; only: and if it ends there."""
        try:
            calls, end = Reading(text, self.tags.found, self._schemas, way, cut=cut, only=only).read()
        except Unreadable as error:
            self.reason = str(error)
            return False
        if only is not None and end != only:
            return False
        self.calls, self.end = calls, end
        return True


def _partial_end(text: str) -> int:
    """How many characters at the end of a text begin a tag that would close a call."""
    at = text.rfind("<", max(0, len(text) - len("</tool_call>") + 1))
    rest = text[at:] if at >= 0 else ""
    return len(rest) if rest and any(tag.startswith(rest) and tag != rest for tag in FRAMES) else 0
