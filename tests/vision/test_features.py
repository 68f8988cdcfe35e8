"""The store of features on its own: what it keeps, what it lets go of, and that its bound is real memory."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35.vision.features import FeatureStore

ROW = 64 * 4  # bytes of one feature


def features(rows: int, value: float = 1.0) -> mx.array:
    return mx.full((rows, 64), value)


def test_what_was_used_longest_ago_goes_first():
    store = FeatureStore(most_bytes=10 * ROW)
    store["a"], store["b"], store["c"] = features(4), features(3), features(3)
    assert store.nbytes == 10 * ROW and list(store) == ["a", "b", "c"]
    assert store["a"].shape == (4, 64)  # a use
    assert "b" in store  # no use
    store["d"] = features(1)
    assert list(store) == ["c", "a", "d"] and len(store) == 3
    assert store.nbytes == 8 * ROW
    store["e"] = features(6)
    assert list(store) == ["d", "e"]


def test_setting_again_and_deleting_keep_count():
    store = FeatureStore(most_bytes=10 * ROW)
    store["a"] = features(4)
    store["a"] = features(6, 2.0)
    assert store.nbytes == 6 * ROW and store["a"][0, 0].item() == 2.0
    store["b"] = features(2)
    del store["a"]
    assert store.nbytes == 2 * ROW and list(store) == ["b"]
    with pytest.raises(KeyError):
        store["a"]
    store.clear()
    assert store.nbytes == 0


def test_what_is_too_large_leaves_the_others_alone():
    store = FeatureStore(most_bytes=10 * ROW)
    store["a"], store["b"] = features(4), features(5)
    store["large"] = features(11)
    assert list(store) == ["a", "b"]
    store["a"] = features(11)  # the old ones are no longer those of "a"
    assert list(store) == ["b"] and store.nbytes == 5 * ROW
    nothing = FeatureStore(most_bytes=0)
    nothing["a"] = features(1)
    assert not nothing
    with pytest.raises(ValueError, match="most_bytes is -1"):
        FeatureStore(most_bytes=-1)


def test_a_part_of_a_buffer_does_not_keep_the_buffer():
    store = FeatureStore()
    mx.clear_cache()
    before = mx.get_active_memory()
    together = mx.random.normal((20_000, 64))
    mx.eval(together)
    part = together[40:50]
    mx.eval(part)
    wanted = np.array(part)
    store["a"] = part
    del together, part
    assert mx.get_active_memory() - before <= store.nbytes + 4096
    np.testing.assert_array_equal(np.array(store["a"]), wanted)
