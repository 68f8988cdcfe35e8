"""Rows drawn together against the Sampler of each row alone: the same bits, whoever is beside them, and launches."""

import math
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.graph import PretendedMetal, shape_only, trace
from mlx_qwen35.errors import ArgumentError
from mlx_qwen35.sampling import History, Sampler, Sampling
from mlx_qwen35.sampling.largest import BLOCK
from mlx_qwen35.sampling.rows import RowsSampler
from mlx_qwen35.sampling.thinking import Tags, ThinkingBudget
from tests.soak import examples

SMALL = 70
LARGE = 50 * BLOCK + 17  # so large that top_ids looks at blocks
TAGS = Tags(opening=1, ending=2, closing=(5, 2, 6))
PUBLISHED = Sampling(temperature=0.6, top_k=20, top_p=0.95)

Row = tuple[Sampling, list[int], ThinkingBudget | None]


def pairs(rows: list[Row], vocab: int, tokens: int | None = None) -> list[tuple[Sampler, History]]:
    return [
        (Sampler(sampling, tokens), History(sampling, [prompt], vocab, budget=budget))
        for sampling, prompt, budget in rows
    ]


def logits_of(rows: int, vocab: int, step: int) -> mx.array:
    return mx.array(np.random.default_rng(step).normal(0, 1.5, (rows, vocab)).astype(np.float32))


