"""A case: one question of the demo's curriculum and the answer that is right by rule. Knows no tokens, no arrays."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

HELD_OUT_OF = 12  # one question in twelve is never trained on


@dataclass(frozen=True)
class Case:
    """`thought` is None where the question is asked with enable_thinking=False; `messages` are in the chat template's
    form, pictures as {"type": "image", "image": PIL.Image} and videos as {"type": "video", "video": [PIL.Image]}.
    `follow_ups` are more questions about the same text or pictures, for training: what they ask is their last text."""

    skill: str
    messages: list[dict[str, Any]]
    answer: str
    thought: str | None = None
    tools: list[dict[str, Any]] | None = None
    key: str = ""  # what makes the question this question; decides whether it is held out
    follow_ups: list[Case] = field(default_factory=list)

    @property
    def held_out(self) -> bool:
        digest = hashlib.sha256(f"{self.skill}|{self.key}".encode()).digest()
        return digest[0] * 256 + digest[1] < 65536 // HELD_OUT_OF

    @property
    def reply(self) -> str:
        """What the assistant writes after the generation prompt, without <|im_end|>."""
        return self.answer if self.thought is None else f"{self.thought}\n</think>\n\n{self.answer}"

    def is_right(self, text: str) -> bool:
        """Whether a generated reply gives the answer; reasoning is not judged."""
        return text.split("</think>")[-1].strip() == self.answer.strip()


Maker = Callable[[random.Random], Case]


def draw(maker: Maker, rng: random.Random, *, held_out: bool) -> Case:
    """The next case of one side of the split."""
    while True:
        case = maker(rng)
        if case.held_out == held_out:
            return case


def held_out_set(makers: dict[str, Maker], per_skill: int, seed: int = 20260216) -> Iterator[Case]:
    """The same held-out cases on every machine: `per_skill` different questions for each skill."""
    for skill, maker in makers.items():
        rng = random.Random(f"{seed}/{skill}")
        seen: set[str] = set()
        while len(seen) < per_skill:
            case = draw(maker, rng, held_out=True)
            if case.key not in seen:
                seen.add(case.key)
                yield case
