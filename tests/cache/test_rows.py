"""Rows side by side: each has the bits that it has alone, whoever joins, leaves or goes back."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35.cache import Cache
from mlx_qwen35.cache.kv import KVFormat
from mlx_qwen35.cache.rows import RowsCache
from mlx_qwen35.model import Model
from tests.talkers import VOCAB, random_model
from tests.tiny_model import tiny_model


@pytest.fixture(scope="module", params=["dense", "moe"])
def model(request) -> Model:
    return random_model(request.param)


def prompt(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB, length).tolist()


def read(model: Model, tokens: list[int]) -> Cache:
    cache = model.make_cache()
    model(mx.array([tokens]), cache)
    mx.eval(cache.arrays())
    return cache


def alone(model: Model, tokens: list[int], more: list[int]) -> list[np.ndarray]:
    """Hidden states of each of `more`, one by one."""
    cache = read(model, tokens)
    made = []
    for token in more:
        made.append(np.array(model.hidden(mx.array([[token]]), cache)))
    return made


def step(model: Model, rows: RowsCache, tokens: list[int]) -> np.ndarray:
    hidden = model.hidden(mx.array(tokens)[:, None], rows)
    mx.eval(hidden, rows.arrays())
    return np.array(hidden)


def test_rows_of_unequal_lengths_have_the_bits_that_each_has_alone(model):
    lengths, more = (3, 11, 1, 7, 26), prompt(4, seed=9)
    prompts = [prompt(length, seed=length) for length in lengths]
    rows = RowsCache([read(model, tokens) for tokens in prompts])
    for number, token in enumerate(more):
        made = step(model, rows, [token] * len(lengths))
        for row, tokens in enumerate(prompts):
            np.testing.assert_array_equal(made[row], alone(model, tokens, more)[number][0])
    assert [cache.offset for cache in rows.rows] == [length + 4 for length in lengths]


def test_rows_join_leave_and_go_on_alone(model):
    prompts = [prompt(length, seed=length) for length in (5, 9, 2)]
    more = prompt(6, seed=3)
    expected = [alone(model, tokens, more) for tokens in prompts]
    first, second, third = (read(model, tokens) for tokens in prompts)
    rows = RowsCache([first, second])
    step(model, rows, [more[0]] * 2)
    rows.join([third])
    made = step(model, rows, [more[1], more[1], more[0]])
    np.testing.assert_array_equal(made[2], expected[2][0][0])
    rows.leave([0])
    made = step(model, rows, [more[2], more[1]])
    np.testing.assert_array_equal(made[0], expected[1][2][0])
    np.testing.assert_array_equal(made[1], expected[2][1][0])
    np.testing.assert_array_equal(np.array(model.hidden(mx.array([[more[2]]]), first))[0], expected[0][2][0])
    rows.leave([0, 1])
    assert len(rows) == 0
    np.testing.assert_array_equal(np.array(model.hidden(mx.array([[more[3]]]), second))[0], expected[1][3][0])
    np.testing.assert_array_equal(np.array(model.hidden(mx.array([[more[2]]]), third))[0], expected[2][2][0])


def test_a_step_is_undone_in_all_rows(model):
    prompts = [prompt(length, seed=length) for length in (4, 8)]
    rows = RowsCache([read(model, tokens) for tokens in prompts])
    mark = rows.mark()
    before = step(model, rows, [1, 2])
    step(model, rows, [5, 6])
    rows.go_back(mark)
    assert [cache.offset for cache in rows.rows] == [4, 8]
    np.testing.assert_array_equal(step(model, rows, [1, 2]), before)


def test_a_settled_row_keeps_no_other_alive(model):
    rows = RowsCache([read(model, prompt(length, seed=length)) for length in (4, 8, 6)])
    step(model, rows, [1, 2, 3])
    cache = rows.rows[1]
    rows.settle([1])
    sizes = {state.shape[0] for layer in cache.layers for state in layer.arrays()}
    assert sizes == {1}
    held = mx.get_active_memory()
    others = sum(array.nbytes for layer in rows.layers for array in layer.arrays())
    del rows
    assert held - mx.get_active_memory() > others / 3


def test_rows_that_share_their_past():
    model, tokens = random_model("dense"), prompt(70, seed=1)
    first = read(model, tokens)
    second, _ = first.branch()
    alike = read(model, tokens).branch()[0]
    made = step(model, RowsCache([first, second, read(model, tokens[:40])]), [3, 3, 3])
    expected = np.array(model.hidden(mx.array([[3]]), alike))
    np.testing.assert_array_equal(made[0], expected[0])
    np.testing.assert_array_equal(made[1], expected[0])


def test_rows_whose_keys_are_packed():
    rope = {"partial_rotary_factor": 0.5, "mrope_section": [3, 3, 2]}
    model, _ = tiny_model("dense", head_dim=32, rope_parameters=rope)
    model.kv_form = KVFormat(8, 32)
    tokens = prompt(70, seed=1)
    made = step(model, RowsCache([read(model, tokens), read(model, tokens[:40])]), [3, 3])
    for row, past in enumerate((tokens, tokens[:40])):
        expected = np.array(model.hidden(mx.array([[3]]), read(model, past)))
        np.testing.assert_array_equal(made[row], expected[0])
