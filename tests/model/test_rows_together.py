"""Rows on a GPU: their newest keys and values in one tail, their attention in one launch. On the emulator."""

import random

import mlx.core as mx
import numpy as np
import pytest

import mlx_qwen35.cache.rows as cache_rows
from mlx_qwen35.cache.kv import KVFormat
from mlx_qwen35.cache.rows import RowsCache, RowsKV
from mlx_qwen35.kernels.backend import using
from mlx_qwen35.kernels.ragged_attention import planned
from tests.metal_emulator import poisoned_outputs
from tests.talkers import VOCAB
from tests.tiny_model import tiny_model


@pytest.fixture
def emulator():
    with poisoned_outputs() as emulator:
        if emulator is None:
            pytest.skip("launches are counted in the emulator")
        yield emulator


@pytest.fixture(params=[3, 64])
def tail(request, monkeypatch) -> int:
    """A tail that is full every third step, and one that never is."""
    monkeypatch.setattr(cache_rows, "TAIL", request.param)
    return request.param


def random_model(kind="dense", **overrides):
    model, _ = tiny_model(kind, **overrides)
    model.eval()
    return model


def prompt(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB, length).tolist()


def read(model, tokens):
    """As on a CPU: what is looked at here is what rows do."""
    with using(None):
        cache = model.make_cache()
        model(mx.array([tokens]), cache)
        mx.eval(cache.arrays())
    return cache


def step(model, rows, tokens) -> np.ndarray:
    hidden = model.hidden(mx.array(tokens)[:, None], rows)
    mx.eval(hidden, rows.arrays())
    return np.array(hidden)


def launched(emulator, since) -> int:
    return sum("ragged_attention" in launch.name for launch in emulator.launches[since:])


class Alone:
    """Hidden states of one sequence, read whole on a CPU, at any of its tokens."""

    def __init__(self, model):
        self._model = model

    def after(self, tokens: list[int]) -> np.ndarray:
        with using(None):
            return np.array(self._model.hidden(mx.array([tokens])))[0, -1:]


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.soak) for seed in (2, 3))])
def test_any_course_gives_what_each_row_has_alone(emulator, tail, seed):
    """Rows join, leave, are settled, go back, share pasts; some steps end in the middle of the model."""
    rng, model = random.Random(seed), random_model(("dense", "moe")[seed % 2])
    alone, group, texts = Alone(model), RowsCache([read(model, prompt(4, 99))]), [prompt(4, 99)]
    left = []
    for number in range(14):
        what = rng.random()
        if what < 0.2 and len(texts) < 5:
            tokens = prompt(rng.randint(1, 40), rng.randint(0, 10**6))
            joining = [read(model, tokens)]
            if rng.random() < 0.4:
                joining = list(joining[0].branch([])[:1]) + joining
            group.join(joining)
            texts += [list(tokens) for _ in joining]
        elif what < 0.3 and len(texts) > 2:
            gone = rng.sample(range(len(texts)), rng.randint(1, 2))
            caches = [group.rows[row] for row in gone]
            group.leave(gone)
            left += [(cache, texts[row]) for cache, row in zip(caches, gone, strict=True)]
            texts = [text for row, text in enumerate(texts) if row not in gone]
        elif what < 0.4:
            group.settle([rng.randrange(len(texts))])
        mark, before = group.mark(), [list(text) for text in texts]
        if what > 0.85:
            broken = rng.choice([layer for layer in group.layers if isinstance(layer, RowsKV)])
            broken.take = broken.alone = None  # calling it is an error
            with pytest.raises(TypeError):
                step(model, group, [1] * len(texts))
            del broken.take, broken.alone
            group.go_back(mark)
        for _ in range(rng.randint(1, 3)):
            tokens = [rng.randrange(VOCAB) for _ in texts]
            made = step(model, group, tokens)
            for text, token in zip(texts, tokens, strict=True):
                text.append(token)
        if what > 0.7:
            group.go_back(mark)
            texts = before
            tokens = [rng.randrange(VOCAB) for _ in texts]
            made = step(model, group, tokens)
            for text, token in zip(texts, tokens, strict=True):
                text.append(token)
        if number % 4 == 1:
            for row, text in enumerate(texts):
                np.testing.assert_allclose(made[row], alone.after(text), atol=2e-3)
    group.settle(range(len(texts)))
    for cache, text in [*left, *zip(group.rows, texts, strict=True)]:
        assert cache.offset == len(text)
        assert {layer.offset for layer in cache.layers if hasattr(layer, "offset")} == {len(text)}
        with using(None):
            made = np.array(model.hidden(mx.array([[5]]), cache))
        np.testing.assert_allclose(made[0], alone.after([*text, 5]), atol=2e-3)
    assert launched(emulator, 0)


