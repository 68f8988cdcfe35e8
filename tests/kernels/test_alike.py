"""Columns of one product: as many go together as have the bits that each has alone, and no more."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35.kernels.few_rows import alike


@pytest.mark.parametrize("outputs, inputs", [(1024, 32), (960, 32), (100, 64), (576, 192), (192, 64), (1, 24)])
def test_what_is_called_alike_has_the_same_bits_with_other_values(outputs, inputs):
    rng = np.random.default_rng(5)
    weight, x = (mx.array(rng.standard_normal(shape, np.float32)) for shape in ((outputs, inputs), (inputs, 16)))
    alone = np.concatenate([np.array(weight @ mx.contiguous(x[:, n : n + 1])) for n in range(16)], axis=1)
    for columns in range(2, 17):
        if alike.alike(outputs, inputs, columns):
            np.testing.assert_array_equal(np.array(weight @ mx.contiguous(x[:, :columns])), alone[:, :columns])


def test_the_width_is_the_largest_that_every_form_allows(monkeypatch):
    allowed = {(8, 2): {2, 3, 4, 6}, (9, 2): {2, 3, 4, 12}}
    monkeypatch.setattr(alike, "alike", lambda outputs, inputs, columns: columns in allowed[outputs, inputs])
    alike.width_of.cache_clear()
    both = frozenset(allowed)
    # columns    parts of which width: 12 in one is not allowed to the first form, 6 in each of two not to the second
    assert [alike.width_of(both, columns) for columns in (1, 2, 4, 5, 12)] == [1, 2, 4, 3, 4]
    assert alike.width_of(frozenset({(9, 2)}), 12) == 12 and alike.width_of(frozenset({(8, 2)}), 12) == 6
    alike.width_of.cache_clear()


def test_products_that_one_thread_computes_stay_with_it(monkeypatch):
    monkeypatch.setattr(alike, "alike", lambda *form: True)
    alike.width_of.cache_clear()
    assert alike.width_of(frozenset({(512, 128)}), 8) == 4  # 2**16 a column, and 2**18 are still one thread's
    assert alike.width_of(frozenset({(512, 1024)}), 8) == 8  # has others with one column, too
    alike.width_of.cache_clear()
