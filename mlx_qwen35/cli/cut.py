"""What is said of an answer that ended because there was no room for more. Knows limits, nothing of answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlx_qwen35.text.screen import note

if TYPE_CHECKING:
    from mlx_qwen35.text.parts import Part


def tell_cut(last: Part, limit: int | None, again: str, *, answered: bool = True) -> None:
    """Says on standard error that an answer is cut, where it is. last: its last part. limit: the most tokens that were
    asked for; a shorter answer ended with the context. again: what to do for more, with {more} for a larger limit.
    answered: whether it had come beyond its reasoning."""
    if last.finish_reason != "length" or not last.generation_tokens:
        return
    if last.generation_tokens == limit:
        note(f"The answer is cut after {limit:,} tokens (-n). {again.format(more=2 * limit)}.")
    else:
        used = last.cached_tokens + last.prompt_tokens + last.generation_tokens
        note(
            f"The answer is cut: the context of {used:,} tokens is full. A larger --context-length, or a "
            "shorter prompt, gives more room."
        )
    if not answered:
        note("It was still reasoning: --thinking-budget N ends that early, --no-think leaves it out.")
