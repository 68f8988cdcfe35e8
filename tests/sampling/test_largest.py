"""The largest of a vocabulary against NumPy's sort of all of it."""

import math

import mlx.core as mx
import numpy as np
import pytest

from benchmarks.graph import PretendedMetal, shape_only, trace
from mlx_qwen35.sampling.largest import BLOCK, top_ids, top_logprobs


@pytest.mark.parametrize("vocab", [5, 300, 3 * BLOCK, 50 * BLOCK + 17, 248_320])
@pytest.mark.parametrize("k", [1, 4, 20])
def test_top_ids_are_the_largest(vocab, k):
    k = min(k, vocab)
    logits = np.random.default_rng(vocab + k).permutation(vocab).astype(np.float32).reshape(1, -1)
    logits = np.concatenate([logits, logits[:, ::-1]])
    ids = np.array(top_ids(mx.array(logits), k))
    assert ids.shape == (2, k)
    for row in range(2):
        assert set(ids[row].tolist()) == set(np.argsort(-logits[row])[:k].tolist())


@pytest.mark.parametrize("vocab, k", [(100 * BLOCK + 3, 10), (100 * BLOCK + 1, 2)])
def test_top_ids_never_leave_the_vocabulary(vocab, k):
    """Where fewer than k scores are above -inf, places behind the last one come up, too."""
    logits = np.full((1, vocab), -np.inf, dtype=np.float32)
    logits[0, vocab - 1] = 1.0
    ids = np.array(top_ids(mx.array(logits), k))
    assert ids.max() < vocab and vocab - 1 in ids


def assert_told(logprobs: np.ndarray, tokens: list[int], most: int) -> None:
    own, ids, values = top_logprobs(mx.array(logprobs), mx.array(tokens), most)
    wanted = np.argsort(-logprobs, axis=-1, kind="stable")[:, :most]
    assert ids.tolist() == wanted.tolist()
    assert np.array_equal(np.array(values), np.take_along_axis(logprobs, wanted, axis=-1))
    assert own.tolist() == [logprobs[row, token] for row, token in enumerate(tokens)]


@pytest.mark.parametrize("vocab", [5, 300, 3 * BLOCK, 50 * BLOCK + 17, 248_320])
@pytest.mark.parametrize("most", [0, 1, 5, 20])
@pytest.mark.parametrize("steps", [None, 3, 40])  # None: all differ; else so many different values, so most are tied
def test_what_is_told_of_a_token_is_what_a_stable_sort_says(vocab, most, steps):
    rng = np.random.default_rng([vocab, most])
    logprobs = rng.normal(-3, 2, (3, vocab)) if steps is None else -rng.integers(0, steps, (3, vocab)) / 4
    assert_told(logprobs.astype(np.float32), rng.integers(0, vocab, 3).tolist(), most)


def test_what_cannot_come_is_last_and_rounding_above_zero_is_first():
    row = [-math.inf, 1e-7, -0.0, 0.0, -math.inf, -2.0, 1e-7, -1e-7]
    assert_told(np.array([row, row[::-1]], dtype=np.float32), [0, 7], 8)
    assert_told(np.array([row + [-math.inf] * 60 * BLOCK], dtype=np.float32), [3], 20)


def test_launches_do_not_grow_with_the_rows():
    def count(rows: int) -> int:
        given = {"logprobs": shape_only((rows, 248_077), mx.float32), "tokens": shape_only((rows,), mx.uint32)}
        with PretendedMetal():
            return sum(one.count for one in trace(lambda logprobs, tokens: top_logprobs(logprobs, tokens, 5), given))

    assert count(8) == count(1) <= 30
