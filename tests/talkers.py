"""What generation is tested with: a random model, a model that says what it is told, and a processor of letters."""

from contextlib import nullcontext
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_qwen35.cache import Cache
from mlx_qwen35.cache.rows import RowsCache
from mlx_qwen35.config import ModelConfig
from mlx_qwen35.generation import stream_generate
from mlx_qwen35.model import Model
from mlx_qwen35.processor import Prompt
from mlx_qwen35.sampling import Sampling
from tests.checkpoints import tiny_config

VOCAB = 96
END = 95
EURO = (1, 2)  # two tokens that are one character
PROMPT = [11, 45, 60, 3, 3, 71, 8]


class Letters:
    """Tokens that stand for the characters from the space on, but for two halves of a euro sign."""

    vocab_size = VOCAB

    def token_bytes(self, token: int) -> bytes:
        return {1: b"\xe2\x82", 2: b"\xac"}.get(token, bytes([token + 32]))

    def is_special(self, token: int) -> bool:
        return False


class Typist:
    """A processor without a checkpoint: a text is its letters."""

    tokenizer = Letters()
    eos_token_ids = frozenset({END})
    generation_config = {}
    context_length = 4096

    def prompt(self, prompt, *, images=(), videos=(), enable_thinking=None, **others) -> Prompt:
        """Ids hold the placeholders of the images, then those of the videos, which are Media."""
        tokens = spell(prompt) if isinstance(prompt, str) else list(prompt)
        return Prompt(tokens, None, bool(enable_thinking), (*images, *videos))


class Endless(Typist):
    eos_token_ids = frozenset()


def spell(text: str) -> list[int]:
    tokens = []
    for character in text:
        tokens += EURO if character == "€" else [ord(character) - 32]
    return tokens


class Script:
    """A model that says what it was told to, by the position of its input; `head` is the identity. Each cache that it
    makes is that of the next answer."""

    config = SimpleNamespace(text=SimpleNamespace(vocab_size=VOCAB))
    prefill_chunk = 2048
    together_chunk = 0
    mtp = None
    expert_stats = None
    verifies = True  # whether its last call was of no prompt

    def computing(self, tokens):
        return nullcontext()

    def __init__(self, prompt_length: int, *answers: list[int]) -> None:
        self.prompt_length, self.answers = prompt_length, answers
        self.fed: list[list[int]] = []
        self.made: list[Cache] = []

    def make_cache(self) -> Cache:
        self.made.append(Cache([]))
        return self.made[-1]

    def hidden(self, tokens, cache, media=(), *, more=False, **how):
        rows, length = tokens.shape
        logits = np.zeros((rows, length, VOCAB), dtype=np.float32)
        caches = cache.rows if isinstance(cache, RowsCache) else [cache]
        self.verifies = caches[0].offset >= self.prompt_length
        for row, own in enumerate(caches):
            answer = self.answers[self.made.index(own) % len(self.answers) if own in self.made else 0]
            for at in range(length):
                said = own.offset + at + 1 - self.prompt_length
                logits[row, at, answer[said] if 0 <= said < len(answer) else 0] = 30.0
        self.fed += tokens.tolist()
        cache.advance(length)
        return mx.array(logits)

    def head(self, hidden):
        assert hidden.shape[1] == 1 or self.verifies, "only the last position needs logits"
        return hidden


def say(text: str, *, end: bool = True) -> Script:
    return Script(len(PROMPT), spell(text) + [END] * end)


def random_model(kind: str) -> Model:
    """Weights so large that one token too many in any state shows in the logits."""
    model = Model(ModelConfig.from_dict(tiny_config(kind)))
    rng = np.random.default_rng(5)

    def values(name: str, old: mx.array) -> mx.array:
        noise = rng.standard_normal(old.shape)
        if name.endswith("A_log"):
            noise = np.log(rng.uniform(0.05, 2, old.shape))
        elif name.endswith("norm.weight"):
            noise = 1 + 0.3 * noise
        elif name.endswith("weight") and "embed" not in name:
            noise *= 1.5 / np.sqrt(old.shape[1] if "conv1d" in name else old.shape[-1])
        return mx.array(noise.astype(np.float32))

    model.load_weights([(name, values(name, old)) for name, old in tree_flatten(model.parameters())])
    mx.eval(model.parameters())
    return model


def recomputed(model: Model, tokens: list[int], count: int) -> list[int]:
    """Greedy, everything anew for each token."""
    tokens = list(tokens)
    for _ in range(count):
        tokens.append(model(mx.array([tokens]))[0, -1].argmax().item())
    return tokens[-count:]


def assert_covers(model: Model, cache: Cache, tokens: list[int]) -> None:
    """The cache holds exactly `tokens`: going on from it is what computing all of it gives, twice in a row."""
    assert cache.offset == len(tokens)
    more = [5, 17, 33]
    whole = np.array(model(mx.array([[*tokens, *more]])))[0, -len(more) :]
    np.testing.assert_allclose(np.array(model(mx.array([more[:2]]), cache))[0], whole[:2], atol=4e-3)
    np.testing.assert_allclose(np.array(model(mx.array([more[2:]]), cache))[0], whole[2:], atol=4e-3)


def greedy(model, prompt=PROMPT, **options):
    options = {"sampling": Sampling(), "max_tokens": 12} | options
    return stream_generate(model, Endless(), prompt, **options)
