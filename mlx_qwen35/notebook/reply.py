"""One answer of a chat, which renders itself.

Knows what was said, and how it looks as Markdown and as text. Knows nothing of how it came about.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mlx_qwen35.notebook import shell
from mlx_qwen35.notebook.thumbnails import thumbnails
from mlx_qwen35.text.markdown import folded, reply_markdown, table
from mlx_qwen35.text.reply import ToolCall

if TYPE_CHECKING:
    from mlx_qwen35.text.parts import Part
    from mlx_qwen35.vision.media import Media

NUMBERS = ("prompt_tokens", "prompt_tps", "cached_tokens", "generation_tokens", "generation_tps", "peak_memory")
EXPERT_NUMBERS = ("hit_rate", "bytes_read", "wait_share")


@dataclass(frozen=True)
class Reply:
    """text: the answer, without reasoning and calls; finish_reason: as of a Part, "cancelled" where it was interrupted.

    statistics: prompt_tokens, prompt_tps, cached_tokens, generation_tokens, generation_tps, peak_memory (GB), as of a
    Part; where experts are streamed expert_hit_rate, expert_bytes_read and expert_wait_share of the answer, too.
    media: the pictures and videos that the question showed.
    """

    text: str
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    finish_reason: str | None = None
    statistics: dict[str, float] = field(default_factory=dict)
    media: tuple[Media, ...] = field(default=(), repr=False)
    shown_in: int | None = field(default=None, repr=False, compare=False)
    """The cell that has shown it while it came, which does not show it again."""

    @classmethod
    def from_parts(cls, parts: Sequence[Part], *, media: Sequence[Media] = (), shown_in: int | None = None) -> Reply:
        """All that `parts` say; cut off where the last has no finish_reason."""
        return cls(
            text="".join(part.content for part in parts),
            reasoning="".join(part.reasoning for part in parts),
            tool_calls=tuple(call for part in parts for call in part.tool_calls),
            finish_reason=(parts[-1].finish_reason or "cancelled") if parts else "cancelled",
            statistics=_numbers(parts[-1]) if parts else {},
            media=tuple(media),
            shown_in=shown_in,
        )

    def __str__(self) -> str:
        return self.text

    def plain(self) -> str:
        """The answer as text: what it says, then what it calls."""
        calls = [f"{call.name}({json.dumps(call.arguments, ensure_ascii=False)})" for call in self.tool_calls]
        return "\n".join([*([self.text] if self.text else []), *calls])

    @property
    def cut(self) -> str:
        """What is to be said of an answer that ended because max_tokens or the context did; "" of any other."""
        if self.finish_reason != "length":
            return ""
        count = f" after {self.statistics['generation_tokens']:,} tokens" if self.statistics else ""
        if self.text or self.tool_calls:
            return f"cut{count}: a larger max_tokens= or context_length= gives more room"
        return f"cut{count}, before an answer: thinking_budget= leaves room for one"

    def markdown(self, *, thinking: bool = False) -> str:
        """The answer and the table of its statistics. thinking: it goes on, and is still reasoning."""
        shown = [reply_markdown(self.reasoning, self.text, self.tool_calls, thinking=thinking)]
        if self.finish_reason == "cancelled":
            shown.append("*(interrupted)*")
        elif self.cut:
            shown.append(f"*({self.cut})*")
        if self.finish_reason and self.statistics:
            shown.append(_statistics(self.statistics))
        return "\n\n".join(part for part in shown if part)

    def _repr_markdown_(self) -> str:
        return "\n\n".join(part for part in (thumbnails(self.media), self.markdown()) if part)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return {"text/plain": self.plain(), "text/markdown": self._repr_markdown_()}

    def _ipython_display_(self) -> None:
        """The last line of a cell shows its value: not an answer that has been shown there already."""
        if self.shown_in is None or self.shown_in != shell.cell():
            shell.show(self._repr_mimebundle_())


def _numbers(part: Part) -> dict[str, float]:
    numbers = {name: getattr(part, name) for name in NUMBERS}
    if part.experts is not None:
        numbers |= {f"expert_{name}": getattr(part.experts, name) for name in EXPERT_NUMBERS}
    return numbers


def _statistics(numbers: dict[str, float]) -> str:
    written, speed = numbers["generation_tokens"], numbers["generation_tps"]
    cells = {
        "tokens read": numbers["prompt_tokens"],
        "a second": f"{numbers['prompt_tps']:.0f}",
        "from the cache": numbers["cached_tokens"],
        "tokens written": written,
        "a second ": f"{speed:.1f}",
        "peak memory": f"{numbers['peak_memory']:.2f} GB",
    }
    if "expert_hit_rate" in numbers:
        cells["experts in memory"] = f"{numbers['expert_hit_rate']:.0%}"
        cells["read from the disk"] = f"{numbers['expert_bytes_read'] / 1e9:.2f} GB"
        cells["waited for it"] = f"{numbers['expert_wait_share']:.0%}"
    return folded(f"{written} tokens, {speed:.1f} a second", table(cells))