def test_a_step_of_many_rows_launches_what_one_of_two_does(emulator):
    model, counts = random_model(), []
    for number in (2, 6):
        group = RowsCache([read(model, prompt(3 + row, row)) for row in range(number)])
        start = len(emulator.launches)
        step(model, group, [7] * number)
        counts.append(len(emulator.launches) - start)
        assert launched(emulator, start) == sum(isinstance(layer, RowsKV) for layer in group.layers)
    assert counts[0] == counts[1]


def test_a_row_has_the_same_bits_whoever_is_beside_it(emulator):
    """Within this: the products around it are MLX's, and on a CPU each row has its own bits in them too."""
    model = random_model()
    tokens, others = prompt(30, 1), [prompt(n, n) for n in (2, 9, 50)]
    made = []
    for beside in (others[:1], others[1:], others):
        group = RowsCache([read(model, tokens), *(read(model, other) for other in beside)])
        made.append([step(model, group, [token] * len(group))[0] for token in (3, 8, 1)])
    np.testing.assert_array_equal(made[0], made[1])
    np.testing.assert_array_equal(made[0], made[2])


def test_joining_leaves_the_keys_of_all_where_they_are(emulator):
    model = random_model()
    group = RowsCache([read(model, prompt(5, 1)), read(model, prompt(9, 2))])
    step(model, group, [1, 2])
    layers = [layer for layer in group.layers if isinstance(layer, RowsKV)]
    held = [[id(array) for row in layer.rows for array in row.arrays()] for layer in layers]
    group.join([read(model, prompt(3, 3))])
    step(model, group, [1, 2, 3])
    group.leave([1])
    step(model, group, [1, 2])
    for layer, before in zip(layers, held, strict=True):
        assert [id(array) for array in layer.rows[0].arrays()] == before[:2]
        assert layer.rows[0].offset == 5 and layer.rows[1].offset == 3  # the rest of theirs is in the tail


def test_one_row_and_exact_rows_make_the_calls_of_a_row_alone(emulator):
    model = random_model()
    group, other = RowsCache([read(model, prompt(5, 1))]), read(model, prompt(5, 1))
    start = len(emulator.launches)
    made = step(model, group, [1])
    assert not launched(emulator, start)
    np.testing.assert_array_equal(made, np.array(model.hidden(mx.array([[1]]), other)))
    exact = random_model()
    exact.be_exact()
    group = RowsCache([read(exact, prompt(n, n)) for n in (4, 7)])
    start = len(emulator.launches)
    step(exact, group, [1, 2])
    assert not launched(emulator, start)


def test_the_last_of_several_rows_goes_on_alone(emulator):
    model = random_model()
    group = RowsCache([read(model, prompt(5, 1)), read(model, prompt(9, 2))])
    for token in (4, 5):
        step(model, group, [token, token])
    group.leave([0])
    start = len(emulator.launches)
    made = step(model, group, [6])
    assert not launched(emulator, start)
    np.testing.assert_allclose(made[0], Alone(model).after([*prompt(9, 2), 4, 5, 6]), atol=2e-3)
    assert all(layer._tail is None for layer in group.layers if isinstance(layer, RowsKV))


def test_packed_keys_and_many_stretches_go_row_by_row(emulator, monkeypatch):
    model = random_model(head_dim=32, rope_parameters={"mrope_section": [3, 3, 2]})
    model.kv_form = KVFormat(8, 32)
    packed = RowsCache([read(model, prompt(n, n)) for n in (70, 40)])
    start = len(emulator.launches)
    made = step(model, packed, [3, 3])
    assert not launched(emulator, start)
    model.kv_form = None
    plain = RowsCache([read(model, prompt(n, n)) for n in (70, 40)])
    np.testing.assert_allclose(made, step(model, plain, [3, 3]), atol=0.1)
    assert launched(emulator, start)
    monkeypatch.setattr(cache_rows, "planned", lambda *how: planned(*how, most=1))
    start = len(emulator.launches)
    made = step(model, plain, [4, 4])  # what is in the tail comes home first
    assert not launched(emulator, start)
    np.testing.assert_allclose(made[1], Alone(model).after([*prompt(40, 40), 3, 4]), atol=2e-3)
    monkeypatch.undo()
    step(model, plain, [5, 5])
    assert launched(emulator, start)


def test_rows_that_share_a_past_read_it_from_one_place(emulator):
    model = random_model()
    first = read(model, prompt(30, 1))
    second, _ = first.branch()
    group = RowsCache([first, second])
    for token in (3, 4):
        made = step(model, group, [token, token + 1])
    for row in range(2):
        np.testing.assert_allclose(made[row], Alone(model).after([*prompt(30, 1), 3 + row, 4 + row]), atol=2e-3)
    taken = next(layer for layer in group.layers if isinstance(layer, RowsKV))._own
    assert len(taken.arrays) == 1
