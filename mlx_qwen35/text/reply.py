"""Takes a reply apart while it streams: reasoning, content, tool calls. Knows the family's reply format.

Knows nothing of tokens: it is fed text, cut anywhere, and the cuts never change what comes out. The format:

    reasoning            the prompt mostly ends with "<think>\\n"; if not, the reply may open with <think> itself
    </think>
                         white space around reasoning and content is not part of them (the template trims it)
    content              a </think> at its beginning or end closes nothing, and is not part of it either
                         tool calls (calls.py), usually last; white space before and between them is not content

Calls that stand inside the reasoning are text, unless nothing but its end follows them: then they are meant.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from mlx_qwen35.text.arguments import ToolSchemas
from mlx_qwen35.text.call_pieces import CallPieces
from mlx_qwen35.text.calls import OPENING, CallReader, CallState, WrittenCall
from mlx_qwen35.text.stop import partial_suffix

_THINK, _THINK_END = "<think>", "</think>"
_BARE = "<function"  # a call that lacks <tool_call> begins with it, on a line of its own
_MANY = 4096  # characters that a call may grow by before it is looked at again
_PIECE = 16  # the same, where pieces of calls are wanted


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
class CallDelta:
    """A piece of a call that is being written, where they were asked for: of the JSON of its arguments (`as_json` of
    call_pieces.py). The pieces of an index are a beginning of what its ToolCall has; only where the reply breaks off
    inside it no ToolCall follows, but an IncompleteCall. name: of the function; index: as ToolCall has it."""

    name: str
    arguments: str
    index: int


@dataclass(frozen=True)
class IncompleteCall:
    """What begins as a call and cannot be read as one, mostly because the reply ended inside it. `raw`, what there is
    of it, was also given out as content (or reasoning, if it stands there); name: None if it is not known; reason: why
    it is no call."""

    name: str | None
    raw: str
    reason: str = ""


Event = ReasoningDelta | ContentDelta | ToolCall | CallDelta | IncompleteCall


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


def parse_reply(text: str, *, thinking: bool = False, tools: Iterable[Any] | None = None, cut: bool = False) -> Reply:
    """The whole reply at once. thinking: whether the prompt ended inside <think> (Prompt.thinking); cut: as in
    ReplyParser.finish."""
    parser = ReplyParser(thinking=thinking, tools=tools)
    # In pieces, because each tag costs a copy of what was fed and is not yet decided.
    events = [event for at in range(0, len(text), 1024) for event in parser.feed(text[at : at + 1024])]
    return Reply.from_events(events + parser.finish(cut=cut))


class ReplyParser:
    """Feed it the text of one reply as it comes, then `finish` it once.

    Held back is only what may still turn out to be a tag or a call, a call until something follows that shows where it
    ended, and white space until something follows it. A call that is no call after all (a stray tag, a broken one)
    stays content.
    """

    def __init__(
        self, *, thinking: bool, tools: Iterable[Any] | None = None, continued: str = "", call_pieces: bool = False
    ):
        """continued: what stands in the prompt of the reasoning or content that the reply goes on with. call_pieces:
        calls are told while they are written, too (CallDelta)."""
        self._schemas = ToolSchemas(tools)
        self._thinking = thinking
        self._text = ""  # fed, not yet decided about
        self._more: list[str] = []  # fed after it, and not looked at yet
        self._space = ""  # white space (and stray tags) after what was given out: dropped if nothing follows
        self._begun = False  # something of the present part (reasoning, content) was given out
        self._fresh = True  # and nothing but white space of its present line
        self._call = CallReader(self._schemas)
        self._call_pieces = call_pieces
        self._pieces: CallPieces | None = None  # of the call
        self._passed = 0  # of calls inside the reasoning, characters of those that are whole
        self._calls = 0
        self._events: list[Event] = []
        self._read = self._read_opening
        if continued.strip():
            self._begun, self._fresh = True, not continued.rpartition("\n")[2].strip()
            self._read = self._read_reasoning if thinking else self._read_content
        self._final = self._cut = False

    def feed(self, text: str) -> list[Event]:
        """The events that are certain now; of two deltas in a row there is one."""
        self._more.append(text)
        in_call = self._read in (self._read_call, self._read_reasoned_call)
        many = _MANY if self._pieces is None else _PIECE
        if in_call and not self._call.waits and ">" not in text and sum(map(len, self._more)) < many:
            return []
        self._text += "".join(self._more)
        self._more.clear()
        while self._text and self._read():
            pass
        return self._take_events()

    def finish(self, *, cut: bool = False) -> list[Event]:
        """The events of what was held back, now that nothing follows. cut: a limit ended the reply and not the model: a
        call whose last tags are missing is incomplete then, and a tag at the end is not known to close nothing."""
        self._text += "".join(self._more)
        self._more.clear()
        self._final, self._cut = True, cut
        while self._text and self._read():
            pass
        if cut and self._begun and self._space.strip():
            self._add_delta(ContentDelta, self._space.rstrip())
        return self._take_events()

    # Each of these handles one place in the format, on a self._text that is not empty. True: passed, go on with the
    # next; False: more text is needed, and once there is none, the end was reached.

    def _read_opening(self) -> bool:
        """The very beginning, where <think> is a tag (also one that repeats the prompt's)."""
        text = self._text.lstrip()
        if text.startswith(_THINK):
            self._text = text[len(_THINK) :]
            self._read = self._read_reasoning
            return True
        if _THINK.startswith(text) and not self._final:
            return False
        self._read = self._read_reasoning if self._thinking else self._read_content
        return True

    def _read_reasoning(self) -> bool:
        at, tag = self._give_until_tag(ReasoningDelta, _THINK_END, OPENING)
        if tag == _THINK_END:
            self._end_reasoning(at)
        elif tag == OPENING:
            self._start_call(at, self._read_reasoned_call)
        return tag is not None

    def _end_reasoning(self, at: int) -> None:
        self._text = self._text[at + len(_THINK_END) :]
        self._space, self._begun, self._fresh = "", False, True
        self._read = self._read_content

    def _read_content(self) -> bool:
        if not self._begun:
            text = self._text.lstrip()
            if text.startswith(_THINK_END):
                self._text = text[len(_THINK_END) :]
                return True
            if _THINK_END.startswith(text) and not self._final:
                return False
        at, tag = self._give_until_tag(ContentDelta, OPENING, _BARE, held=_THINK_END)
        if tag == _BARE and not self._fresh:
            self._give(ContentDelta, _BARE)
            self._text = self._text[at + len(_BARE) :]
        elif tag is not None:
            self._start_call(at, self._read_call)
        return tag is not None

    def _read_call(self) -> bool:
        if self._final:
            state = self._call.finish(self._text, cut=self._cut)
        else:
            state = self._call.advance(self._text)
        if state is CallState.WHOLE:
            self._give_calls(self._call.calls)
            self._text = self._text[self._call.end :]
            self._read = self._read_after_call
        elif state is CallState.BROKEN and self._final and self._call.begun:
            if not (self._cut and self._pieces is not None and self._pieces.name):  # or it was told already
                self._give(ContentDelta, self._text)
            self._give_incomplete(self._text)
        elif state is CallState.BROKEN:
            opening = OPENING if self._text.startswith(OPENING) else _BARE
            self._give(ContentDelta, opening)
            self._text = self._text[len(opening) :]
            self._read = self._read_content
        elif self._pieces is not None and (new := self._pieces.advance(self._text, self._call.tags)):
            self._events.append(CallDelta(self._pieces.name, new, self._calls))
        return state is not CallState.OPEN

    def _read_after_call(self) -> bool:
        self._text = self._text.lstrip()
        if self._text:
            self._fresh = True
            self._read = self._read_content
        return bool(self._text)

    def _read_reasoned_call(self) -> bool:
        """Calls inside the reasoning: held back as long as nothing else follows them."""
        end = self._text.find(_THINK_END)
        if self._is_pondered(self._text if end < 0 else self._text[:end]):
            self._give(ReasoningDelta, OPENING)
            self._text = self._text[len(OPENING) :]
            self._read = self._read_reasoning
            return True
        if end >= 0 and self._text[end + len(_THINK_END) :].strip():
            self._give(ReasoningDelta, self._text[:end])
            self._end_reasoning(end)
            return True
        if self._final:
            self._end_with_reasoned_calls(self._text if end < 0 else self._text[:end])
        return False

    def _is_pondered(self, text: str) -> bool:
        """Whether the text cannot be calls alone any more, however it goes on."""
        while True:
            rest = text[self._passed :].lstrip()
            if OPENING.startswith(rest) or _THINK_END.startswith(rest):
                return False
            if not rest.startswith(OPENING):
                return True
            state = self._call.advance(rest)
            if state is CallState.BROKEN or self._call.ended_before(rest, _THINK_END):
                return True
            if state is CallState.OPEN:
                return False
            self._passed = len(text) - len(rest) + self._call.end
            self._call = CallReader(self._schemas)

    def _end_with_reasoned_calls(self, text: str) -> None:
        """The reply ends with what may be calls inside its reasoning: they are meant if all of it can be read."""
        rest, calls = text, []
        while rest.strip():
            self._call = CallReader(self._schemas)
            space = len(rest) - len(rest.lstrip())
            if self._call.finish(rest[space:], cut=self._cut) is not CallState.WHOLE:
                self._give(ReasoningDelta, text)
                if self._call.begun:
                    self._give_incomplete(rest[space:])
                self._text = ""
                return
            calls += self._call.calls
            rest = rest[space + self._call.end :]
        self._give_calls(calls)
        self._text = ""

    def _start_call(self, at: int, read: Any) -> None:
        self._text = self._text[at:]
        self._call, self._passed = CallReader(self._schemas), 0
        self._pieces = CallPieces(self._schemas) if self._call_pieces and read == self._read_call else None
        self._read = read

    def _give_until_tag(self, kind: type, *tags: str, held: str = "") -> tuple[int, str | None]:
        """Gives out the text before the first of `tags`, or, if there is none, all that cannot begin one, or `held`."""
        found = [(at, tag) for tag in tags if (at := self._text.find(tag)) >= 0]
        if found:
            at, tag = min(found)
            self._give(kind, self._text[:at])
            return at, tag
        at = len(self._text)
        if not self._final:
            at -= max(partial_suffix(self._text, tag) for tag in (*tags, held))
        self._give(kind, self._text[:at])
        self._text = self._text[at:]
        return 0, None

    def _give(self, kind: type, text: str) -> None:
        line = text.rpartition("\n")
        self._fresh = (self._fresh or bool(line[1])) and not line[2].strip()
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

    def _give_incomplete(self, raw: str) -> None:
        self._events.append(IncompleteCall(self._call.name, raw, self._call.reason))
        self._text = ""

    def _give_calls(self, calls: Iterable[WrittenCall]) -> None:
        for call in calls:
            if call.values is None:
                arguments = self._schemas.arguments(call.name, call.texts)
            else:
                arguments = self._schemas.fitted(call.name, call.values)
            self._events.append(ToolCall(call.name, arguments, call.raw, self._calls))
            self._calls += 1

    def _take_events(self) -> list[Event]:
        events, self._events = self._events, []
        return events
