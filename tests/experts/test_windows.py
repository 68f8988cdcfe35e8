"""Several layers before a look at what they lacked: the bits of the resident model, whatever was hoped for in vain."""

from __future__ import annotations

import random
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35.cache.kv import KVFormat
from mlx_qwen35.cache.rows import RowsCache
from mlx_qwen35.checkpoint.load import load_model
from mlx_qwen35.experts.budget import StreamPlan
from mlx_qwen35.experts.chances import Chances
from mlx_qwen35.model import Model
from tests.checkpoints import random_tensors, tiny_config, write_checkpoint

from .interrupts import Interrupt

EXPERTS, CHOSEN, LAYERS = 8, 3, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"head_dim": 32, "rope_parameters": {"mrope_section": [3, 3, 2]}}
    config = tiny_config("moe", num_experts=EXPERTS, num_experts_per_tok=CHOSEN, num_hidden_layers=LAYERS, **sizes)
    made = tmp_path_factory.mktemp("windows")
    write_checkpoint(made, config, random_tensors(config), layout="mlx")
    return made


@pytest.fixture
def hoping(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Windows of any length, always the same ones, whatever pays; -> the lengths so far."""
    rng, made = random.Random(5), []

    def length(self: Chances, layers: range, stop: float = 0.0) -> int:
        made.append(rng.randint(1, len(layers)))
        return made[-1]

    monkeypatch.setattr(Chances, "length", length)
    return made


def streamed(folder: Path, slots: int) -> Model:
    plan = StreamPlan((slots,) * LAYERS, 2, chunk=64, tile=64, cache_limit=1 << 24, memory=1 << 28)
    return load_model(folder, stream=plan)


def tokens(count: int, seed: int = 1) -> list[int]:
    return np.random.RandomState(seed).randint(0, 80, count).tolist()


@pytest.mark.parametrize("slots", [CHOSEN, 5, EXPERTS - 1])
@pytest.mark.parametrize("packed", [False, True])
def test_decoding(folder: Path, hoping: list[int], slots: int, packed: bool) -> None:
    models = load_model(folder), streamed(folder, slots)
    for model in models:
        model.kv_form = KVFormat(8, 32, 3) if packed else None
    caches = [model.make_cache() for model in models]
    for token in tokens(40):
        expected, found = (m(mx.array([[token]]), cache) for m, cache in zip(models, caches, strict=True))
        np.testing.assert_array_equal(np.array(found), np.array(expected))
    stats = models[1].expert_stats
    assert stats.hits + stats.misses == 40 * LAYERS * CHOSEN and stats.misses > 0
    assert max(hoping) == LAYERS and (slots < 5 or len(hoping) < 40 * LAYERS)


def test_verifying_and_going_back(folder: Path, hoping: list[int]) -> None:
    """The states after each token are those of the last try alone."""
    models = load_model(folder), streamed(folder, 6)
    caches = [model.make_cache() for model in models]
    rng = random.Random(2)
    for number in range(12):
        given, kept, made = mx.array([tokens(3, number)]), rng.randint(1, 3), []
        for model, cache in zip(models, caches, strict=True):
            with cache.each_step() as steps:
                made.append(np.array(model(given, cache)))
            assert len(steps) == 3
            cache.restore(steps[kept - 1])
        np.testing.assert_array_equal(*made)
    assert [c.offset for c in caches] == [caches[0].offset] * 2


def test_rows_side_by_side(folder: Path, hoping: list[int]) -> None:
    models, rows = (load_model(folder), streamed(folder, 6)), []
    for model in models:
        caches = [model.make_cache() for _ in range(2)]
        for cache, length in zip(caches, (3, 9), strict=True):
            mx.eval(model(mx.array([tokens(length)]), cache))
        rows.append(RowsCache(caches))
    for token in tokens(12):
        expected, found = (m.hidden(mx.array([[token], [token + 1]]), row) for m, row in zip(models, rows, strict=True))
        np.testing.assert_array_equal(np.array(found), np.array(expected))


def test_windows_come_by_themselves_where_all_lies_in_memory(folder: Path) -> None:
    """Two tokens in turn ask for no more than the slots hold."""
    model, expected, looks = streamed(folder, EXPERTS - 1), load_model(folder), []
    cache, own = model.make_cache(), expected.make_cache()
    for number in range(120):
        token = mx.array([[number % 2]])
        np.testing.assert_array_equal(np.array(model(token, cache)), np.array(expected(token, own)))
        looks.append(model._pool.chances.length(range(LAYERS)))
    assert looks[0] == 1 and looks[-1] > 1


def test_ctrl_c_inside_a_window(folder: Path, hoping: list[int]) -> None:
    model, expected = streamed(folder, 5), load_model(folder)
    cache, own = model.make_cache(), expected.make_cache()
    with Interrupt() as points:
        mx.eval(model(mx.array([[1]]), cache))
    mx.eval(expected(mx.array([[1]]), own))
    for number, at in enumerate(random.Random(3).sample(range(points.count), 40)):
        token, before = mx.array([[number % 80]]), cache.snapshot()
        try:
            with Interrupt(at):
                found = np.array(model(token, cache))
        except KeyboardInterrupt:
            cache.restore(before)
            found = np.array(model(token, cache))
        np.testing.assert_array_equal(found, np.array(expected(token, own)), err_msg=str(at))
    assert not model._pool.reader._crew.alive()
