"""The cache on its own: growing, trimming, going back."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35.cache import Cache, DeltaState, KVCache


def pieces(*lengths, seed=0):
    """Keys and values [2, 3, T, D] of different widths, one pair per length."""
    rng = np.random.RandomState(seed)
    return [tuple(mx.array(rng.standard_normal((2, 3, n, d)).astype(np.float32)) for d in (4, 6)) for n in lengths]


@pytest.mark.parametrize("lengths", [(1,), (255, 1, 1), (256, 1), (1, 257), (600, 3)])
def test_update_returns_all_that_was_appended(lengths):
    cache, parts = KVCache(), pieces(*lengths)
    for keys, values in parts:
        held = cache.update(keys, values)
    assert cache.offset == sum(lengths)
    for n, array in enumerate(held):
        np.testing.assert_array_equal(np.array(array), np.concatenate([np.array(p[n]) for p in parts], axis=2))


def test_capacity_grows_in_steps():
    cache = KVCache()
    for keys, values in pieces(1, 254, 1):
        cache.update(keys, values)
        assert cache.keys.shape == (2, 3, 256, 4)
    cache.update(*pieces(1)[0])
    assert cache.values.shape == (2, 3, 512, 6)


def test_positions_that_were_forgotten_are_written_again():
    cache, (first, second, third) = KVCache(), pieces(5, 7, 2)
    cache.update(*first)
    cache.update(*second)
    cache.rewind(5)
    keys, _ = cache.update(*third)
    np.testing.assert_array_equal(np.array(keys), np.concatenate([np.array(first[0]), np.array(third[0])], axis=2))


def filled(cache: Cache, length: int, seed: int) -> None:
    """Let `length` positions pass, as a model would."""
    kv, delta = cache.layers
    kv.update(*pieces(length, seed=seed)[0])
    delta.update(mx.full((2, 3, 4), float(seed)), mx.full((2, 2, 3, 5), float(seed)))
    cache.offset += length


def contents(cache: Cache) -> list:
    kv, delta = cache.layers
    held = [kv.keys[..., : kv.offset, :], kv.values[..., : kv.offset, :], delta.conv, delta.matrix]
    return [np.array(a) for a in held] + [cache.offset, cache.rope_delta]


def test_restore_gives_exactly_what_was():
    cache = Cache([KVCache(), DeltaState()])
    filled(cache, 200, 1)
    cache.rope_delta = -3
    before, snapshot = contents(cache), cache.snapshot()
    filled(cache, 100, 2)
    cache.rope_delta = 4
    cache.restore(snapshot)
    for a, b in zip(contents(cache), before, strict=True):
        np.testing.assert_array_equal(a, b)


def test_restore_to_the_empty_beginning():
    cache = Cache([KVCache(), DeltaState()])
    snapshot = cache.snapshot()
    filled(cache, 3, 1)
    cache.restore(snapshot)
    assert cache.offset == 0 and cache.layers[0].offset == 0 and cache.layers[1].matrix is None


def test_nested_snapshots_and_one_that_was_overwritten():
    cache = Cache([KVCache(), DeltaState()])
    filled(cache, 4, 1)
    early = cache.snapshot()
    filled(cache, 4, 2)
    late = cache.snapshot()
    filled(cache, 4, 3)
    cache.restore(late)
    filled(cache, 4, 4)
    cache.restore(late)
    assert cache.offset == 8
    cache.restore(early)
    filled(cache, 40, 5)
    with pytest.raises(ValueError, match="take a new snapshot"):
        cache.restore(late)  # its keys were overwritten, though the cache is long enough again
    cache.restore(early)
    assert cache.offset == 4


def test_arrays_and_bytes():
    cache = Cache([KVCache(), DeltaState()])
    assert cache.arrays() == [] and cache.nbytes == 0
    filled(cache, 3, 1)
    assert cache.nbytes == 4 * (2 * 3 * 256 * (4 + 6) + 2 * 3 * 4 + 2 * 2 * 3 * 5)


def test_padding_is_kept_only_where_there_is_some():
    assert Cache([], left_padding=[0, 0]).left_padding is None
    assert Cache([], left_padding=[0, 2]).left_padding.tolist() == [0, 2]
