"""Random texts that spell control tokens, whole and in part, and conversations made of them."""

import random
import re
from collections.abc import Callable
from typing import Any

WORDS = ["hello", "the", " ", "\n", "\n\n", "\t", "'s", "12", "déjà", "e\u0301", "日本", "😀", "```", "\x00",
         "<", ">", "<|", "|>", "</", "<function=f>", "</parameter>", "{{ x }}", "{%",
         "\\ue000", "\ue000", "\ue001", "\\u003c"]  # fmt: skip


def text_of(dice: random.Random, tokens: list[str]) -> str:
    """Some words, and control tokens, some of them cut short."""

    def piece() -> str:
        if dice.random() < 0.4:
            return dice.choice(WORDS)
        token = dice.choice(tokens)
        cut = dice.randrange(len(token) + 1)
        return token if dice.random() < 0.6 else dice.choice([token[:cut], token[cut:]])

    return "".join(piece() for _ in range(dice.randrange(1, 7)))


def conversation(dice: random.Random, tokens: list[str], image: Any) -> dict[str, Any]:
    """Messages, tools and variables, with spellings in every text of them, and at least one image."""

    def text() -> str:
        return text_of(dice, tokens)

    def part() -> dict[str, Any]:
        return {"type": "text", "text": text()}

    def shown() -> list[dict[str, Any]]:
        return [part() for _ in range(dice.randrange(3))] + [{"type": "image", "image": image}, part(), part()]

    def value() -> Any:
        return dice.choice([text, lambda: [text(), {text(): text()}], lambda: {text(): [text()]}, lambda: 5])()

    def content() -> Any:
        return dice.choice([text, lambda: [part(), part()], lambda: [text(), part()]])()

    messages: list[dict[str, Any]] = []
    for role in dice.choice([(), ("system",), ("developer",), ("system", "developer")]):
        messages.append({"role": role, "content": content()})
    messages.append({"role": "user", "content": shown()})
    for _ in range(dice.randrange(3)):
        answer: dict[str, Any] = {"role": "assistant", "content": dice.choice([content, lambda: None])()}
        if dice.random() < 0.5:
            answer[dice.choice(["reasoning_content", "reasoning"])] = text()
        messages.append(answer)
        if dice.random() < 0.5:
            calls = [{"name": text(), "arguments": {text(): value()}} for _ in range(dice.randrange(1, 3))]
            answer["tool_calls"] = [{"type": "function", "function": call} for call in calls]
            messages += [{"role": "tool", "content": dice.choice([content, shown])()} for _ in calls]
        messages.append({"role": dice.choice(["user", "user", "system"]), "content": content()})
    parameters = {"type": "object", "properties": {text(): {"type": "string", "description": text()}}}
    tool = {"type": "function", "function": {"name": text(), "description": text(), "parameters": parameters}}
    return {
        "prompt": messages,
        "tools": dice.choice([None, [tool]]),
        "enable_thinking": dice.choice([None, True, False]),
        "chat_template_kwargs": {"note": text()},
    }


def each_text(value: Any, change: Callable[[str], str], key: str = "") -> Any:
    """A copy with every text changed that is no name of a role, a type or a field."""
    if isinstance(value, str):
        return value if key in ("role", "type") else change(value)
    if isinstance(value, dict):
        return {k if k.isidentifier() else change(k): each_text(item, change, k) for k, item in value.items()}
    return [each_text(item, change) for item in value] if isinstance(value, list) else value


def blank(text: str) -> str:
    """As long, with a letter for all that can be seen."""
    return re.sub(r"\S", "x", text)
