"""Takes a reply apart while it streams: reasoning, content, tool calls. Knows the family's reply format.

Knows nothing of tokens: it is fed text, cut anywhere, and the cuts never change what comes out. The format:

    reasoning            the prompt mostly ends with "<think>\\n"; if not, the reply may open with <think> itself
    </think>
                         white space around reasoning and content is not part of them (the template trims it)
    content              a </think> at its beginning or end closes nothing, and is not part of it either
                         tool calls (calls.py), usually last; white space before and between them is not content
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from mlx_qwen35.text.arguments import ToolSchemas
from mlx_qwen35.text.calls import OPENING, CallReader, CallState
from mlx_qwen35.text.stop import partial_suffix

_THINK, _THINK_END = "<think>", "</think>"


@dataclass(frozen=True)
class ReasoningDelta:
    text: str


@dataclass(frozen=True)
class ContentDelta:
    text: str


@dataclass(frozen=True)
class ToolCall:
    """A whole call. arguments: typed by the tool's schema, raw text where that cannot be; raw: the call as the model
    wrote it, tags and all; index: 0 for the first call of the reply."""

    name: str
    arguments: dict[str, Any]
    raw: str
    index: int


@dataclass(frozen=True)
class IncompleteCall:
    """The reply ended inside a call. `raw`, what there is of it, was also given out as content (or reasoning, if it
    stands there); name: None if the end came before it."""

    name: str | None
    raw: str


Event = ReasoningDelta | ContentDelta | ToolCall | IncompleteCall


@dataclass(frozen=True)
class Reply:
    reasoning: str
    content: str
    tool_calls: tuple[ToolCall, ...]
    incomplete_call: IncompleteCall | None = None

    @classmethod
    def from_events(cls, events: Iterable[Event]) -> Reply:
        events = list(events)
        return cls(
            reasoning="".join(event.text for event in events if isinstance(event, ReasoningDelta)),
            content="".join(event.text for event in events if isinstance(event, ContentDelta)),
            tool_calls=tuple(event for event in events if isinstance(event, ToolCall)),
            incomplete_call=next((event for event in events if isinstance(event, IncompleteCall)), None),
        )


def parse_reply(text: str, *, thinking: bool = False, tools: Iterable[Any] | None = None) -> Reply:
    """The whole reply at once. thinking: whether the prompt ended inside <think> (Prompt.thinking)."""
    parser = ReplyParser(thinking=thinking, tools=tools)
    # In pieces, because each tag costs a copy of what was fed and is not yet decided.
    events = [event for at in range(0, len(text), 1024) for event in parser.feed(text[at : at + 1024])]
    return Reply.from_events(events + parser.finish())


class ReplyParser:
    """Feed it the text of one reply as it comes, then `finish` it once.

    Held back is only what may still turn out to be a tag or a call, and white space until something follows it.
    A call that is no call after all (a stray tag, a broken one) stays content. A call inside the reasoning is text,
    unless the reply ends with it: then the model forgot to close its reasoning, and means it.
    """

    def __init__(self, *, thinking: bool, tools: Iterable[Any] | None = None):
        self._schemas = ToolSchemas(tools)
        self._thinking = thinking
        self._text = ""  # fed, not yet decided about
        self._space = ""  # white space (and stray tags) after what was given out: dropped if nothing follows
        self._begun = False  # something of the present part (reasoning, content) was given out
        self._call = CallReader()
        self._reasoned: list[tuple[CallReader, str]] = []  # calls inside the reasoning and their text
        self._reasoned_text = ""  # the same with the white space between them
        self._calls = 0
        self._events: list[Event] = []
        self._read = self._read_opening

    def feed(self, text: str) -> list[Event]:
        """The events that are certain now; of two deltas in a row there is one."""
        self._text += text
        while self._text and self._read():
            pass
        return self._take_events()

    def finish(self, *, cut: bool = False) -> list[Event]:
        """The events of what was held back, now that nothing follows. cut: more would have; then a tag is not known to
        be the end, and stays."""
        if self._read == self._read_call:
            self._give(ContentDelta, self._text)
            self._events.append(IncompleteCall(self._call.name, self._text))
        elif self._read == self._read_reasoned_call:
            self._give(ReasoningDelta, self._reasoned_text + self._text)
            self._events.append(IncompleteCall(self._call.name, self._text))
        elif self._read == self._read_after_reasoned_call and not self._text.strip():
            for call, raw in self._reasoned:
                self._give_call(call, raw)
        elif self._in_reasoning():
            self._give(ReasoningDelta, self._reasoned_text + self._text)
        else:
            self._give(ContentDelta, self._text)
            if cut and self._begun and self._space.strip():
                self._add_delta(ContentDelta, self._space.rstrip())
        self._text = ""
        return self._take_events()

    # Each of these handles one place in the format, on a self._text that is not empty. True: passed, go on with the
    # next; False: more text is needed.

    def _read_opening(self) -> bool:
        """The very beginning, where <think> is a tag (also one that repeats the prompt's)."""
        text = self._text.lstrip()
        if text.startswith(_THINK):
            self._text = text[len(_THINK) :]
            self._read = self._read_reasoning
            return True
        if _THINK.startswith(text):
            return False
        self._read = self._read_reasoning if self._thinking else self._read_content
        return True

    def _read_reasoning(self) -> bool:
        at, tag = self._give_until_tag(ReasoningDelta, _THINK_END, OPENING)
        if tag == _THINK_END:
            self._text = self._text[at + len(tag) :]
            self._space, self._begun = "", False
            self._read = self._read_content
        elif tag == OPENING:
            self._start_call(at, self._read_reasoned_call)
        return tag is not None

    def _read_content(self) -> bool:
        if not self._begun:
            text = self._text.lstrip()
            if text.startswith(_THINK_END):
                self._text = text[len(_THINK_END) :]
                return True
            if _THINK_END.startswith(text):
                return False
        at, tag = self._give_until_tag(ContentDelta, OPENING, held=_THINK_END)
        if tag is not None:
            self._start_call(at, self._read_call)
        return tag is not None

    def _read_call(self) -> bool:
        state = self._call.advance(self._text)
        if state is CallState.BROKEN:
            self._give(ContentDelta, OPENING)
            self._text = self._text[len(OPENING) :]
            self._read = self._read_content
        elif state is CallState.WHOLE:
            self._give_call(self._call, self._text[: self._call.end])
            self._text = self._text[self._call.end :]
            self._read = self._read_after_call
        return state is not CallState.OPEN

    def _read_after_call(self) -> bool:
        self._text = self._text.lstrip()
        if self._text:
            self._read = self._read_content
        return bool(self._text)

    def _read_reasoned_call(self) -> bool:
        state = self._call.advance(self._text)
        passed = self._text[: self._call.end] if state is CallState.WHOLE else self._text
        if state is CallState.BROKEN or _THINK_END in passed:
            self._give_reasoned(OPENING)
            self._text = self._text[len(OPENING) :]
            self._read = self._read_reasoning
            return True
        if state is CallState.WHOLE:
            self._reasoned.append((self._call, passed))
            self._reasoned_text += passed
            self._text = self._text[self._call.end :]
            self._read = self._read_after_reasoned_call
        return state is CallState.WHOLE

    def _read_after_reasoned_call(self) -> bool:
        text = self._text.lstrip()
        if text.startswith(OPENING):
            at = len(self._text) - len(text)
            self._reasoned_text += self._text[:at]
            self._start_call(at, self._read_reasoned_call)
            return True
        if OPENING.startswith(text):
            return False
        self._give_reasoned("")
        self._read = self._read_reasoning
        return True

    def _in_reasoning(self) -> bool:
        opening = self._thinking and self._read == self._read_opening
        return opening or self._read in (self._read_reasoning, self._read_after_reasoned_call)

    def _start_call(self, at: int, read: Any) -> None:
        self._text = self._text[at:]
        self._call = CallReader()
        self._read = read

    def _give_until_tag(self, kind: type, *tags: str, held: str = "") -> tuple[int, str | None]:
        """Gives out the text before the first of `tags`, or, if there is none, all that cannot begin one, or `held`."""
        found = [(at, tag) for tag in tags if (at := self._text.find(tag)) >= 0]
        if found:
            at, tag = min(found)
            self._give(kind, self._text[:at])
            return at, tag
        at = len(self._text) - max(partial_suffix(self._text, tag) for tag in (*tags, held))
        self._give(kind, self._text[:at])
        self._text = self._text[at:]
        return 0, None

    def _give(self, kind: type, text: str) -> None:
        text = self._space + text
        if not self._begun:
            text = text.lstrip()
        shown = text.rstrip()
        while kind is ContentDelta and shown.endswith(_THINK_END):
            shown = shown.removesuffix(_THINK_END).rstrip()
        self._space = text[len(shown) :]
        if not shown:
            return
        self._begun = True
        self._add_delta(kind, shown)

    def _add_delta(self, kind: type, text: str) -> None:
        if self._events and type(self._events[-1]) is kind:
            text = self._events.pop().text + text
        self._events.append(kind(text))

    def _give_reasoned(self, more: str) -> None:
        self._give(ReasoningDelta, self._reasoned_text + more)
        self._reasoned_text = ""
        self._reasoned = []

    def _give_call(self, call: CallReader, raw: str) -> None:
        arguments = self._schemas.arguments(call.name, call.parameters)
        self._events.append(ToolCall(call.name, arguments, raw, self._calls))
        self._calls += 1

    def _take_events(self) -> list[Event]:
        events, self._events = self._events, []
        return events
