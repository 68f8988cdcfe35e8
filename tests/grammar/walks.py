"""Answers of a model that knows nothing: random logits under a matcher's mask, leaning towards an end.

Now and then the walker has a mind to write what ends things (a quote, a bracket, a closing tag), as a model that means
to come to an end does; whether it may is the mask's to say.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mlx_qwen35.grammar import Matcher
from mlx_qwen35.processor import Processor

ENDINGS = ('"', "}", "]", ",", "\n", "\n</parameter>\n", "</function>")


@dataclass(frozen=True)
class Walk:
    """tokens: without the end of the turn; ended: whether the turn ended; complete: what the matcher says of it."""

    tokens: list[int]
    ended: bool
    complete: bool


def walk(
    processor: Processor,
    matcher: Matcher,
    generator: np.random.Generator,
    *,
    most: int = 300,
    leaning: float = 0.3,
    thinks: bool = False,
) -> Walk:
    """One answer. leaning: how often it has a mind to end something; thinks: it may open a reasoning."""
    size, ends = processor.config.text.vocab_size, sorted(processor.eos_token_ids)
    meant: list[int] = []
    tokens: list[int] = []
    for _ in range(most):
        allowed = bits(matcher.mask(), size)
        if not thinks:
            allowed[processor.tokenizer.control_tokens["<think>"]] = False
        if not meant and generator.random() < leaning:
            meant = processor.tokenizer.encode(str(generator.choice(ENDINGS)))
        if meant and allowed[meant[0]]:
            token = meant.pop(0)
        else:
            meant = []
            logits = generator.standard_normal(size)
            logits[ends] += 2
            token = int(np.where(allowed, logits, -np.inf).argmax())
        matcher.advance(token)
        if token in ends:
            return Walk(tokens, True, matcher.complete)
        tokens.append(token)
    return Walk(tokens, False, matcher.complete)


def bits(words: np.ndarray, size: int) -> np.ndarray:
    """uint32 words -> bool [size]"""
    return np.unpackbits(words.view(np.uint8), bitorder="little")[:size].astype(bool)


def run(processor: Processor, matcher: Matcher, text: str) -> bool:
    """Advances by a text's tokens; False: one of them may not come."""
    for token in processor.tokenizer.encode(text, plain=True):
        if matcher.accepted([token]) == 0:
            return False
        matcher.advance(token)
    return True
