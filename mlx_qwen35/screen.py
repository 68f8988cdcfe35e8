"""Answers on the screen or in a file: reasoning, content and tool calls told apart.

Knows parts and terminals. Knows nothing of how parts are made.
"""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from mlx_qwen35.parts import Part
    from mlx_qwen35.text.reply import ToolCall

DIM, PLAIN = "\x1b[2m", "\x1b[0m"
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
    """Shows the parts of one answer: a terminal gets reasoning dimmed, a file gets it between <think> and </think>."""

    def __init__(self, out: TextIO | None = None) -> None:
        self._out = sys.stdout if out is None else out
        self._terminal = self._out.isatty()
        # NO_COLOR: https://no-color.org
        self._dims = self._terminal and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
        self._inside = ""  # "", "reasoning" or "content": what was written last
        self._at_line_start = True

    def show(self, part: Part) -> None:
        for event in part.events:
            kind = type(event).__name__
            if kind == "ReasoningDelta":
                self._enter("reasoning")
                self._write(event.text)
            elif kind == "ContentDelta":
                self._enter("content")
                self._write(event.text)
            elif kind == "ToolCall":
                self._enter("")
                self._write(f"<tool_call>\n{json.dumps(call_record(event), ensure_ascii=False)}\n</tool_call>\n")
        self._out.flush()

    def end(self) -> None:
        """Leaves the screen as a prompt wants it: plain, at the start of a line."""
        self._enter("")
        self._out.flush()

    def _enter(self, inside: str) -> None:
        if inside == self._inside:
            return
        if self._inside == "reasoning":
            self._raw(PLAIN if self._dims else "" if self._terminal else "\n</think>")
            self._raw("\n\n" if inside else "\n")
        elif not self._at_line_start:
            self._raw("\n")
        if inside == "reasoning":
            self._raw(DIM if self._dims else "" if self._terminal else "<think>\n")
        self._inside = inside

    def _write(self, text: str) -> None:
        # an answer must not steer the terminal
        self._raw(text.replace("\x1b", "\u241b") if self._terminal else text)

    def _raw(self, text: str) -> None:
        self._out.write(text)
        if text:
            self._at_line_start = text.endswith("\n")


def call_record(call: ToolCall) -> dict[str, Any]:
    return {"name": call.name, "arguments": call.arguments}


def statistics_record(part: Part) -> dict[str, Any]:
    """For JSON; with those of streamed experts where there are any."""
    record = {name: getattr(part, name) for name in STATISTICS}
    told = {name: getattr(part, name) for name in ("prompt_experts", "experts")}
    return record | {name: {**vars(stats), "hit_rate": stats.hit_rate} for name, stats in told.items() if stats}
