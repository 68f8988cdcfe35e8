"""What clients of OpenAI's interfaces say about thinking, in all the words they have for it.

Knows the fields; text/variables.py knows what a template makes of them.

    enable_thinking, chat_template_kwargs, reasoning_effort ("none": off), preserve_thinking
    reasoning {effort, enabled, max_tokens}
    thinking {type: enabled | disabled | adaptive | auto, budget_tokens}
    thinking_budget, thinking_token_budget, max_thinking_tokens
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_qwen35.errors import PromptError
from mlx_qwen35.serving.fields import Fields
from mlx_qwen35.serving.refusal import Refusal
from mlx_qwen35.text.variables import check_effort

_BUDGETS = ("thinking_budget", "thinking_token_budget", "max_thinking_tokens")


def read_thinking(fields: Fields) -> dict[str, Any]:
    """Options of `Engine.submit`. Of several that say the same the first counts. Raises Refusal."""
    switch, effort = fields.flag("enable_thinking"), _effort(fields, "reasoning_effort", "reasoning_effort")
    budgets = [fields.whole(name, -1) for name in _BUDGETS]
    reasoning = fields.any("reasoning")
    if isinstance(reasoning, Mapping):
        inner = Fields(reasoning, "reasoning.")
        own, enabled = _effort(inner, "effort", "reasoning.effort"), inner.flag("enabled")
        effort, switch = effort or own, enabled if switch is None and own is None else switch
        budgets.append(inner.whole("max_tokens", -1))
    thinking = fields.any("thinking")
    if isinstance(thinking, Mapping):
        inner = Fields(thinking, "thinking.")
        kind = inner.one_of("type", ("enabled", "disabled", "adaptive", "auto"))
        if switch is None and effort is None and kind in ("enabled", "disabled"):
            switch = kind == "enabled"
        budgets.append(inner.whole("budget_tokens", -1))
    elif isinstance(thinking, bool) and switch is None and effort is None:
        switch = thinking
    variables = fields.any("chat_template_kwargs")
    if variables is not None and not isinstance(variables, Mapping):
        raise fields.refused("chat_template_kwargs", 'an object such as {"enable_thinking": false}')
    given = {
        "enable_thinking": switch,
        "reasoning_effort": effort,
        "preserve_thinking": fields.flag("preserve_thinking"),
        "chat_template_kwargs": dict(variables) if variables else None,
        "thinking_budget": next((budget for budget in budgets if budget is not None and budget >= 0), None),
    }
    return {name: value for name, value in given.items() if value is not None}


def _effort(fields: Fields, name: str, place: str) -> str | None:
    word = fields.text(name)
    try:
        return check_effort(word)
    except PromptError as error:
        raise Refusal("invalid", str(error), place) from None
