"""Masked logits against a mask of booleans."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35.grammar import masked


@pytest.mark.parametrize("size", [1, 31, 32, 33, 1000, 1024])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_bits_say_what_is_left(size, dtype):
    generator = np.random.default_rng(size)
    allowed = generator.random((3, size)) < 0.4
    filled = np.zeros((3, -(-size // 32) * 32), bool)
    filled[:, :size] = allowed
    words = mx.array(np.packbits(filled, axis=1, bitorder="little").view(np.uint32))
    logits = mx.array(generator.standard_normal((3, size)).astype(np.float32)).astype(dtype)
    result = masked(logits, words)
    assert result.dtype == dtype and result.shape == logits.shape
    expected = np.where(allowed, np.array(logits.astype(mx.float32)), -np.inf)
    np.testing.assert_array_equal(np.array(result.astype(mx.float32)), expected)


def test_one_mask_serves_all_rows():
    result = masked(mx.zeros((4, 40)), mx.array([[1 << 31, 1]], mx.uint32))
    assert (np.isfinite(np.array(result)).nonzero()[1] == [31, 32] * 4).all()
