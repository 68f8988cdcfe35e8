"""Models with something that drafts for them: a random MTP head, and models that are nearly the same.

Knows how weights of tests.checkpoints and tests.talkers come into a head, without the loader.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_qwen35.config import ModelConfig
from mlx_qwen35.model import Model
from mlx_qwen35.model.mtp import MTPHead
from mlx_qwen35.sampling import Sampler
from mlx_qwen35.speculative.copying import Copying
from mlx_qwen35.speculative.pace import Pace
from tests.checkpoints import loaded, random_tensors, relayout, tiny_config
from tests.reference_numpy import Reference
from tests.talkers import random_model


def near(kind: str, amount: float, seed: int = 7) -> Model:
    """random_model(kind) with its weights changed by so much: the more, the rarer it says the same."""
    model, rng = random_model(kind), np.random.default_rng(seed)
    weights = [
        (name, old * (1 + amount * mx.array(rng.standard_normal(old.shape).astype(np.float32))))
        for name, old in tree_flatten(model.parameters())
    ]
    model.load_weights(weights)
    mx.eval(model.parameters())
    return model


def with_head(kind: str, **overrides) -> tuple[Model, MTPHead, Reference]:
    """A random model, its head, and the NumPy reference of both."""
    config = tiny_config(kind, flat=True, mtp_num_hidden_layers=1, **overrides)
    tensors = random_tensors(config)
    model = Model(ModelConfig.from_dict(config))
    head = MTPHead(model.config.text)
    # relayout() leaves mtp.* out: under other names it does not.
    ours = dict(loaded(*pair) for pair in relayout(_main(tensors), "mlx").items())
    model.load_weights([(name, mx.array(value)) for name, value in ours.items()], strict=True)
    beside = dict(loaded(*pair) for pair in relayout(_beside(tensors), "mlx").items())
    head.load_weights([(name, mx.array(value)) for name, value in beside.items()], strict=True)
    mx.eval(model.parameters(), head.parameters())
    return model, head, Reference(config, tensors)


def _main(tensors):
    return {name: value for name, value in tensors.items() if not name.startswith("mtp.")}


def _beside(tensors):
    return {name.replace("mtp.", "model.", 1): value for name, value in tensors.items() if name.startswith("mtp.")}


def always(monkeypatch, count: int) -> None:
    """Let every round have so many guesses, whatever they cost."""
    monkeypatch.setattr(Pace, "choose", lambda self: min(count, self.most))


@contextmanager
def guessed(count: int) -> Iterator[list[int]]:
    """Every round has so many guesses inside, whatever they cost, and none copies; they come into the list."""
    found, guess = [], Sampler.guess

    def noted(self, logits, history, words=None):
        made = guess(self, logits, history, words)
        found.append(made[0].item())
        return made

    choose = patch.object(Pace, "choose", lambda self: min(count, self.most))
    with choose, patch.object(Copying, "choose", lambda *_: 0), patch.object(Sampler, "guess", noted):
        yield found


def random_head(head: MTPHead, seed: int = 3) -> MTPHead:
    """The head with random weights."""
    rng = np.random.default_rng(seed)

    def values(name: str, old: mx.array) -> mx.array:
        noise = rng.standard_normal(old.shape)
        noise = 1 + 0.3 * noise if name.endswith("norm.weight") else 1.5 * noise / np.sqrt(old.shape[-1])
        return mx.array(noise.astype(np.float32))

    head.load_weights([(name, values(name, old)) for name, old in tree_flatten(head.parameters())])
    mx.eval(head.parameters())
    return head
