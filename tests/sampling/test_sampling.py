"""Sampling against NumPy: the penalties exactly, the draws by chi-square, and the order in which the steps run."""

import math
import pickle
from copy import copy
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35.errors import ArgumentError, CheckpointError
from mlx_qwen35.sampling import History, Sampler, Sampling
from mlx_qwen35.sampling.largest import BLOCK
from mlx_qwen35.sampling.steps import drawn

VOCAB = 40
DRAWS = 20_000


def some_logits(seed: int, vocab: int = VOCAB) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 2, vocab).astype(np.float32)


def penalised(logits: np.ndarray, sampling: Sampling, prompt: list[int], answer: list[int]) -> np.ndarray:
    """The plain reading of the rules, one token at a time."""
    logits = logits.astype(np.float64).copy()
    for token, amount in (sampling.logit_bias or {}).items():
        logits[token] += amount
    seen = [*prompt, *answer]
    if sampling.repetition_context_size is not None:
        seen = seen[-sampling.repetition_context_size :]
    for token in set(seen):
        penalty = sampling.repetition_penalty
        logits[token] = logits[token] * penalty if logits[token] < 0 else logits[token] / penalty
    for token in set(answer):
        logits[token] -= sampling.presence_penalty
    for token in answer:
        logits[token] -= sampling.frequency_penalty
    return logits


