"""What prompts have in common is computed once, in one process and the next."""

import pytest

from mlx_qwen35 import Engine, Store, load
from mlx_qwen35.errors import ArgumentError
from mlx_qwen35.generation import generate_batch, stream_generate
from mlx_qwen35.sampling import Sampling
from tests.talkers import PROMPT, Endless, greedy, random_model

MODEL, OTHER = random_model("dense"), random_model("moe")
COMMON = [number * 7 % 90 for number in range(600)]
PROMPTS = [[*COMMON, *(10 + number + at for at in range(3 + number))] for number in range(8)]
OPTIONS = {"sampling": Sampling(), "max_tokens": 6}
NEW = sum(len(prompt) - len(COMMON) for prompt in PROMPTS)


@pytest.fixture(scope="module")
def alone() -> list[list[int]]:
    return [[part.token for part in greedy(MODEL, prompt, max_tokens=6)] for prompt in PROMPTS]


def test_eight_at_once_compute_their_common_beginning_once(alone):
    with Engine(MODEL, Endless(), most_rows=8) as engine:
        answers = [engine.submit(prompt, **OPTIONS) for prompt in PROMPTS]
        done = [answer.result(120) for answer in answers]
        assert [list(answer.tokens) for answer in done] == alone
        assert engine.computed_tokens == len(COMMON) + NEW
        again = [engine.submit(prompt, **OPTIONS).result(60) for prompt in PROMPTS]
        assert [list(answer.tokens) for answer in again] == alone
        assert all(answer.cached_tokens >= len(COMMON) for answer in again)


def test_a_second_engine_computes_only_what_is_new(tmp_path):
    model, processor = load()
    asked = [[1 + number % 200 for number in range(600)] + [7 + last] * (3 + last) for last in range(3)]
    alone = [part.token for part in stream_generate(model, processor, asked[2], **OPTIONS)]
    with Engine(model, processor, cache_dir=tmp_path) as engine:
        for prompt in asked[:2]:
            engine.submit(prompt, **OPTIONS).result(120)
    with Engine(model, processor, cache_dir=tmp_path) as engine:
        done = engine.submit(asked[2], **OPTIONS).result(120)
        assert list(done.tokens) == alone[: len(done.tokens)]
        assert engine.computed_tokens == len(asked[2]) - 600


def test_a_batch_computes_what_its_prompts_share_once(alone):
    done = generate_batch(MODEL, Endless(), PROMPTS, most_rows=3, **OPTIONS)
    assert [list(answer.tokens) for answer in done] == alone
    assert sum(answer.prompt_tokens - answer.cached_tokens for answer in done) == len(COMMON) + NEW


def test_a_store_serves_streams_one_after_the_other(alone):
    store = Store(MODEL, most_bytes=1 << 28)
    for number in (0, 1, 0):
        parts = list(stream_generate(MODEL, Endless(), PROMPTS[number], store=store, **OPTIONS))
        assert [part.token for part in parts] == alone[number]
    assert parts[0].cached_tokens > len(COMMON)
    store.clear()
    assert store.nbytes == 0


def test_a_store_that_does_not_fit_is_refused():
    store = Store(OTHER, most_bytes=1 << 20)
    with pytest.raises(ArgumentError, match="the store is another model's"):
        stream_generate(MODEL, Endless(), PROMPT, store=store)
    store = Store(MODEL, most_bytes=1 << 20)
    with pytest.raises(ArgumentError, match="give it or a store"):
        stream_generate(MODEL, Endless(), PROMPT, store=store, cache=MODEL.make_cache())
    with pytest.raises(ArgumentError, match=r"store is 'a', of type str; give a Store\("):
        stream_generate(MODEL, Endless(), PROMPT, store="a")