def masks_of(rows: int, vocab: int, step: int) -> list[np.ndarray | None]:
    rng = np.random.default_rng(step)
    size = -(-vocab // 32)
    words = rng.integers(0, 2**32, (rows, size), dtype=np.uint32)
    words[:, 0] |= 1
    return [None if rng.random() < 0.4 else row for row in words]


def assert_as_alone(
    rows: list[Row], vocab: int, steps: int, *, tokens: int | None = None, masked: bool = False
) -> None:
    """Tokens, log probabilities and, after leaving, keys and histories."""
    together, alone = pairs(rows, vocab, tokens), pairs(rows, vocab, tokens)
    sampler = RowsSampler(together)
    for step in range(steps):
        logits = logits_of(len(rows), vocab, step)
        masks = masks_of(len(rows), tokens or vocab, step) if masked else None
        token, logprobs = sampler(logits, masks)
        assert token.dtype == mx.uint32 and token.shape == (len(rows),)
        for row, (own, history) in enumerate(alone):
            wanted, probable = own(logits[row : row + 1], history, masks[row] if masks else None)
            history.append(wanted)
            assert token[row].item() == wanted.item()
            assert mx.array_equal(logprobs[row], probable[0])
    for (left, _), history, (own, wanted) in zip(together, sampler.leave(), alone, strict=True):
        logits = logits_of(1, vocab, steps)
        assert left.key.tolist() == own.key.tolist()
        assert left(logits, history)[0].item() == own(logits, wanted)[0].item()
        for name in ("seen", "recent", "answered", "counts"):
            mine, its = getattr(history, name), getattr(wanted, name)
            assert (mine is None and its is None) or mx.array_equal(mine, its)
        assert history.rows == 1


@pytest.mark.parametrize(
    "shared",
    [
        {},
        {"temperature": 1.0},
        {"temperature": 0.8, "top_k": 9},
        {"temperature": 0.8, "top_p": 0.7},
        {"temperature": 1.2, "min_p": 0.1},
        {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.02},
        {"temperature": 0.9, "repetition_penalty": 1.3, "presence_penalty": 0.6},
        {"temperature": 0.9, "frequency_penalty": 1.1},
        {"temperature": 0.9, "repetition_penalty": 1.5, "repetition_context_size": 3, "top_k": 4},
        {"repetition_penalty": 1.8, "logit_bias": {3: 2.0, 5: -math.inf}},
    ],
    ids=str,
)
@pytest.mark.parametrize("vocab", [SMALL, LARGE])
def test_rows_of_one_sampling_draw_what_each_draws_alone(shared, vocab):
    rows: list[Row] = [(Sampling(**shared, seed=seed), [seed, seed + 3], None) for seed in range(5)]
    assert_as_alone(rows, vocab, 6)
    assert_as_alone(rows, vocab, 3, masked=True, tokens=vocab - 13)
    assert_as_alone(rows[:1], vocab, 3, masked=True)


def test_rows_that_differ_in_numbers_only_are_one_group():
    base = Sampling(top_k=20, temperature=0.6, top_p=0.95, min_p=0.1, repetition_penalty=1.1, presence_penalty=0.5)
    base = replace(base, frequency_penalty=0.2)
    others = [{"temperature": 1.7}, {"top_p": 0.4}, {"min_p": 0.0}, {"repetition_penalty": 0.7}]
    others += [{"presence_penalty": -1.0}, {"frequency_penalty": 0.5}, {"seed": 4}]
    rows: list[Row] = [(replace(base, **{"seed": 9, **other}), [1, 2], None) for other in others]
    assert_as_alone(rows, SMALL, 6)
    assert len(RowsSampler(pairs(rows, SMALL))._groups) == 1


def samplings() -> st.SearchStrategy[Sampling]:
    return st.builds(
        Sampling,
        temperature=st.sampled_from([0.0, 0.0, 0.5, 1.0, 2.0]),
        top_k=st.sampled_from([0, 3, 20, SMALL + 1]),
        top_p=st.sampled_from([1.0, 0.9, 0.3]),
        min_p=st.sampled_from([0.0, 0.2]),
        repetition_penalty=st.sampled_from([1.0, 1.4, 0.8]),
        repetition_context_size=st.sampled_from([None, 2, 5]),
        presence_penalty=st.sampled_from([0.0, 0.7]),
        frequency_penalty=st.sampled_from([0.0, 0.4]),
        logit_bias=st.sampled_from([None, {0: 1.5}, {2: -math.inf, 69: 0.5}]),
        seed=st.integers(0, 2**64 - 1),
    )


def budgets() -> st.SearchStrategy[ThinkingBudget | None]:
    return st.sampled_from([None, (0, True), (2, True), (2, False), (3, True)]).map(
        lambda given: None if given is None else ThinkingBudget(given[0], TAGS, [given[1]])
    )


@settings(max_examples=examples(40))
@given(
    st.lists(st.tuples(samplings(), st.lists(st.integers(0, SMALL - 1), max_size=4), budgets()), min_size=1, max_size=6)
)
def test_rows_of_any_kind_draw_what_each_draws_alone(rows):
    assert_as_alone(rows, SMALL, 5)


def test_rows_join_and_leave_and_keep_their_draws():
    kinds = [PUBLISHED, Sampling(temperature=1.0, repetition_penalty=1.2), Sampling(), PUBLISHED]
    rows: list[Row] = [(replace(kind, seed=seed), [seed], None) for seed, kind in enumerate(kinds)]
    alone = pairs(rows, SMALL)
    wanted: list[list[int]] = [[] for _ in rows]
    for step in range(9):
        logits = logits_of(4, SMALL, step)
        for row, (own, history) in enumerate(alone):
            token, _ = own(logits[row : row + 1], history)
            history.append(token)
            wanted[row].append(token.item())
    present = pairs(rows, SMALL)
    found: list[list[int]] = [[] for _ in rows]
    courses = [[0, 1], [0, 1, 2], [1, 3], [3, 0, 2], [0, 1, 2, 3], [2], [3, 1]]
    for course in courses * 3:
        taken = [row for row in course if len(found[row]) < 9]
        if not taken:
            continue
        sampler = RowsSampler([present[row] for row in taken])
        logits = mx.stack([logits_of(4, SMALL, len(found[row]))[row] for row in taken])
        for row, token in zip(taken, sampler(logits)[0].tolist(), strict=True):
            found[row].append(token)
        for row, history in zip(taken, sampler.leave(), strict=True):
            present[row] = present[row][0], history
    assert found == wanted


def test_histories_that_were_given_stay_as_they_were():
    rows: list[Row] = [(Sampling(presence_penalty=1.0, seed=seed), [], None) for seed in (1, 2)]
    given = pairs(rows, SMALL)
    sampler = RowsSampler(given)
    sampler(logits_of(2, SMALL, 0))
    assert all(not history.answered.any().item() for _, history in given)
    assert all(history.answered.sum().item() == 1 for history in sampler.leave())


def test_a_row_that_left_holds_no_memory_of_the_others():
    sampling, vocab = Sampling(presence_penalty=1.0, repetition_penalty=1.1), 1_000_000
    sampler = RowsSampler(pairs([(sampling, [1], None)] * 8, vocab))
    sampler(logits_of(8, vocab, 0))
    kept = sampler.leave()[3]
    mx.eval(kept.seen, kept.answered)
    before = mx.get_active_memory()
    del kept
    assert before - mx.get_active_memory() < 3 * vocab


def test_rows_of_the_head_that_no_token_has_are_never_drawn():
    vocab, tokens = SMALL, 60
    logits = np.zeros((3, vocab), dtype=np.float32)
    logits[:, tokens:] = 50.0
    kinds = [Sampling(), Sampling(temperature=1.0, seed=1), Sampling(temperature=5.0, repetition_penalty=2.0, seed=1)]
    sampler = RowsSampler(pairs([(kind, [], None) for kind in kinds], vocab, tokens))
    for _ in range(50):
        token, logprobs = sampler(mx.array(logits))
        assert max(token.tolist()) < tokens and logprobs.shape == (3, tokens)
        np.testing.assert_allclose(np.exp(np.array(logprobs)).sum(axis=-1), 1, atol=1e-5)


def test_what_does_not_fit_the_rows_is_refused_and_moves_nothing():
    given = pairs([(replace(PUBLISHED, seed=seed), [], None) for seed in (1, 2)], SMALL)
    sampler, none = RowsSampler(given), np.zeros(3, dtype=np.uint32)
    keys = [own.key.tolist() for own, _ in given]
    for rows, masks in [(3, None), (2, [None])]:
        with pytest.raises(ValueError, match="one of each a row"):
            sampler(mx.zeros((rows, SMALL)), masks)
    for bad in (none, np.ones(2, np.uint32), np.ones(1, np.uint32), np.ones(3, np.int64)):
        with pytest.raises(ArgumentError, match="a mask"):
            sampler(mx.zeros((2, SMALL)), [None, bad])
    sampler.leave()
    assert [own.key.tolist() for own, _ in given] == keys


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        PUBLISHED,
        Sampling(temperature=1.0),
        replace(PUBLISHED, min_p=0.1, repetition_penalty=1.1, presence_penalty=1.5, logit_bias={3: 1.0}),
    ],
    ids=str,
)
def test_eight_rows_launch_no_more_than_one(sampling):
    """Counted for Metal (benchmarks/graph.py), and one as many as its Sampler."""
    vocab = 248_320
    spread = [replace(sampling, seed=seed, temperature=sampling.temperature * (1 + seed / 9)) for seed in range(8)]

    def launches(samplings: list[Sampling], together: bool) -> int:
        rows = pairs([(one, [1, 2], None) for one in samplings], vocab, 248_077)
        joined = RowsSampler(rows)
        for group in joined._groups:  # joining the rows is no part of a step
            mx.eval(group._keys, group._history.seen, group._history.answered)

        def call(logits: mx.array) -> list[mx.array | None]:
            if together:
                token, logprobs = joined(logits)
                history = joined._groups[0]._history
            else:
                own, history = rows[0]
                token, logprobs = own(logits, history)
                history = history.then(token)
            return [token, logprobs, history.seen, history.answered]

        with PretendedMetal():
            found = trace(call, {"logits": shape_only((len(samplings), vocab), mx.bfloat16)})
        return sum(launch.count for launch in found)

    alone = launches(spread[:1], together=False)
    assert launches(spread[:1], together=True) == launches(spread, together=True) == alone


