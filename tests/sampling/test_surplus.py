"""A head with more rows than the tokenizer has tokens: nothing is ever drawn from the surplus, whoever draws."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35.errors import ArgumentError
from mlx_qwen35.generation import generate_batch, stream_generate
from mlx_qwen35.sampling import Sampler, Sampling
from tests.drafted import guessed
from tests.talkers import PROMPT, VOCAB, Endless, Letters, random_model

TOKENS = 61


class Few(Letters):
    vocab_size = TOKENS


class Processor(Endless):
    tokenizer = Few()


DRAWN = Sampling(temperature=2.0, seed=1)
CUT = Sampling(temperature=2.0, top_k=12, top_p=0.9, min_p=0.01, repetition_penalty=1.2, presence_penalty=0.5, seed=2)


@pytest.fixture(scope="module")
def model():
    return random_model("dense")


def recomputed(model, tokens: list[int], count: int) -> list[int]:
    tokens = list(tokens)
    for _ in range(count):
        tokens.append(mx.argmax(model(mx.array([tokens]))[0, -1, :TOKENS]).item())
    return tokens[-count:]


def test_the_model_would_say_them(model):
    """Or the tests below would show nothing."""
    answer = [part.token for part in stream_generate(model, Endless(), PROMPT, sampling=DRAWN, max_tokens=40)]
    assert any(token >= TOKENS for token in answer)


@pytest.mark.parametrize("sampling", [Sampling(), DRAWN, CUT], ids=str)
@pytest.mark.parametrize("drafts", [0, 3])
def test_an_answer_has_tokens_only(model, sampling, drafts):
    options = {"sampling": sampling, "max_tokens": 40}
    if drafts:  # by another model, which likes the surplus too
        options |= {"draft_model": random_model("moe"), "num_draft_tokens": drafts}
    with guessed(drafts) as guesses:
        parts = list(stream_generate(model, Processor(), PROMPT, **options))
    tokens = [part.token for part in parts]
    assert len(tokens) == 40 and max(tokens) < TOKENS
    assert bool(guesses) == bool(drafts) and max(guesses, default=0) < TOKENS
    for part in parts:
        assert part.logprobs.shape == (TOKENS,)
        np.testing.assert_allclose(np.exp(np.array(part.logprobs)).sum(), 1, atol=1e-5)
    if sampling.temperature == 0:
        assert tokens == recomputed(model, PROMPT, 40)


@pytest.mark.parametrize("sampling", [Sampling(), CUT], ids=str)
def test_a_batch_has_tokens_only(model, sampling):
    prompts = [PROMPT, [4], [9, VOCAB - 2, 7]]  # a prompt may have one
    answers = generate_batch(model, Processor(), prompts, sampling=sampling, max_tokens=20)
    assert max(max(answer.tokens) for answer in answers) < TOKENS
    if sampling.temperature == 0:
        assert list(answers[2].tokens) == recomputed(model, prompts[2], 20)


def test_log_probabilities_are_those_of_the_tokens_alone():
    logits = np.random.default_rng(1).normal(0, 2, (2, VOCAB)).astype(np.float32)
    whole = Sampler(Sampling())(mx.array(logits[:, :TOKENS]))[1]
    assert mx.array_equal(Sampler(Sampling(), TOKENS)(mx.array(logits))[1], whole)
    assert mx.array_equal(Sampler(Sampling(temperature=1.0), TOKENS).weights(mx.array(logits))[1], whole)


def test_a_bias_on_what_is_no_token_is_refused(model):
    with pytest.raises(ArgumentError, match="logit_bias names token 61; the vocabulary has ids 0 to 60"):
        next(stream_generate(model, Processor(), PROMPT, sampling=Sampling(logit_bias={TOKENS: 1.0})))
