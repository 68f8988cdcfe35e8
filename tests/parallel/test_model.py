"""What a rank computes: shares whose sum is the whole, and ranks that would choose different experts."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35.checkpoint.load import load_model
from mlx_qwen35.checkpoint.source import open_source
from mlx_qwen35.experts.budget import StreamPlan
from mlx_qwen35.experts.pool import ExpertStats
from mlx_qwen35.model import Model
from mlx_qwen35.parallel.model import RankedMoE, RanksModel
from mlx_qwen35.parallel.plan import Plan
from mlx_qwen35.parallel.share import RankShare
from tests.checkpoints import random_tensors, tiny_config, write_checkpoint

from .threads import Meeting, Threads, together

TOKENS = [5, 7, 9, 11, 3, 2, 60, 61]
UNEQUAL = ((0, 5), (5, 7), (7, 8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config("moe", num_key_value_heads=1, num_attention_heads=5)
    return write_checkpoint(tmp_path_factory.mktemp("moe"), config, random_tensors(config))


def shares(folder: Path, spans: tuple[tuple[int, int], ...], stream: StreamPlan | None = None) -> list[RanksModel]:
    meeting, plan = Meeting(len(spans)), Plan("experts", spans, (), (), 0.0)
    config = open_source(folder).config
    made = [
        load_model(folder, share=RankShare(config, plan, Threads(rank, len(spans), meeting)), stream=stream)
        for rank in range(len(spans))
    ]
    for model in made:
        mx.eval(model.parameters())
    return made


def said(model: RanksModel, tokens: list[int] = TOKENS) -> np.ndarray:
    """Hidden states of a prompt, one further token, and two drafted ones of which each leaves a snapshot."""
    cache = model.make_cache()
    x = [model.computed(mx.array([tokens]), cache, (), more=False)]
    x.append(model.computed(mx.array([[4]]), cache, (), more=False))
    with cache.each_step() as steps:
        x.append(model.computed(mx.array([[8, 9]]), cache, (), more=False))
    assert [step.offset for step in steps] == [len(tokens) + 2, len(tokens) + 3]
    cache.restore(steps[0])
    x.append(model.computed(mx.array([[10]]), cache, (), more=False))
    return np.array(mx.concatenate(x, axis=1))


def expected(folder: Path) -> np.ndarray:
    model = load_model(folder)
    cache = model.make_cache()
    x = [model.hidden(mx.array([part]), cache) for part in (TOKENS, [4], [8])]
    before = cache.snapshot()
    x.append(model.hidden(mx.array([[9]]), cache))
    cache.restore(before)
    return np.array(mx.concatenate([*x, model.hidden(mx.array([[10]]), cache)], axis=1))


def test_unequal_shares_are_the_whole_and_every_rank_has_the_same_bits(folder: Path) -> None:
    models = shares(folder, UNEQUAL)
    made = together([lambda model=model: said(model) for model in models])
    right = expected(folder)
    for each in made:
        assert np.array_equal(each, made[0]) and np.abs(each - right).max() < 2e-3
    experts = [model.layers[0].mlp.experts.gate_proj.weight.shape[0] for model in models]
    assert experts == [5, 2, 1]  # each reads its own alone
    layers = models[0].config.text.num_hidden_layers
    assert models[0].group.traffic.sums == 4 * layers  # one a layer and call


def test_ranks_that_choose_differently_take_rank_0s_choice(folder: Path) -> None:
    models = shares(folder, UNEQUAL)
    mixtures = [layer.mlp for layer in models[1].layers]
    for mixture in mixtures:  # a router that rounds otherwise, and more so than any
        mixture.gate.weight = mixture.gate.weight[::-1]
        mx.eval(mixture.gate.weight)
    made = together([lambda model=model: said(model) for model in models])
    assert np.abs(made[0] - expected(folder)).max() < 2e-3
    assert models[0].group.traffic.sums > 4 * len(mixtures)
    assert all(isinstance(mixture, RankedMoE) and not mixture._counts for mixture in mixtures)


def pool(slots: int, layers: int = 4) -> StreamPlan:
    """So many experts of a layer in memory."""
    return StreamPlan((slots,) * layers, group=2, chunk=64, tile=64, cache_limit=1 << 28, memory=1 << 30)


def test_two_halves_of_a_pool_find_what_the_whole_finds_and_each_reads_half(folder: Path) -> None:
    rng = np.random.RandomState(0)
    prompt, steps = rng.randint(0, 96, 12).tolist(), rng.randint(0, 80, 60).tolist()

    def read(model: Model) -> tuple[np.ndarray, ExpertStats]:
        """Hidden states, and what decoding found."""
        model._pool.prefetch = False
        cache = model.make_cache()
        compute = model.computed if isinstance(model, RanksModel) else model.hidden
        x, before = [compute(mx.array([prompt]), cache, (), more=False)], model.expert_stats
        x += [compute(mx.array([[token]]), cache, (), more=False) for token in steps]
        return np.array(mx.concatenate(x, axis=1)), model.expert_stats - before

    halves = shares(folder, ((0, 4), (4, 8)), pool(3))
    whole = load_model(folder, stream=pool(6))
    made = together([lambda model=model: read(model) for model in halves])
    right, one = read(whole)
    assert np.array_equal(made[0][0], made[1][0]) and np.abs(made[0][0] - right).max() < 2e-3
    both = [stats for _, stats in made]
    asked = sum(stats.hits + stats.misses for stats in both)
    assert asked == one.hits + one.misses == 3 * 4 * len(steps)
    assert abs(sum(stats.hits for stats in both) / asked - one.hit_rate) < 0.05
    for stats in both:
        assert 0.3 < stats.bytes_read / one.bytes_read < 0.7
    for model in (*halves, whole):
        model.unload()
