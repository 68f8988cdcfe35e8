"""What a rank computes: shares whose sum is the whole, and ranks that would choose different experts."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35.checkpoint.load import load_model
from mlx_qwen35.checkpoint.source import open_source
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


def shares(folder: Path, spans: tuple[tuple[int, int], ...]) -> list[RanksModel]:
    meeting, plan = Meeting(len(spans)), Plan("experts", spans, (), (), 0.0)
    config = open_source(folder).config
    made = [
        load_model(folder, share=RankShare(config, plan, Threads(rank, len(spans), meeting)))
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
