"""How far a model is from another on held-out questions: what both make of every token of prompt and right reply.

Knows the demo's curriculum, token rows and log probabilities. Knows no files and no quantization.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
CURRICULUM = ROOT / "tools" / "train_demo"
sys.path[:0] = [str(ROOT), str(CURRICULUM)]

from case import held_out_set  # noqa: E402
from picture_skills import PICTURE_SKILLS  # noqa: E402
from text_skills import TEXT_SKILLS  # noqa: E402

from mlx_qwen35.model import Model  # noqa: E402
from mlx_qwen35.processor import Processor  # noqa: E402

SKILLS = {**TEXT_SKILLS, **PICTURE_SKILLS}
TOKENS_TOGETHER = 3000  # of a batch, padded
EVERY = 2  # of the prompts' tokens only every second is looked at: there are many more of them


@dataclass(frozen=True)
class Question:
    """reply: of the right answer, <|im_end|> included."""

    skill: str
    prompt: list[int]
    reply: list[int]
    media: list[Any]

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.reply)


@dataclass(frozen=True)
class Row:
    """What a model says of the tokens looked at. kl: from the first model's distribution to its own, mean, in nats;
    of the replies' tokens and of those of the prompts that are text. perplexity: of the same. replies: the share of
    questions whose whole reply greedy decoding gives word for word."""

    kl_reply: float
    kl_prompt: float
    perplexity_reply: float
    perplexity_prompt: float
    replies: float

    def as_json(self) -> dict[str, float]:
        return asdict(self)


def questions(processor: Processor, per_skill: int) -> list[Question]:
    found = []
    for case in held_out_set(SKILLS, per_skill):
        prompt = processor.prompt(case.messages, tools=case.tools, enable_thinking=case.thought is not None)
        reply = processor.tokenizer.encode(case.reply + "<|im_end|>")
        found.append(Question(case.skill, list(prompt.tokens), list(reply), list(prompt.media)))
    return sorted(found, key=lambda question: question.length)


class Examination:
    """The same questions for every model; the first model, whose answers all are held against, is given here."""

    def __init__(self, model: Model, asked: list[Question]):
        self._batches = list(_batches(asked))
        self._special = min(
            i for i in (model.config.image_token_id, model.config.video_token_id, *model.config.eos_token_ids) if i
        )
        self._expected = [self._log_probabilities(model, batch) for batch in self._batches]

    def compare(self, model: Model) -> Row:
        kls: list[np.ndarray] = []
        surprise: list[np.ndarray] = []
        of_reply: list[np.ndarray] = []
        right = []
        for batch, (expected, targets, reply_of) in zip(self._batches, self._expected, strict=True):
            found, _, _ = self._log_probabilities(model, batch)
            kls.append((np.exp(expected) * (expected - found)).sum(-1))
            surprise.append(-found[np.arange(len(targets)), targets])
            of_reply.append(reply_of >= 0)
            hit = found.argmax(-1) == targets
            right += [bool(hit[reply_of == number].all()) for number in range(len(batch))]
        kl, nats, reply = (np.concatenate(parts) for parts in (kls, surprise, of_reply))
        return Row(
            float(kl[reply].mean()),
            float(kl[~reply].mean()),
            float(np.exp(nats[reply].mean())),
            float(np.exp(nats[~reply].mean())),
            sum(right) / len(right),
        )

    def _log_probabilities(
        self, model: Model, batch: list[Question]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """[N, vocab] of the tokens looked at, those tokens [N], and for each the question whose reply it is of, or -1.

        Rows are padded on the right, where nothing looks back from.
        """
        longest = max(question.length for question in batch)
        rows = [q.prompt + q.reply + [0] * (longest - q.length) for q in batch]
        media = [question.media for question in batch]
        hidden = model.hidden(mx.array(rows), None, media if any(media) else None)
        picked, targets, reply_of = [], [], []
        for number, question in enumerate(batch):
            begin = len(question.prompt)
            text = [i for i in range(1, begin, EVERY) if max(question.prompt[i - 1 : i + 1]) < self._special]
            places = text + list(range(begin, question.length))
            picked.append(hidden[number, mx.array(places) - 1])
            targets += [rows[number][i] for i in places]
            reply_of += [number if i >= begin else -1 for i in places]
        logits = model.head(mx.concatenate(picked))
        found = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        return np.array(found), np.array(targets), np.array(reply_of)


def _batches(asked: list[Question]) -> Iterator[list[Question]]:
    group: list[Question] = []
    for question in asked:
        if group and question.length * (len(group) + 1) > TOKENS_TOGETHER:
            yield group
            group = []
        group.append(question)
    yield group
