"""An answer that was begun, and goes on: where its own text stands behind a prompt.

Knows how the family's templates write reasoning and content of an answer. Knows nothing of tokens, and nothing of the
disguise that texts go through, which is rendering.py's.

What the template writes before an answer ends inside <think>, behind an empty reasoning, or with neither:

    <think>                     a reasoning without content goes on; with content it is closed, and the content goes on
    <think>\\n\\n</think>\\n\\n     the same, but a reasoning is closed in any case: thinking is off
    neither                     the content goes on; a template that knows no reasoning writes none
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_qwen35.errors import PromptError
from mlx_qwen35.text.messages import split_reasoning

_OPEN, _CLOSE = "<think>", "\n</think>\n\n"
_NONE = f"{_OPEN}\n{_CLOSE}"  # an empty reasoning


@dataclass(frozen=True)
class Begun:
    """What there is of an answer, as it was written. closed: its reasoning is over, also where no content follows."""

    reasoning: str
    content: str
    closed: bool = False

    def behind(self, prompt: str) -> tuple[str, str]:
        """-> (the prompt with the answer's text behind it, that of it which goes on: reasoning or content)."""
        if prompt.rstrip().endswith(_OPEN):
            if not (self.content or self.closed):
                return prompt + self.reasoning, self.reasoning
            return prompt + self._closed, self.content
        if prompt.endswith(_NONE):
            return f"{prompt.removesuffix(_NONE)}{_OPEN}\n{self._closed}", self.content
        return prompt + self.content, self.content

    @property
    def _closed(self) -> str:
        """Without white space around the reasoning, as templates write it."""
        return self.reasoning.strip() + _CLOSE + self.content


def last_begun(
    messages: Sequence[Mapping[str, Any]], *, splits_reasoning: bool
) -> tuple[list[Mapping[str, Any]], Begun]:
    """Checked messages without the last, and what there is of it. splits_reasoning: whether the template takes
    reasoning out of a content. Raises PromptError if the last is no answer that can go on."""
    *before, last = messages
    if last["role"] != "assistant":
        raise PromptError(
            f"continue_final_message: the last message is of role {last['role']}, and only an assistant's can go on; "
            "add one, or leave it out"
        )
    if last.get("tool_calls"):
        raise PromptError(
            "continue_final_message: the last message has tool_calls, which end an answer; give their results in "
            "messages of role tool, or leave the calls out"
        )
    if not before:
        raise PromptError("continue_final_message: no message comes before the last; put the user's there")
    content = last["content"]
    if not isinstance(content, str):
        if any(part.get("type") != "text" if isinstance(part, Mapping) else True for part in content):
            raise PromptError("continue_final_message: the last message shows a picture or video; give it text only")
        content = "".join(part["text"] for part in content)
    reasoning = last.get("reasoning_content")
    if reasoning is None and splits_reasoning:
        (split,) = split_reasoning([{"role": "assistant", "content": content}])
        if "reasoning_content" in split:
            end = content[len(content.rstrip()) :] if split["content"] else ""
            return before, Begun(split["reasoning_content"], split["content"] + end, closed=True)
    return before, Begun(reasoning or "", content)