DECIDED_BY_FEW = [
    Sampling(temperature=0), PUBLISHED, Sampling(temperature=1.3, top_k=7, top_p=0.8, min_p=0.05),
    replace(PUBLISHED, temperature=1.0),
]  # fmt: skip


def best_of(logits: mx.array, count: int, tokens: int) -> tuple[mx.array, mx.array]:
    """In no order, as from several ranks."""
    ids = np.argsort(-np.array(logits[:, :tokens]), axis=-1, kind="stable")[:, :count]
    ids = mx.array(np.random.default_rng(count).permuted(ids, axis=1).astype(np.uint32))
    return mx.take_along_axis(logits, ids, axis=-1), ids


@pytest.mark.parametrize("tokens", [None, SMALL - 9])
def test_the_largest_logits_alone_draw_the_same_tokens(tokens: int | None) -> None:
    rows: list[Row] = [(replace(sampling, seed=seed), [], None) for seed, sampling in enumerate(DECIDED_BY_FEW)]
    samplers = [[sampler for sampler, _ in pairs(rows, SMALL, tokens)] for _ in range(3)]
    together = RowsSampler([(sampler, History(sampler.sampling, [[]], SMALL)) for sampler in samplers[2]])
    assert together.best_wanted(SMALL) == (20, tokens or SMALL)
    for step in range(12):
        logits = logits_of(len(rows), SMALL, step)
        drawn, _ = together(logits, best=best_of(logits, 20, tokens or SMALL))
        for row, (whole, few) in enumerate(zip(*samplers[:2], strict=True)):
            own = logits[row : row + 1]
            count, width = few.best_wanted(SMALL)
            right, logprobs = whole(own)
            token, told = few(own, best=best_of(own, count, width))
            assert token.item() == right.item() == drawn[row].item() and token.dtype == right.dtype
            assert mx.array_equal(told, logprobs)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0),
        Sampling(temperature=1.0, top_k=20),  # drawn in the order in which they come
        Sampling(temperature=1.0, top_k=500, top_p=0.9),
        replace(PUBLISHED, presence_penalty=1.5),
        replace(PUBLISHED, logit_bias={3: 1.0}),
        Sampling(temperature=0, repetition_penalty=1.1),
    ],
)
def test_where_others_decide_too_all_are_wanted(sampling: Sampling) -> None:
    assert Sampler(sampling).best_wanted(SMALL) is None
    both = [(Sampler(each), History(each, [[]], SMALL)) for each in (PUBLISHED, sampling)]
    assert RowsSampler(both).best_wanted(SMALL) is None
