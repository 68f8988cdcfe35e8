"""Rounds of rows that copy, among others: whose turn it is, what it costs the others, and that answers stay."""

import numpy as np
import pytest

from mlx_qwen35.engine.among import MOST_ROWS, Among
from mlx_qwen35.engine.engine import Engine
from mlx_qwen35.generation import generate_batch
from mlx_qwen35.sampling import Sampling
from tests.speculative.test_few_tokens import quantized
from tests.talkers import PROMPT, Endless, greedy, random_model

FEW = Sampling(logit_bias={token: 50.0 for token in (5, 17, 33)})  # words, so that much was there before
LONG = 40


def test_nobody() -> None:
    among = Among(0.5)
    among.stepped(1.0)
    for matches in ({}, {1: LONG}, {1: 3, 2: 15}, {1: None, 2: None}, {key: LONG for key in range(MOST_ROWS + 1)}):
        assert among.next(matches) is None


def test_where_all_copy_they_take_turns() -> None:
    among, order = Among(0.0), []
    for _ in range(9):
        key = among.next({"a": LONG, "b": 16, "c": 90})
        order.append(key)
        among.copied(key, 20, 0.04)
    assert sorted(order[:3]) == ["a", "b", "c"] and order[:3] * 3 == order


@pytest.mark.parametrize("pause", [0.0, 0.2, 0.45, 2.0])
def test_what_it_costs_one_that_does_not_copy(pause: float) -> None:
    """On average `pause` times a step's time, and no more than a round and a half at once."""
    among, rounds, steps, longest, last = Among(pause), 0.0, 0.0, 0.0, 0.0
    for turn in range(2000):
        key = among.next({"a": LONG, "b": LONG, "c": 2 + turn % 9})
        assert key in (None, "a", "b")
        if key is None:
            among.stepped(0.01)
            steps, last = steps + 0.01, 0.0
        else:
            among.copied(key, 20, 0.035)
            rounds, last = rounds + 0.035, last + 0.035
            longest = max(longest, last)
    assert (0.9 * pause * steps <= rounds <= 1.05 * pause * steps + 0.1) and longest <= 0.08


def test_a_round_that_brings_little_is_not_tried_again_soon() -> None:
    among, gaps = Among(1.0), []
    for _ in range(7):
        for gap in range(200):
            if among.next({"a": LONG, "b": LONG if gap < 0 else 3}) == "a":
                break
            among.stepped(0.1)
        gaps.append(gap)
        among.copied("a", 1, 0.05)
    assert gaps[1:] == sorted(gaps[1:]) and gaps[1] >= 8 and 120 <= gaps[-1] <= 130
    among.stepped(0.1)
    for _ in range(130):
        among.stepped(0.1)
    assert among.next({"a": LONG, "b": 3}) == "a"
    among.copied("a", 16, 0.05)  # it pays again
    among.stepped(0.1)
    assert among.next({"a": LONG, "b": 3}) == "a"


def test_who_has_left_is_forgotten() -> None:
    among = Among(1.0)
    among.copied("a", 1, 0.01)
    assert among.next({"a": LONG, "b": LONG}) is None  # it rests, and nothing was saved up for the other
    assert among.next({"b": LONG, "c": LONG}) in ("b", "c")
    among.copied("b", 20, 0.01)
    assert among.next({"a": LONG, "b": LONG}) == "a"


@pytest.mark.parametrize("kind", ["dense", "moe", "4 bits"])
def test_answers_are_those_that_each_has_alone(kind: str) -> None:
    model = quantized(group_size=32, bits=4) if kind == "4 bits" else random_model(kind)
    prompts = [PROMPT, [*PROMPT, 5, 17], [9, *PROMPT[::-1]]]
    options = {"max_tokens": 120, "sampling": FEW}
    alone = [[part.token for part in greedy(model, prompt, **options, lookup=False)] for prompt in prompts]
    other = [part.token for part in greedy(model, PROMPT, max_tokens=120, lookup=False)]
    with Engine(model, Endless(), most_rows=4) as engine:
        with engine.expecting():
            answers = [engine.submit(prompt, **options) for prompt in prompts]
            answers.append(engine.submit(PROMPT, max_tokens=120, sampling=Sampling(), lookup=False))
        parts = [list(answer) for answer in answers]
    assert [[part.token for part in each if part.token is not None] for each in parts] == [*alone, other]
    copied = [each[-1].drafts.get("copy", (0, 0)) for each in parts]
    assert sum(right for _, right in copied[:3]) > 50 and copied[3] == (0, 0)


def test_batches_copy_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen, copied = random_model("dense"), [], Among.copied
    monkeypatch.setattr(Among, "copied", lambda *told: seen.append(told[2]) or copied(*told))
    prompts = [PROMPT, PROMPT[::-1]]
    options = {"max_tokens": 100, "sampling": FEW}
    found = generate_batch(model, Endless(), prompts, **options)
    alone = [[part.token for part in greedy(model, prompt, **options, lookup=False)] for prompt in prompts]
    assert [list(each.tokens) for each in found] == alone and np.max(seen) > 8
