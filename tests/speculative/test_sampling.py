"""What is drawn with drafts is distributed as without them, with every option; the test would notice if it were not.

Knows a model that is a table, so that the right distribution of each token is known: P(next | last) of its sampling.
"""

from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35.cache import Cache
from mlx_qwen35.engine.drafted import Drafted
from mlx_qwen35.engine.group import Seat
from mlx_qwen35.generation import decode, stream_generate
from mlx_qwen35.sampling import History, Sampler, Sampling
from mlx_qwen35.speculative import Drafting, rejection, rounds
from mlx_qwen35.speculative.copying import Copying
from tests.talkers import Endless

VOCAB = 7
TOKENS = 1500
OPTIONS = {
    "temperature": {"temperature": 1.0},
    "cold": {"temperature": 0.6, "top_p": 0.95, "top_k": 20},
    "top_k": {"temperature": 1.3, "top_k": 3},
    "top_p": {"temperature": 1.0, "top_p": 0.7},
    "min_p": {"temperature": 1.5, "min_p": 0.2, "logit_bias": {2: 1.5, 4: -2.0}},
    "repetition": {"temperature": 1.0, "repetition_penalty": 2.0, "repetition_context_size": 2, "top_k": 5},
    "presence": {"temperature": 1.0, "presence_penalty": 1.0},
}


class Table:
    """A model whose logits are a row of a table, by the last token."""

    config = SimpleNamespace(text=SimpleNamespace(vocab_size=VOCAB))
    mtp = expert_stats = None
    prefill_chunk = 100
    together_chunk = 0

    def computing(self, tokens):
        return nullcontext()

    def __init__(self, seed: int) -> None:
        self.table = mx.array(np.random.default_rng(seed).normal(0, 1.2, (VOCAB, VOCAB)).astype(np.float32))

    def make_cache(self) -> Cache:
        return Cache([])

    def hidden(self, tokens, cache, media=(), *, more=False, **how):
        cache.advance(tokens.shape[1])
        return self.table[tokens]

    def head(self, hidden):
        return hidden


def drawn(sampling: Sampling, drafter: Table | None, count: int = TOKENS, *, copies: bool = False) -> list[int]:
    """Tokens of an answer that begins after token 0. copies: of what was drawn before, beside the drafter or alone."""
    model = Table(1)
    cache, history = model.make_cache(), History(sampling, [[0]], VOCAB)
    logits = model.hidden(mx.array([[0]]), cache)[:, -1]
    sampler = Sampler(sampling)
    if drafter is None and not copies:
        return [step.token for step in decode(model, cache, logits, sampler, history, max_tokens=count)]
    drafting = Drafting(drafter, 3, steady=True, lookup=copies)
    follower = cache.draft = drafting.drafter(model, cache)
    if follower is not None:
        follower.prime(mx.array([[0]]), logits[None])
    seat = Seat(cache, sampler, history, follower, text=drafting.text(model, [0]))
    seat.draw_first(logits)
    made = Drafted(model, seat)
    tokens: list[int] = []
    sources: Counter[str] = Counter()
    while len(tokens) < count:
        steps = made.steps(count - len(tokens))
        tokens += [step.token for step in steps]
        sources[steps[0].source] += 1
        for step in steps if copies else ():
            seat.text.add(step.token)
    assert not copies or sources["copy"] > count / 20
    assert not (copies and drafter) or sources["head"] > count / 20
    return tokens


def statistic(tokens: list[int], sampling: Sampling) -> tuple[float, float]:
    """Chi-square of tokens given what came before each, and its 1 % point (Wilson and Hilferty)."""
    model, sampler = Table(1), Sampler(sampling)
    seen: dict[tuple, np.ndarray] = {}
    size = sampling.repetition_context_size or 1
    for number, token in enumerate(tokens):
        before = tuple([0, *tokens[:number]][-size:])
        answered = frozenset(tokens[:number]) if sampling.presence_penalty else frozenset()
        seen.setdefault((before, answered), np.zeros(VOCAB))[token] += 1
    total, freedom = 0.0, 0
    for (before, answered), found in seen.items():
        history = History(sampling, [before], VOCAB)
        if history.answered is not None:
            history.answered = mx.array([[token in answered for token in range(VOCAB)]])
        weights, _ = sampler.weights(model.table[mx.array([before[-1]])], history)
        expected = np.array(mx.softmax(weights[0])) * found.sum()
        assert found[expected == 0].sum() == 0, "a token that can never be drawn"
        if found.sum() < 40:  # too few to tell
            continue
        rare = expected < 5
        groups = [(found[~rare], expected[~rare]), (found[rare].sum(), expected[rare].sum())]
        for mine, wanted in groups:
            if np.size(wanted) and np.min(wanted) > 1:
                total += float(np.sum((mine - wanted) ** 2 / wanted))
                freedom += np.size(wanted)
        freedom -= 1
    point = freedom * (1 - 2 / (9 * freedom) + 2.326 * np.sqrt(2 / (9 * freedom))) ** 3
    return total, point


