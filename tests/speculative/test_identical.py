"""Greedy answers of the demo and of random models are the same with every kind of draft and with mixtures of them."""

import pytest

from mlx_qwen35 import Sampling, load, stream_generate
from mlx_qwen35.speculative.copying import Copying
from tests.drafted import near
from tests.talkers import Endless, random_model

KINDS = {
    "head": {"lookup": False},
    "copies": {"mtp": False, "draft_model": None},
    "both": {},
}
ITEM = '{"open": [491, 3.7], "name": "Anna"}'
FEW = Sampling(logit_bias={token: 50.0 for token in (5, 17, 33, 60)})


def check(count: int) -> None:
    """So many tokens, of all models and kinds together."""
    demo, processor = load(mtp=True)
    dense, moe, drafters = random_model("dense"), random_model("moe"), [near(kind, 0.02) for kind in ("dense", "moe")]
    sides = [(demo, processor, {}), (dense, Endless(), {"draft_model": drafters[0]})]
    sides += [(moe, Endless(), {"draft_model": drafters[1]})]
    tokens, number = 0, 0
    while tokens < count:
        for model, reader, drafts in sides:
            told = model is demo
            prompt = f"Repeat: {ITEM.replace('491', str(number))}" if told else [number % 90, 5, 17, 33] * 5
            options = {"sampling": Sampling() if told else FEW, "max_tokens": 60}
            plain = [part.token for part in stream_generate(model, reader, prompt, **options, mtp=False, lookup=False)]
            for kind, how in KINDS.items():
                parts = list(stream_generate(model, reader, prompt, **options, **drafts | how))
                assert [part.token for part in parts] == plain, (kind, prompt)
                tokens += len(plain)
        number += 1


def test_a_few_hundred_tokens(monkeypatch):
    monkeypatch.setattr(Copying, "choose", lambda self, kind, most, otherwise=None: min((3, 7, 15)[kind % 3], most))
    check(300)


@pytest.mark.soak
def test_twenty_thousand_tokens():
    check(20_000)
