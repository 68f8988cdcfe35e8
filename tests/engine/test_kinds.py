"""Rows side by side in every kind of model: streamed experts, packed keys and values, drafts, exact, a form."""

from dataclasses import replace

import numpy as np
import pytest

import mlx_qwen35
from mlx_qwen35 import Engine
from mlx_qwen35.checkpoint.load import load_model
from mlx_qwen35.config import ModelConfig
from mlx_qwen35.generation import generate_batch, stream_generate
from mlx_qwen35.library import demo_folder
from mlx_qwen35.sampling import Sampling
from mlx_qwen35.text.reply import ContentDelta
from tests.drafted import guessed, near
from tests.experts.test_streamed import PLAN
from tests.talkers import Endless, greedy, random_model

PROMPTS = ["Sort: dog, cat, ant", "What is 12 + 30?", "Sort: b, a", "What is 7 + 8?"]
OPTIONS = {"sampling": Sampling(), "max_tokens": 40, "enable_thinking": False}


@pytest.fixture(scope="module")
def resident():
    return mlx_qwen35.load()


@pytest.fixture(scope="module")
def alone(resident) -> list[list[int]]:
    return [[part.token for part in stream_generate(*resident, prompt, **OPTIONS)] for prompt in PROMPTS]


@pytest.mark.parametrize("slots", [4, 11])
def test_streamed_experts(resident, alone, slots):
    layers = ModelConfig.from_folder(demo_folder()).text.num_hidden_layers
    model = load_model(demo_folder(), stream=replace(PLAN, slots=(slots,) * layers))
    done = generate_batch(model, resident[1], PROMPTS, most_rows=3, **OPTIONS)
    assert [list(answer.tokens) for answer in done] == alone
    with Engine(model, resident[1], most_rows=2) as engine:
        answers = [engine.submit(prompt, **OPTIONS) for prompt in PROMPTS]
        assert [list(answer.result(120).tokens) for answer in answers] == alone
        parts = list(engine.submit(PROMPTS[0], **OPTIONS))
        assert parts[-1].experts is not None


@pytest.mark.parametrize("options", [{"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 9}, {"exact": True}])
def test_packed_keys_and_exact_rows(options):
    model, processor = mlx_qwen35.load(**options)
    wanted = [[part.token for part in stream_generate(model, processor, prompt, **OPTIONS)] for prompt in PROMPTS]
    done = generate_batch(model, processor, PROMPTS, most_rows=4, **OPTIONS)
    assert [list(answer.tokens) for answer in done] == wanted


@pytest.mark.parametrize("seed", [None, 3])
def test_drafts_alone_and_in_company(seed):
    """With a seed a row drafts always, in turns with the others."""
    model, drafter = random_model("dense"), near("dense", 0.02)
    sampling = Sampling() if seed is None else Sampling(temperature=0.8, seed=seed)
    prompts = [[5 + number, 17, 40, 3][: 2 + number % 3] for number in range(5)]
    options = {"sampling": sampling, "max_tokens": 30, "draft_model": drafter}
    wanted = [[part.token for part in greedy(model, prompt, **options)] for prompt in prompts]
    done = generate_batch(model, Endless(), prompts, most_rows=3, **options)
    assert [list(answer.tokens) for answer in done] == wanted
    with Engine(model, Endless(), most_rows=3) as engine:
        answers = [engine.submit(prompt, **options) for prompt in prompts]
        parts = list(answers[-1])
        assert [list(answer.result(120).tokens) for answer in answers[:-1]] == wanted[:-1]
        assert [part.token for part in parts] == wanted[-1]
        if seed is not None:
            assert parts[-1].drafted_tokens > 0


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.8, seed=3)])
def test_an_end_inside_a_round_of_drafts_is_the_end(sampling):
    """What was drafted beyond it is no part of the answer."""
    model, told = random_model("dense"), Endless()
    prompt, options = [5, 17, 40, 3], {"sampling": sampling, "max_tokens": 30, "draft_model": model}
    with guessed(3):
        free = [part.token for part in stream_generate(model, told, prompt, **options)]
        for number in range(4, 12):  # ends at every place of a round
            told.eos_token_ids = frozenset({free[number]})
            parts = list(stream_generate(model, told, prompt, **options))
            assert parts[-1].finish_reason == "stop"
            (done,) = generate_batch(model, told, [prompt], **options)
            with Engine(model, told) as engine:
                served = engine.submit(prompt, **options)
                tokens, result = [part.token for part in served], served.result(60)
            assert [part.token for part in parts] == tokens == list(done.tokens) == list(result.tokens)
            assert done.finish_reason == result.finish_reason == "stop"


def test_rows_of_all_samplings_side_by_side():
    model = random_model("moe")
    samplings = [
        Sampling(),
        Sampling(temperature=1.0, seed=1),
        Sampling(temperature=0.7, top_k=5, seed=2),
        Sampling(temperature=1.2, top_p=0.8, min_p=0.01, seed=3, repetition_penalty=1.3),
        Sampling(presence_penalty=1.0, logit_bias={4: 2.0}),
        Sampling(frequency_penalty=0.8, temperature=0.7, seed=5),
    ]
    prompts = [[7, 8 + number, 9] for number in range(len(samplings))]
    with Engine(model, Endless(), most_rows=5) as engine:
        answers = [
            engine.submit(prompt, sampling=sampling, max_tokens=25 + 5 * number)
            for number, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True))
        ]
        for number, (prompt, sampling, answer) in enumerate(zip(prompts, samplings, answers, strict=True)):
            alone = [part.token for part in greedy(model, prompt, sampling=sampling, max_tokens=25 + 5 * number)]
            assert list(answer.result(60).tokens) == alone


def test_a_form_in_company(resident):
    model, processor = resident
    schema = {"type": "object", "properties": {"sum": {"type": "integer"}}, "required": ["sum"]}
    formed = {"response_format": schema, "max_tokens": 60}
    alone = [part.token for part in stream_generate(model, processor, "What is 3 + 4?", **OPTIONS | formed)]
    with Engine(model, processor, most_rows=3) as engine:
        free = [engine.submit(prompt, **OPTIONS) for prompt in PROMPTS[:2]]
        answer = engine.submit("What is 3 + 4?", logprobs=True, top_logprobs=3, **OPTIONS | formed)
        done = answer.result(120)
        assert list(done.tokens) == alone
        content = "".join(event.text for event in done.events if isinstance(event, ContentDelta))
        assert content.startswith('{"sum": ') and np.isfinite(done.logprobs).all()
        assert all(np.isfinite(value) for top in done.top_logprobs for _, value in top)
        for prompt, other in zip(PROMPTS, free, strict=False):
            assert list(other.result(60).tokens) == [
                part.token for part in stream_generate(model, processor, prompt, **OPTIONS)
            ]
