"""One tool call in growing text: where it ends, and what it names. Knows tags; knows no types and no events.

    <tool_call>
    <function=NAME>
    <parameter=KEY>
    VALUE, any text, several lines
    </parameter>
    ...
    </function>
    </tool_call>
"""

from __future__ import annotations

import re
from enum import Enum, auto

OPENING = "<tool_call>"

_SPACE = re.compile(r"\s*")
_VALUE_END = re.compile(r"</parameter>|</function>")
_LONGEST_VALUE_END = len("</parameter>")


class CallState(Enum):
    OPEN = auto()  # a beginning of a call: more text may complete it
    WHOLE = auto()
    BROKEN = auto()  # no call, whatever follows


class CallReader:
    """Reads the call that begins with the `<tool_call>` at the start of a text which may still grow.

    `advance(text)` gets the whole text every time, and looks only at what it has not passed yet. A `</parameter>` ends
    a value only where the call goes on as a call does (another parameter, or its end), so that values may quote tags.
    """

    def __init__(self) -> None:
        self.state = CallState.OPEN
        self.name: str | None = None
        self.parameters: dict[str, str] = {}
        self.end = 0  # of the call in the text, once it is WHOLE
        self._position = len(OPENING)
        self._value_start = 0
        self._key = ""
        self._read = self._read_function

    def advance(self, text: str) -> CallState:
        while self.state is CallState.OPEN and self._read(text):
            pass
        return self.state

    # Each of these handles one place in the grammar. True: passed, go on with the next; False: more text is needed, or
    # the state has changed.

    def _read_function(self, text: str) -> bool:
        function = _named_tag(text, self._position, "<function=")
        if isinstance(function, CallState):
            self.state = function
            return False
        self.name, self._position = function
        self._read = self._read_body
        return True

    def _read_body(self, text: str) -> bool:
        parameter = _named_tag(text, self._position, "<parameter=")
        if isinstance(parameter, CallState):
            end = _end_of_call(text, self._position)
            if isinstance(end, int):
                self.state, self.end = CallState.WHOLE, end
            elif parameter is end is CallState.BROKEN:
                self.state = CallState.BROKEN
            return False
        self._key, self._position = parameter
        self._value_start = self._position
        self._read = self._read_value
        return True

    def _read_value(self, text: str) -> bool:
        found = _VALUE_END.search(text, self._position)
        if found is None:
            self._position = max(self._position, len(text) - _LONGEST_VALUE_END + 1)
            return False
        if found.group() == "</parameter>":
            rest = found.end()
            next_up = [_named_tag(text, rest, "<parameter="), _end_of_call(text, rest)]
        else:  # the model forgot </parameter>
            rest = found.start()
            next_up = [_end_of_call(text, rest)]
        if all(there is CallState.BROKEN for there in next_up):
            self._position = found.end()  # text of the value that looks like a tag
            return True
        if all(isinstance(there, CallState) for there in next_up):
            return False
        self.parameters[self._key] = _without_line_ends(text[self._value_start : found.start()])
        self._position = rest
        self._read = self._read_body
        return True


def _tag(text: str, position: int, tag: str) -> int | CallState:
    """Where `tag` ends, if it comes next after white space; OPEN if the text ends before that can be told."""
    position = _SPACE.match(text, position).end()
    if text.startswith(tag, position):
        return position + len(tag)
    return CallState.OPEN if tag.startswith(text[position : position + len(tag)]) else CallState.BROKEN


def _end_of_call(text: str, position: int) -> int | CallState:
    """Where `</function></tool_call>` ends, if it comes next. A forgotten `</function>` is forgiven."""
    after = _tag(text, position, "</function>")
    if isinstance(after, CallState):
        bare = _tag(text, position, "</tool_call>")
        return after if bare is CallState.BROKEN else bare
    return _tag(text, after, "</tool_call>")


def _named_tag(text: str, position: int, opening: str) -> tuple[str, int] | CallState:
    """(name, where the tag ends) of `<function=NAME>` or `<parameter=NAME>`, if it comes next."""
    start = _tag(text, position, opening)
    if isinstance(start, CallState):
        return start
    for at in range(start, len(text)):
        if text[at] == ">":
            name = text[start:at].strip()
            return (name, at + 1) if name else CallState.BROKEN
        if text[at] in "<\r\n":
            return CallState.BROKEN
    return CallState.OPEN


def _without_line_ends(value: str) -> str:
    """The template puts a value on lines of its own: one line end before it and one after belong to the tags."""
    return value.removeprefix("\n").removesuffix("\n")