@pytest.fixture
def copying(monkeypatch):
    """Three tokens are copied wherever two were there before, which is mostly wrong."""
    monkeypatch.setattr(Copying, "choose", lambda self, kind, most, otherwise=None: min(3, most))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_with_copies_too(options, copying):
    sampling = Sampling(seed=13, **options)
    tokens = drawn(sampling, None, copies=True)
    total, point = statistic(tokens, sampling)
    assert total < point
    assert tokens == drawn(sampling, None)  # each with its own key


@pytest.mark.parametrize("name", ["temperature", "top_k", "repetition"])
def test_with_copies_and_guesses_in_turns(name, copying):
    sampling = Sampling(seed=14, **OPTIONS[name])
    total, point = statistic(drawn(sampling, Table(2), copies=True), sampling)
    assert total < point


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_distribution_is_that_of_plain_decoding(options):
    sampling = Sampling(seed=11, **options)
    total, point = statistic(drawn(sampling, Table(2)), sampling)
    assert total < point


def test_of_plain_decoding_the_same_is_true():
    sampling = Sampling(seed=12, temperature=1.0, top_p=0.9)
    total, point = statistic(drawn(sampling, None, 1000), sampling)
    assert total < point


def _never_refuse(target, guesses, weights, coins, dice):
    _, tokens = rejection_drawn(target, guesses, weights, coins, dice)
    return mx.ones(guesses.shape, mx.bool_), tokens


def _draw_from_the_whole(target, guesses, weights, coins, dice):
    """As if a rejection said nothing of the guess."""
    kept, _ = rejection_drawn(target, guesses, weights, coins, dice)
    return kept, mx.random.categorical(target, key=dice)


def _a_little_too_kind(target, guesses, weights, coins, dice):
    kept, tokens = rejection_drawn(target, guesses, weights, coins, dice)
    return kept | (mx.random.uniform(shape=kept.shape, key=dice) < 0.15), tokens


rejection_drawn = rejection._drawn


@pytest.mark.parametrize("bias", [_never_refuse, _draw_from_the_whole, _a_little_too_kind])
def test_a_planted_bias_is_found(monkeypatch, bias):
    monkeypatch.setattr(rejection, "_drawn", bias)
    sampling = Sampling(seed=11, temperature=1.0)
    total, point = statistic(drawn(sampling, Table(2), 4000), sampling)
    assert total > point


def _keep_all(verdict, guesses):
    tokens = mx.concatenate([guesses, verdict.tokens[-1:]])
    return verdict._replace(right=mx.array(len(guesses)), tokens=tokens)


def _draw_again(verdict, guesses):
    """As if a guess that is wrong said nothing of what is drawn in its place."""
    again = mx.random.categorical(verdict.logprobs, key=mx.random.key(int(verdict.tokens.sum())))
    wrong = verdict.tokens[:-1] != guesses
    return verdict._replace(tokens=mx.where(mx.concatenate([wrong, mx.array([False])]), again, verdict.tokens))


def _sometimes_too_kind(verdict, guesses):
    kind = int(mx.sum(verdict.tokens)) % 3 == 0
    return _keep_all(verdict, guesses) if kind else verdict


@pytest.mark.parametrize("bias", [_keep_all, _draw_again, _sometimes_too_kind])
@pytest.mark.parametrize(
    "drafter", [None, pytest.param(Table(2), marks=pytest.mark.soak)], ids=["copies", "copies and guesses"]
)
def test_a_bias_that_is_planted_in_copies_is_found(monkeypatch, copying, bias, drafter):
    judge = rounds.judge

    def judged(sampler, logits, history, guesses, weights, *others):
        verdict = judge(sampler, logits, history, guesses, weights, *others)
        return verdict if weights is not None or not guesses.size else bias(verdict, guesses)

    monkeypatch.setattr(rounds, "judge", judged)
    sampling = Sampling(seed=11, temperature=1.0)
    total, point = statistic(drawn(sampling, drafter, 4000, copies=True), sampling)
    assert total > point


def test_a_drafter_that_is_right_is_never_refused():
    sampling = Sampling(seed=5, temperature=0.8, top_k=4)
    model = Table(1)
    options = {"sampling": sampling, "draft_model": Table(1), "num_draft_tokens": 4, "max_tokens": 50, "lookup": False}
    parts = list(stream_generate(model, Endless(), [0], **options))
    assert [part.from_draft for part in parts] == [n % 5 > 0 for n in range(50)]


def test_the_same_seed_draws_the_same_tokens():
    sampling = Sampling(seed=5, temperature=1.0)
    assert drawn(sampling, Table(2), 200) == drawn(sampling, Table(2), 200)
    other = Sampling(seed=6, temperature=1.0)
    assert drawn(sampling, Table(2), 200) != drawn(other, Table(2), 200)
