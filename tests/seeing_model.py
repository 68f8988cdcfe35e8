"""A tiny random Model that sees, beside the NumPy reference of the same weights, and random media and prompts for it.

Knows how the tensors of tests.checkpoints come under the names of Model, without the loader.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_qwen35.config import ModelConfig
from mlx_qwen35.model import Model
from mlx_qwen35.vision import Media

from .checkpoints import loaded, random_tensors, relayout, tiny_config
from .reference_vision import SeeingReference

IMAGE, VIDEO = 80, 81  # placeholder ids of tiny_config
MERGE = 2
PATCH = 3 * 2 * 4 * 4


def seeing_model(kind: str = "dense", *, seed: int = 0, **overrides: Any) -> tuple[Model, SeeingReference]:
    """Overrides are keys of the text configuration, as tiny_config takes them."""
    config = tiny_config(kind, vision=True, **overrides)
    tensors = random_tensors(config, seed)
    model = Model(ModelConfig.from_dict(config))
    ours = dict(loaded(name, value) for name, value in relayout(tensors, "mlx").items())
    model.load_weights([(name, mx.array(value)) for name, value in ours.items()], strict=True)
    mx.eval(model.parameters())
    return model, SeeingReference(config, tensors)


def some_media(kind: str, *grid: int, seed: int = 0) -> Media:
    """Random pixels of grid (h, w) for an image, (t, h, w) for a video."""
    pairs, height, width = grid if kind == "video" else (1, *grid)
    pixels = np.random.RandomState(seed).standard_normal((pairs * height * width, PATCH)).astype(np.float32)
    return Media(kind, pixels, (pairs, height, width))


def prompt_of(*parts: int | Media, seed: int = 1) -> tuple[list[int], list[Media]]:
    """Token ids of a prompt, and its media. A number stands for so many random words; a video has one before each
    frame pair but the first."""
    rng = np.random.RandomState(seed)
    tokens: list[int] = []
    for part in parts:
        if isinstance(part, int):
            tokens += rng.randint(0, 80, part).tolist()
            continue
        pairs, height, width = part.grid
        for pair in range(pairs):
            if pair:
                tokens.append(int(rng.randint(0, 80)))
            tokens += [IMAGE if part.kind == "image" else VIDEO] * (height * width // MERGE**2)
    return tokens, [part for part in parts if not isinstance(part, int)]


def run(model: Model, tokens: Sequence[int], media: Sequence[Media], cuts: Sequence[int]) -> np.ndarray:
    """Logits [T, vocab] of one row through a cache, in pieces of the lengths in `cuts`, repeated."""
    ids = mx.array([list(tokens)])
    cache, sight = model.make_cache(), model.see(ids, media)
    pieces, start, turn = [], 0, 0
    while start < len(tokens):
        stop = min(start + cuts[turn % len(cuts)], len(tokens))
        pieces.append(np.array(model(ids[:, start:stop], cache, sight[start:stop]))[0])
        start, turn = stop, turn + 1
    return np.concatenate(pieces)
