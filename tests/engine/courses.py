"""Courses of requests: what is asked, when it joins, what goes wrong with it; and what each says alone.

Knows two checkpoints: the demo, and a random one that sees and has a random head that drafts.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mlx_qwen35 import Sampling, load, stream_generate
from mlx_qwen35.model.mtp import MTPHead
from tests.checkpoints import random_tensors, tiny_config, write_checkpoint
from tests.conftest import CHECKOUT
from tests.drafted import random_head
from tests.text.folders import tokenizer_config, tokenizer_json, write_text_files

VOCAB = 320
SYSTEM = "You are asked many things, one after the other, and answer each in as few words as you can. " * 3
NUMBER = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}
TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": NUMBER}}
FORMS: list[dict[str, Any]] = [
    {},
    {"response_format": {"type": "regex", "regex": "(yes|no|[0-9]{1,9})!"}},
    {"response_format": NUMBER},
    {"tools": [TOOL], "tool_choice": "required"},
]


def picture(seed: int) -> Image.Image:
    """Noise of 64 x 64 pixels."""
    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, (64, 64, 3)).astype(np.uint8))


def said(text: str) -> list[dict[str, Any]]:
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]


def shown(seed: int, text: str) -> list[dict[str, Any]]:
    content = [{"type": "image", "image": picture(seed)}, {"type": "text", "text": text}]
    return [{"role": "user", "content": content}]


# A conversation and its beginnings, others that begin alike, pictures of one size, and a long one.
PROMPTS: list[list[dict[str, Any]]] = [
    said("What is 17 + 25?"),
    said("What is 8 + 5?"),
    [*said("What is 17 + 25?"), {"role": "assistant", "content": "42"}, {"role": "user", "content": "And 3 + 4?"}],
    [{"role": "user", "content": "Hello"}],
    shown(1, "What is it?"),
    shown(2, "What is it?"),
    said("one two three four five six seven eight nine ten " * 12),
]
UNREADABLE = [{"role": "user", "content": [{"type": "image", "image": "there is no such file.png"}]}]


def tiny_seeing(folder: Path) -> tuple[Any, Any]:
    """A random model and its processor, with a random head that drafts."""
    folder.mkdir()
    tokenizer = tokenizer_json()
    added = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    added["<|video_pad|>"] = max(added.values()) + 1
    pad = next(token for token in tokenizer["added_tokens"] if token["content"] == "<|image_pad|>")
    tokenizer["added_tokens"].append({**pad, "id": added["<|video_pad|>"], "content": "<|video_pad|>"})
    template = (CHECKOUT / "mlx_qwen35" / "demo" / "chat_template.jinja").read_text()
    write_text_files(folder, tokenizer=tokenizer, tokenizer_config=tokenizer_config(tokenizer), template=template)
    # With 1e-6, norms of what nearly cancels make float32's rounding many times larger (docs/SESSIONS.md).
    sizes = {"vocab_size": VOCAB, "max_position_embeddings": 4000, "rms_norm_eps": 1e-2}
    config = tiny_config(vision=True, eos_token_id=added["<|im_end|>"], **sizes)
    names = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    config |= {f"{key}_token_id": added[f"<|{name}|>"] for key, name in names.items()}
    write_checkpoint(folder, config, random_tensors(config))
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": False}))
    patches = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2, "image_mean": [0.5] * 3}
    sizes = {"shortest_edge": 64, "longest_edge": 64 * 64}
    for name in ("preprocessor_config", "video_preprocessor_config"):
        (folder / f"{name}.json").write_text(json.dumps({**patches, "image_std": [0.5] * 3, "size": sizes}))
    model, processor = load(folder)
    model.take_mtp(random_head(MTPHead(model.config.text)))
    return model, processor


@dataclass(frozen=True)
class Ask:
    """What is asked, by numbers, so that what it says alone is computed once."""

    prompt: int = 0
    seed: int | None = None  # None: greedy
    most: int = 8  # tokens
    drafts: bool = False
    form: int = 0
    stop: tuple[str, ...] = ()
    thinks: bool = False
    n: int = 1

    def options(self) -> dict[str, Any]:
        """As stream_generate takes them."""
        sampling = Sampling() if self.seed is None else Sampling(temperature=1.0, top_p=0.95, seed=self.seed)
        found = {"sampling": sampling, "max_tokens": self.most, "mtp": self.drafts, "enable_thinking": self.thinks}
        found |= {"stop": self.stop} if self.stop else {}
        found |= {"n": self.n} if self.n > 1 else {}
        return found | FORMS[self.form]


@dataclass(frozen=True)
class Said:
    """What came of it."""

    tokens: tuple[int, ...]
    text: str
    reason: str


class Alone:
    """What each ask says when nobody else is there and nothing was computed before."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor
        self._known: dict[Ask, Said] = {}

    def __call__(self, ask: Ask, index: int = 0) -> Said:
        """index: which of its answers."""
        seed = None if ask.seed is None else ask.seed + index
        ask = replace(ask, n=1, seed=seed)
        if ask not in self._known:
            parts = stream_generate(self.model, self.processor, PROMPTS[ask.prompt], **ask.options())
            self._known[ask] = collected(parts)
        return self._known[ask]


def collected(parts: Any, index: int = 0) -> Said:
    """What the parts of one answer say; there is one end."""
    parts = [part for part in parts if getattr(part, "index", 0) == index]
    reasons = [part.finish_reason for part in parts if part.finish_reason]
    assert len(reasons) == 1 and parts[-1].finish_reason, reasons
    tokens = tuple(part.token for part in parts if part.token is not None)
    return Said(tokens, "".join(part.text for part in parts), reasons[0])


def check_whole_or_cut(found: Said, alone: Said, cuts: tuple[str, ...]) -> None:
    """It is what it is alone, or a beginning of that, where it was cut for one of the reasons `cuts`."""
    if found.reason in cuts:
        assert found.tokens == alone.tokens[: len(found.tokens)]
        assert alone.text.startswith(found.text.rstrip("\ufffd"))
    else:
        assert found == alone


class Boom(Exception):
    """What a caller's own function raises."""


def raises_at(call: int) -> Callable[[int, int], None]:
    """An on_progress that raises when it is called for the time `call`."""
    calls = 0

    def on_progress(done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if calls >= call:
            raise Boom("a caller's own function")

    return on_progress
