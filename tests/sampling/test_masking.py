"""Masks of bits against the plain reading of them, one token at a time."""

import math

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35.errors import ArgumentError
from mlx_qwen35.sampling.masking import masked


def words_of(tokens: set[int], count: int) -> np.ndarray:
    words = [0] * count
    for token in tokens:
        words[token // 32] |= 1 << (token % 32)
    return np.array(words, dtype=np.uint32)


@pytest.mark.parametrize("vocab", [5, 32, 33, 64, 1000])
@pytest.mark.parametrize("more", [0, 2])  # words past the vocabulary, all of their bits set
def test_what_may_come_keeps_its_logit_and_nothing_else_does(vocab, more):
    rng = np.random.default_rng(vocab)
    count = -(-vocab // 32)
    sets = [{vocab - 1}, {0, vocab // 2}, set(rng.choice(vocab, max(1, vocab // 3), replace=False).tolist())]
    surplus = [*range(vocab, (count + more) * 32)]
    words = np.stack([words_of({*tokens, *surplus}, count + more) for tokens in sets])
    logits = rng.normal(size=(3, vocab)).astype(np.float32)
    found = np.array(masked(mx.array(logits), words)).tolist()
    for row, tokens in enumerate(sets):
        assert found[row] == [logits[row, token] if token in tokens else -math.inf for token in range(vocab)]


def test_one_mask_serves_all_rows_and_half_precision_stays():
    logits = mx.arange(6).reshape(2, 3).astype(mx.bfloat16)
    found = masked(logits, words_of({1}, 1))
    assert found.dtype == mx.bfloat16
    assert found.tolist() == [[-math.inf, 1, -math.inf], [-math.inf, 4, -math.inf]]


def test_words_that_are_slices_of_others_are_read_as_they_are():
    words = np.zeros((2, 4), dtype=np.uint32)
    words[:, ::2] = [[1, 2], [4, 8]]
    found = np.array(masked(mx.zeros((2, 64)), words[:, ::2]))
    assert [np.flatnonzero(row == 0).tolist() for row in found] == [[0, 33], [2, 35]]


@pytest.mark.parametrize(
    "words, says",
    [
        (np.ones(2, dtype=np.int64), "int64"),
        (np.ones(1, dtype=np.uint32), r"uint32 \[1\]; for logits \[2, 40\] give uint32 \[2\] or \[2, 2\]"),
        (np.ones((3, 2), dtype=np.uint32), r"\[3, 2\]"),
        (np.zeros(2, dtype=np.uint32), "no token"),
        (np.array([[1, 0], [0, 0]], dtype=np.uint32), "no token"),
        (np.array([0, 1 << 8], dtype=np.uint32), "no token"),  # token 40, which there is not
    ],
)
def test_what_is_no_mask_is_refused(words, says):
    with pytest.raises(ArgumentError, match=says):
        masked(mx.zeros((2, 40)), words)