def distribution(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Probabilities [V] after temperature, top-k, top-p and min-p, in that order."""
    scaled = logits.astype(np.float64) / sampling.temperature
    order = np.argsort(-scaled, kind="stable")
    if sampling.top_k:
        order = order[: sampling.top_k]
    weights = np.exp(scaled[order] - scaled[order].max())
    weights /= weights.sum()
    kept, mass = 0, 0.0
    while kept < len(order) and mass < sampling.top_p:
        mass += weights[kept]
        kept += 1
    order, weights = order[:kept], weights[:kept]
    keep = weights >= sampling.min_p * weights[0]
    probs = np.zeros(len(scaled))
    probs[order[keep]] = weights[keep] / weights[keep].sum()
    return probs


def assert_drawn_from(tokens: np.ndarray, probs: np.ndarray) -> None:
    """Chi-square at one in 100,000 (Wilson-Hilferty), and nothing outside the support."""
    counts = np.bincount(tokens, minlength=len(probs))
    assert counts[probs == 0].sum() == 0
    expected = probs[probs > 0] * len(tokens)
    statistic = ((counts[probs > 0] - expected) ** 2 / expected).sum()
    freedom = max(len(expected) - 1, 1)
    limit = freedom * (1 - 2 / (9 * freedom) + 4.265 * math.sqrt(2 / (9 * freedom))) ** 3
    assert statistic < limit


def draw(logits: np.ndarray, sampling: Sampling, draws: int = DRAWS) -> np.ndarray:
    rows = mx.broadcast_to(mx.array(logits), (draws, len(logits)))
    history = History(sampling, [[]] * draws, len(logits)) if sampling.needs_history else None
    return np.array(Sampler(sampling)(rows, history)[0])


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0},
        {"temperature": 0.6},
        {"temperature": 2.5, "top_k": 7},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 0.7, "top_k": 9, "top_p": 0.85},
        {"temperature": 1.3, "min_p": 0.1},
        {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.08},
        {"temperature": 1.0, "top_k": 1},
        {"temperature": 1.0, "top_p": 1e-6},
        {"temperature": 1.0, "top_k": VOCAB + 5},
        {"temperature": 1.0, "logit_bias": {3: 4.0, 5: -math.inf}},
    ],
    ids=str,
)
def test_draws_follow_the_distribution(settings):
    sampling = Sampling(**settings, seed=11)
    for seed in (1, 2):
        logits = some_logits(seed)
        probs = distribution(penalised(logits, sampling, [], []), sampling)
        assert_drawn_from(draw(logits, sampling), probs)


def test_top_k_comes_before_top_p():
    # 0.4 0.3 0.2 0.1: of the first three, 0.4 and 0.3 are 0.78 of the mass; of all four they are 0.7
    logits = np.log(np.array([0.1, 0.3, 0.4, 0.2], dtype=np.float32))
    both = draw(logits, Sampling(temperature=1.0, top_k=3, top_p=0.75, seed=1))
    assert set(both.tolist()) == {1, 2}
    only_p = draw(logits, Sampling(temperature=1.0, top_p=0.75, seed=1))
    assert set(only_p.tolist()) == {1, 2, 3}


def test_top_p_is_taken_after_temperature():
    logits = np.log(np.array([0.5, 0.3, 0.2], dtype=np.float32))
    hot = draw(logits, Sampling(temperature=100.0, top_p=0.6, seed=1))  # nearly uniform: two are needed
    cold = draw(logits, Sampling(temperature=0.1, top_p=0.6, seed=1))
    assert set(hot.tolist()) == {0, 1} and set(cold.tolist()) == {0}


def test_what_cannot_come_is_not_drawn_where_fewer_than_top_k_can():
    logits = np.full(100 * BLOCK + 3, -np.inf, dtype=np.float32)
    logits[-1] = 1.0
    drawn_tokens = draw(logits, Sampling(temperature=1.0, top_k=10, seed=2), 50)
    assert set(drawn_tokens.tolist()) == {len(logits) - 1}


def test_greedy_takes_the_largest_and_ignores_the_rest():
    logits = some_logits(3)
    sampling = Sampling(temperature=0.0, top_k=5, top_p=0.1, min_p=0.5)
    assert set(draw(logits, sampling, 100).tolist()) == {int(logits.argmax())}


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.7},
        {"repetition_penalty": 0.8},
        {"repetition_penalty": 1.7, "repetition_context_size": 3},
        {"presence_penalty": 1.5},
        {"frequency_penalty": 0.75},
        {"frequency_penalty": -1.25, "presence_penalty": 0.5, "repetition_penalty": 1.2},
        {"repetition_penalty": 1.3, "presence_penalty": -0.5, "logit_bias": {0: 2.0, 1: -3.0}},
    ],
    ids=str,
)
def test_penalties_with_a_history_per_row(settings):
    sampling = Sampling(**settings)
    prompts = [[1, 2, 2, 7], [0], []]
    answers = [[], [], []]
    history = History(sampling, prompts, VOCAB)
    sampler = Sampler(sampling)
    rng = np.random.default_rng(5)
    for _ in range(6):
        logits = rng.normal(0, 2, (3, VOCAB)).astype(np.float32)
        expected = np.stack([penalised(logits[i], sampling, prompts[i], answers[i]) for i in range(3)])
        token, logprobs = sampler(mx.array(logits), history)
        history.append(token)
        norm = np.log(np.exp(expected).sum(axis=-1, keepdims=True))
        np.testing.assert_allclose(np.array(logprobs), expected - norm, atol=2e-5)
        assert token.tolist() == expected.argmax(axis=-1).tolist()
        for answer, value in zip(answers, token.tolist(), strict=True):
            answer.append(value)


def test_a_greedy_guess_is_what_a_call_would_take():
    """Bias and penalties count for it, and rows are apart."""
    sampling = Sampling(repetition_penalty=3.0, presence_penalty=2.0, logit_bias={7: 6.0, 9: -math.inf})
    rows = np.stack([some_logits(seed) for seed in (1, 2, 3)])
    best = rows.argmax(axis=-1)
    history = History(sampling, [[int(token)] for token in best], VOCAB)
    history.append(mx.array([1, 2, 7]))
    wanted, _ = Sampler(sampling)(mx.array(rows), history)
    guess, weights = Sampler(sampling).guess(mx.array(rows), history)
    assert guess.tolist() == wanted.tolist() != best.tolist() and guess.shape == (3,)
    assert weights is None


def test_logprobs_are_before_temperature_and_truncation():
    logits = some_logits(4)
    sampling = Sampling(temperature=0.3, top_k=3, top_p=0.5, min_p=0.2, seed=0)
    _, logprobs = Sampler(sampling)(mx.array(logits)[None])
    expected = logits - np.log(np.exp(logits.astype(np.float64)).sum())
    np.testing.assert_allclose(np.array(logprobs)[0], expected, atol=1e-5)


def test_half_precision_logits_are_drawn_in_float32():
    logits = mx.array(some_logits(6)).astype(mx.bfloat16)[None]
    token, logprobs = Sampler(Sampling(temperature=1.0, seed=1))(logits)
    assert logprobs.dtype == mx.float32
    np.testing.assert_allclose(np.exp(np.array(logprobs)).sum(), 1.0, atol=1e-5)


def sequence(sampler: Sampler, steps: int = 30) -> list[int]:
    logits = mx.zeros((1, 1000))
    return [sampler(logits)[0].item() for _ in range(steps)]


def test_a_seed_is_reproducible_and_apart_from_the_global_state():
    first = sequence(Sampler(Sampling(temperature=1.0, seed=7)))
    mx.random.seed(123)
    before = mx.random.state[0].tolist()
    assert sequence(Sampler(Sampling(temperature=1.0, seed=7))) == first
    assert mx.random.state[0].tolist() == before
    assert sequence(Sampler(Sampling(temperature=1.0, seed=8))) != first
    assert len(set(first)) > 20  # the key moves on


def test_without_a_seed_two_runs_differ():
    mx.random.seed(1)
    first = sequence(Sampler(Sampling(temperature=1.0)))
    mx.random.seed(1)
    assert sequence(Sampler(Sampling(temperature=1.0))) != first


def test_a_step_can_be_queued_before_its_token_is_read():
    # twenty steps in one lazy graph draw what twenty read steps draw
    sampling = Sampling(temperature=0.9, top_k=10, repetition_penalty=1.4, presence_penalty=0.7, seed=3)
    logits = mx.array(some_logits(9))[None]

    def run(read: bool) -> list[int]:
        sampler, history, tokens = Sampler(sampling), History(sampling, [[1, 2]], VOCAB), []
        for _ in range(20):
            token, _ = sampler(logits, history)
            history.append(token)
            if read:
                mx.eval(token)
            tokens.append(token)
        return mx.concatenate(tokens).tolist()

    assert run(read=False) == run(read=True)


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 1.0}, {"temperature": 0.8, "top_k": 6, "top_p": 0.9}], ids=str
)
def test_a_mask_comes_before_everything_else(settings):
    """In a call, in the weights of drafts and in a guess: as if what may not come had no logits."""
    sampling = Sampling(**settings, logit_bias={4: 3.0, 11: 1.0}, presence_penalty=0.5, seed=2)
    allowed = [0, 4, 11, 33, 39]
    words = np.zeros(2, dtype=np.uint32)
    for token in allowed:
        words[token // 32] |= np.uint32(1 << token % 32)
    logits = np.stack([some_logits(seed) for seed in (1, 2)])
    left = np.full_like(logits, -np.inf)
    left[:, allowed] = logits[:, allowed]
    history = History(sampling, [[], []], VOCAB)
    history.append(mx.array([11, 7]))
    wanted, probable = Sampler(sampling)(mx.array(left), history)
    for given in (words, np.stack([words, words])):
        token, logprobs = Sampler(sampling)(mx.array(logits), history, given)
        assert token.tolist() == wanted.tolist() and mx.array_equal(logprobs, probable)
        guess, weights = Sampler(sampling).guess(mx.array(logits), history, given)
        assert all(token in allowed for token in guess.tolist())
        if sampling.temperature:
            assert mx.array_equal(weights, Sampler(sampling).weights(mx.array(left), history)[0])
            assert all(np.isneginf(np.delete(np.array(weights), allowed, axis=1)).flatten())


def test_what_has_no_weight_is_never_drawn_though_it_be_all_but_one():
    weights = np.full((500, 3000), -np.inf, dtype=np.float32)
    weights[np.arange(500), np.arange(500) * 5] = -80.0
    assert drawn(mx.array(weights), mx.random.key(1)).tolist() == [row * 5 for row in range(500)]


def test_rows_with_keys_of_their_own_draw_what_each_draws_alone():
    keys = mx.stack([mx.random.key(seed) for seed in range(7)])
    weights = mx.random.normal((7, 33), key=mx.random.key(99))
    alone = [drawn(weights[row : row + 1], keys[row]).item() for row in range(7)]
    assert drawn(weights, keys).tolist() == alone


def test_each_of_several_answers_has_a_seed_of_its_own():
    sampling = Sampling(temperature=0.7, seed=5)
    assert sampling.for_answer(0) == sampling
    assert [sampling.for_answer(index).seed for index in range(3)] == [5, 6, 7]
    assert sampling.for_answer(2).temperature == 0.7
    assert Sampling(seed=2**64 - 1).for_answer(1).seed == 0
    assert Sampling().for_answer(3) == Sampling()


def test_from_generation_config():
    qwen = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": [1, 2]}
    assert Sampling.from_generation_config(qwen) == Sampling(temperature=0.6, top_k=20, top_p=0.95)
    assert Sampling.from_generation_config({**qwen, "do_sample": False}).temperature == 0
    assert Sampling.from_generation_config({}) == Sampling()
    assert Sampling.from_generation_config({"do_sample": True}).temperature == 1.0
    assert Sampling.from_generation_config({"temperature": 0.6}).temperature == 0.6
    changed = Sampling.from_generation_config(qwen, temperature=0.0, top_p=None, seed=4)
    assert changed == Sampling(temperature=0.0, top_k=20, top_p=0.95, seed=4)
    assert Sampling.from_generation_config({"do_sample": True, "top_p": None}).top_p == 1.0


@pytest.mark.parametrize("bad", [{"temperature": "hot"}, {"top_k": 2.5}, {"top_p": 7.0}, {"min_p": True}])
def test_a_wrong_generation_config_is_named(bad):
    with pytest.raises(CheckpointError, match=f"generation_config.json.*{next(iter(bad))}"):
        Sampling.from_generation_config({"do_sample": True, **bad})


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"min_p": 1.5},
        {"repetition_penalty": 0.0},
        {"repetition_context_size": 0},
        {"seed": -1},
        {"logit_bias": {3: math.inf}},
        {"logit_bias": {3: 1.0, 5: math.nan}},
    ],
    ids=str,
)
def test_a_wrong_value_is_refused_by_name(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Sampling(**bad)


def test_a_bias_outside_the_vocabulary_and_a_missing_history_are_refused():
    logits = mx.zeros((1, VOCAB))
    with pytest.raises(ValueError, match="logit_bias"):
        Sampler(Sampling(logit_bias={VOCAB: 1.0}))(logits)
    with pytest.raises(ValueError, match="History"):
        Sampler(Sampling(presence_penalty=1.0))(logits)


@pytest.mark.parametrize(
    "values, named, says",
    [
        ((0.5,), {}, r"by name: write Sampling\(temperature=0.5\)"),
        (({"temperature": 1},), {}, "by name"),
        ((), {"temp": 0.5}, "Sampling has no temp; did you mean temperature"),
        ((), {"topk": 5}, "Sampling has no topk; did you mean top_k"),
        ((), {"zzz": 5}, "Sampling has no zzz; there are .*temperature, top_k"),
        ((), {"temperature": "0.5"}, "temperature is '0.5', of type str; give a number"),
        ((), {"temperature": True}, "temperature is True; give a number"),
        ((), {"temperature": None}, "temperature is None; give a number"),
        ((), {"temperature": math.nan}, "temperature is nan; give a finite number"),
        ((), {"top_p": [0.9]}, "top_p is .0.9., of type list; give a number"),
        ((), {"top_k": 5.0}, "top_k is 5.0, of type float; give a whole number"),
        ((), {"top_k": True}, "top_k is True; give a whole number"),
        ((), {"seed": "7"}, "seed is '7'"),
        ((), {"repetition_context_size": 0}, "repetition_context_size is 0; it must be 1 or more, or None for all"),
        ((), {"logit_bias": [5]}, "logit_bias is .5., of type list; give a dict"),
        ((), {"logit_bias": {"5": 1.0}}, "logit_bias names token '5'"),
        ((), {"logit_bias": {5: "1"}}, "logit_bias of token 5 .* is '1'"),
    ],
)
def test_what_is_no_sampling_says_what_is(values, named, says):
    with pytest.raises(ArgumentError, match=says):
        Sampling(*values, **named)


def test_samplings_are_copied_compared_and_told_from_each_other():
    sampling = Sampling(temperature=np.float32(0.5), top_k=np.int64(3), seed=5)
    assert pickle.loads(pickle.dumps(sampling)) == copy(sampling) == sampling != replace(sampling, top_k=4)
    assert hash(sampling) == hash(copy(sampling)) and "top_k=" in repr(sampling)
    with pytest.raises(ArgumentError, match="no tok_k; did you mean top_k"):
        replace(sampling, tok_k=4)
