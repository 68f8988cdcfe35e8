"""Attention over stretches of keys and values: it is the whole, whatever the blocks, the stretches and the form."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35.cache import KVCache, StretchedKVCache
from mlx_qwen35.cache.kv import KVFormat, Stretch
from mlx_qwen35.layers.attention import causal_attention
from mlx_qwen35.layers.stretches import stretched_attention

from .test_attention import arrays


def stretches(keys, values, cuts, form=None):
    made, start = [], 0
    for stop in (*cuts, keys.shape[2]):
        made.append(Stretch(form))
        made[-1].append(keys[:, :, start:stop], values[:, :, start:stop])
        start = stop
    return made


@pytest.mark.parametrize(
    "length, past, cuts, most_scores",
    [
        (63, 0, (), 1),
        (64, 13, (13,), 5000),
        (2, 100, (1, 70, 101), 1),
        (257, 5, (3, 99), 20_000),
        (700, 1, (9,), 2**24),
    ],
)
@pytest.mark.parametrize("padded", [False, True])
def test_blocks_are_the_whole(length, past, cuts, padded, most_scores):
    queries, keys, values = arrays(length, past)
    readable = mx.arange(past + length) >= mx.array([[3], [0]]) if padded else None
    whole = causal_attention(queries, keys, values, readable)
    blocks = stretched_attention(queries, stretches(keys, values, cuts), readable, most_scores=most_scores)
    np.testing.assert_allclose(np.array(blocks), np.array(whole), atol=2e-6)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("length", [1, 3, 600])
def test_packed_keys_are_read_as_what_they_stand_for(bits, length):
    queries, keys, values = arrays(length, 40, dim=64)
    form = KVFormat(bits, 32)
    meant = [mx.dequantize(*mx.quantize(x, 32, bits), 32, bits) for x in (keys, values)]
    found = stretched_attention(queries, stretches(keys, values, (7, 40), form), most_scores=40_000)
    np.testing.assert_allclose(np.array(found), np.array(causal_attention(queries, *meant)), atol=1e-5)
    # and it is no accident that they agree: what they stand for is not what they were
    assert np.abs(np.array(found) - np.array(causal_attention(queries, keys, values))).max() > 1e-3


@pytest.mark.parametrize("start", [0, 5, 300])
def test_the_form_of_a_position_does_not_depend_on_the_pieces(start):
    _, keys, values = arrays(700, dim=64)
    caches = [StretchedKVCache(KVFormat(8, 64, start)) for _ in range(2)]
    caches[0].reserved = 650
    for cache, cuts in zip(caches, ((700,), (3, 5, 299, 301, 302, 700)), strict=True):
        at = 0
        for stop in cuts:
            cache.update(keys[:, :, at:stop], values[:, :, at:stop])
            at = stop
        assert cache.offset == 700
        assert [(s.form is None, s.length) for s in cache.stretches] == [(True, start)] * (start > 0) + [
            (False, 700 - start)
        ]
    for one, other in zip(*(cache.stretches for cache in caches), strict=True):
        for a, b in zip(one.arrays(), other.arrays(), strict=True):
            np.testing.assert_array_equal(np.array(a[..., : one.length, :]), np.array(b[..., : one.length, :]))


def held(cache: StretchedKVCache) -> np.ndarray:
    return np.concatenate([np.array(s.keys[0][..., : s.length, :]) for s in cache.stretches], axis=2)


def test_branches_share_what_was_and_go_on_alone():
    _, keys, values = arrays(40)
    cache = KVCache()
    cache.update(keys[:, :, :20], values[:, :, :20])
    one, other = cache.branched()
    assert one.stretches[0].keys[0] is other.stretches[0].keys[0]
    one.update(keys[:, :, 20:25], values[:, :, 20:25])
    other.update(keys[:, :, 30:37], values[:, :, 30:37])
    third, _ = other.branched()
    third.rewind(22)
    third.update(keys[:, :, 5:6], values[:, :, 5:6])
    whole = np.array(keys)
    np.testing.assert_array_equal(held(one), whole[:, :, :25])
    np.testing.assert_array_equal(held(other), np.concatenate([whole[:, :, :20], whole[:, :, 30:37]], axis=2))
    np.testing.assert_array_equal(
        held(third), np.concatenate([whole[:, :, :20], whole[:, :, 30:32], whole[:, :, 5:6]], axis=2)
    )
    one.rewind(3)
    assert one.offset == 3 and other.offset == 27
    np.testing.assert_array_equal(held(one), whole[:, :, :3])


def test_room_is_made_once_where_it_was_reserved():
    _, keys, values = arrays(600)
    for cache in (KVCache(), StretchedKVCache()):
        cache.reserved = 600
        cache.update(keys[:, :, :10], values[:, :, :10])
        assert cache.arrays()[0].shape[2] == 768


def test_a_form_that_mlx_lacks_is_refused():
    for wrong in ({"bits": 3}, {"bits": 8, "group_size": 48}, {"bits": 4, "start": -1}):
        with pytest.raises(ValueError, match="kv_"):
            KVFormat(**wrong)
