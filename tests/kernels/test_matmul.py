"""A few rows have the bits that each has alone, whatever BLAS is there."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35.kernels.few_rows import MOST_ROWS
from mlx_qwen35.kernels.matmul import matmul


@pytest.mark.parametrize("size, out", [(64, 96), (192, 4), (333, 777), (1024, 16), (1024, 2048), (2048, 1)])
def test_few_rows_are_each_row_alone(size, out):
    rng = np.random.default_rng(0)
    weight = mx.array(rng.standard_normal((out, size)).astype(np.float32))
    for rows in range(1, MOST_ROWS + 1):
        x = mx.array(rng.standard_normal((1, rows, size)).astype(np.float32))
        whole = np.array(matmul(x, weight))
        alone = np.concatenate([np.array(matmul(x[:, row : row + 1], weight)) for row in range(rows)], axis=1)
        assert whole.shape == (1, rows, out) and np.array_equal(whole, alone)
        np.testing.assert_allclose(whole[0], np.array(x[0]).astype(np.float64) @ np.array(weight).T, atol=1e-3)


def test_many_rows_and_other_shapes():
    rng = np.random.default_rng(1)
    x, weight = (mx.array(rng.standard_normal(shape).astype(np.float32)) for shape in ((2, 3, 7, 24), (10, 24)))
    for part in (x, x[0], x[0, 0], x[:, :, :1], x[0, :2, :2]):
        np.testing.assert_allclose(np.array(matmul(part, weight)), np.array(part) @ np.array(weight).T, atol=1e-5)
