"""Answers on the screen or in a file: reasoning, content and tool calls told apart.

Knows parts and terminals. Knows nothing of how parts are made.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import textwrap
from typing import TYPE_CHECKING, Any, TextIO

from mlx_qwen35.text.cells import Pen, Style, harmless
from mlx_qwen35.text.drawing import Drawing

if TYPE_CHECKING:
    from mlx_qwen35.text.parts import Part
    from mlx_qwen35.text.reply import ToolCall

DIM, PLAIN = "\x1b[2m", "\x1b[0m"
_CODES = {"bold": "1", "dim": "2", "italic": "3", "underlined": "4", "struck": "9", "code": "36"}
_THINK_END = "</think>"
STATISTICS = (
    "prompt_tokens",
    "prompt_tps",
    "cached_tokens",
    "generation_tokens",
    "generation_tps",
    "peak_memory",
    "drafted_tokens",
    "accepted_tokens",
)


class Screen:
    """Shows the parts of one answer. A terminal gets Markdown drawn and reasoning dimmed, or, without colours, the text
    as it is and both under a word; a file gets the text, with reasoning between <think> and </think>. hide_thinking:
    the answer alone."""

    def __init__(self, out: TextIO | None = None, *, hide_thinking: bool = False) -> None:
        self._hides = hide_thinking
        self._out = sys.stdout if out is None else out
        self._terminal = self._out.isatty()
        self._colours = self._terminal and colours()
        self._pen = Pen(self._out.write, lambda: columns(self._out), escape if self._colours else lambda *styles: "")
        self._drawing = self._new_drawing()
        self._inside = ""  # "", "reasoning" or "content": what was written last
        self._reasoned = False
        self._tail = ""  # the end of what the model wrote

    def show(self, part: Part) -> None:
        self._tail = (self._tail + part.text)[-200:]
        for event in part.events:
            kind = type(event).__name__
            if kind == "ReasoningDelta":
                if not self._hides:
                    self._enter("reasoning")
                    self._write(event.text)
            elif kind == "ContentDelta":
                self._enter("content")
                self._write(event.text)
            elif kind == "ToolCall":
                self._enter("call")
                call = json.dumps(call_record(event), ensure_ascii=False)
                self._write(f"<tool_call>\n{call}\n</tool_call>\n")
        self._out.flush()

    def end(self) -> None:
        """Leaves the screen as a prompt wants it: plain, at the start of a line."""
        self._enter("")
        self._out.flush()

    def _enter(self, inside: str) -> None:
        if inside == self._inside:
            return
        if self._inside == "content" and self._colours:
            self._drawing.finish()
            self._drawing = self._new_drawing()
        self._pen.hang = 0
        self._pen.end()
        if self._inside == "reasoning":
            # It is not the screen's to say that reasoning has ended where the model did not.
            if not self._terminal and (inside or _THINK_END in self._tail):
                self._pen.verbatim(f"\n{_THINK_END}")
            self._pen.verbatim("\n\n" if inside else "\n")
            self._pen.column = 0
        elif self._pen.column:
            self._pen.end_line()
        if inside == "reasoning":
            self._reasoned = True
            self._label("<think>" if not self._terminal else "" if self._colours else "[thinking]")
        elif inside and self._reasoned and self._terminal and not self._colours:
            self._label("[answer]")
            self._reasoned = False
        self._inside = inside

    def _label(self, label: str) -> None:
        if label:
            self._pen.verbatim(label)
            self._pen.end_line()

    def _write(self, text: str) -> None:
        if not self._terminal:
            self._pen.verbatim(text)
            self._pen.column = 0 if text.endswith("\n") else 1
        elif self._colours and self._inside == "content":
            self._drawing.feed(harmless(text))
        else:
            self._pen.put(harmless(text), frozenset({"dim"} if self._inside == "reasoning" else ()))

    def _new_drawing(self) -> Drawing:
        return Drawing(self._pen, can_show=self._can_show)

    def _can_show(self, text: str) -> bool:
        try:
            text.encode(getattr(self._out, "encoding", None) or "utf-8")
        except (UnicodeError, LookupError):
            return False
        return True


def colours() -> bool:
    """Whether a terminal may be sent escape sequences. NO_COLOR: https://no-color.org"""
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def note(text: str) -> None:
    """Prints a text on standard error, on a terminal with lines broken between words."""
    if sys.stderr.isatty():
        wide = max(columns(sys.stderr), 10)
        text = "\n".join(textwrap.fill(line, wide, break_on_hyphens=False) for line in text.splitlines())
    print(text, file=sys.stderr)


def columns(out: TextIO) -> int:
    """Of the terminal that is written to."""
    try:
        return os.get_terminal_size(out.fileno()).columns or 80
    except (OSError, ValueError, AttributeError):
        return shutil.get_terminal_size().columns


def escape(before: Style, style: Style) -> str:
    """What changes a terminal from one style to another."""
    if not style:
        return PLAIN
    return "\x1b[" + ";".join([*(["0"] if before else []), *sorted(_CODES[name] for name in style)]) + "m"


def call_record(call: ToolCall) -> dict[str, Any]:
    return {"name": call.name, "arguments": call.arguments}


def statistics_record(part: Part) -> dict[str, Any]:
    """For JSON; with those of streamed experts where there are any."""
    record = {name: getattr(part, name) for name in STATISTICS}
    told = {name: getattr(part, name) for name in ("prompt_experts", "experts")}
    return record | {name: {**vars(stats), "hit_rate": stats.hit_rate} for name, stats in told.items() if stats}
