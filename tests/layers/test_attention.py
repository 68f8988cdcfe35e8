"""Gated attention: against NumPy, in tiles, with padding."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35.cache import KVCache
from mlx_qwen35.layers.attention import alike, causal_attention
from mlx_qwen35.layers.rope import RotaryEmbedding

from ..tiny_model import tiny_model


def arrays(length, past=0, *, batch=2, heads=6, kv_heads=3, dim=16, seed=0):
    rng = np.random.RandomState(seed)
    shapes = [(batch, heads, length, dim), *[(batch, kv_heads, past + length, dim)] * 2]
    return [mx.array(rng.standard_normal(s).astype(np.float32)) for s in shapes]


@pytest.mark.parametrize("length", [1, 2, 63, 257])
def test_layer_equals_the_reference(length):
    model, reference = tiny_model("dense", layer_types=["full_attention"], num_attention_heads=4, num_key_value_heads=2)
    x = np.random.RandomState(0).standard_normal((length, 64)).astype(np.float32)
    rope = RotaryEmbedding(model.config.text.rope)(mx.arange(length)[None])
    out = model.layers[0].self_attn(mx.array(x)[None], rope, KVCache())
    np.testing.assert_allclose(np.array(out)[0], reference.attention(x, 0, np.arange(length)), atol=1e-4)


def test_three_axes_of_positions_reach_queries_and_keys():
    model, reference = tiny_model("dense", layer_types=["full_attention"])
    x = np.random.RandomState(0).standard_normal((9, 64)).astype(np.float32)
    positions = np.random.RandomState(1).randint(0, 40, (3, 9))
    rope = RotaryEmbedding(model.config.text.rope)(mx.array(positions)[:, None])
    out = model.layers[0].self_attn(mx.array(x)[None], rope)
    np.testing.assert_allclose(np.array(out)[0], reference.attention(x, 0, positions), atol=1e-4)


@pytest.mark.parametrize("length, past", [(63, 0), (64, 13), (8, 100), (9, 100), (1, 5)])
@pytest.mark.parametrize("padded", [False, True])
def test_tiles_are_the_whole(length, past, padded):
    queries, keys, values = arrays(length, past)
    readable = mx.arange(past + length) >= mx.array([[3], [0]]) if padded else None
    whole = causal_attention(queries, keys, values, readable)
    tiled = causal_attention(queries, keys, values, readable, most_scores=1)  # tiles of 8 queries
    np.testing.assert_allclose(np.array(tiled), np.array(whole), atol=1e-6)


def test_tiles_bound_the_scores(monkeypatch):
    seen = []
    attend = mx.fast.scaled_dot_product_attention

    def watch(q, k, v, **options):
        seen.append(q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2])
        return attend(q, k, v, **options)

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", watch)
    causal_attention(*arrays(200, 100), most_scores=50_000)
    assert len(seen) > 1 and max(seen) <= 50_000
    assert sum(seen) < 2 * 6 * 200 * 300  # keys that no query of the tile may read are not scored


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("length, past", [(1024, 0), (512, 3584)])
def test_no_more_scores_are_in_memory_than_said(length, past, padded):
    """However many tiles there are; once some 20 were alive."""
    queries, keys, values = arrays(length, past, batch=1, heads=4, kv_heads=2)
    readable = mx.arange(past + length)[None] >= 5 if padded else None
    mx.eval(queries, keys, values, readable)
    most = 2**19
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    out = causal_attention(queries, keys, values, readable, most_scores=most)
    mx.eval(out)
    assert mx.get_peak_memory() - before < 2 * 4 * most + 2 * out.nbytes


def test_gradients_through_tiles():
    queries, keys, values = arrays(64)

    def total(q, most):
        return causal_attention(q, keys, values, most_scores=most).square().sum()

    whole, tiled = (mx.grad(total)(queries, most) for most in (2**20, 1))
    np.testing.assert_allclose(np.array(tiled), np.array(whole), atol=1e-5)


@pytest.mark.parametrize("length, past", [(12, 0), (5, 7), (1, 11)])
def test_padding_is_never_read(length, past):
    """Whatever padding leaves behind in the cache: only its own rows see it, because they read themselves."""
    queries, keys, values = arrays(length, past)
    padding = 4
    readable = mx.arange(past + length) >= mx.array([[padding], [0]])
    out = np.array(causal_attention(queries, keys, values, readable))
    for wrong in (1e4, -1e4):
        poison = mx.where(mx.arange(past + length)[:, None] < padding, mx.array([wrong, 0])[:, None, None, None], 0)
        other = np.array(causal_attention(queries, keys + poison, values + poison, readable))
        tokens = max(padding - past, 0)
        np.testing.assert_array_equal(other[0, :, tokens:], out[0, :, tokens:])
        np.testing.assert_array_equal(other[1], out[1])
    assert np.isfinite(out).all()


@pytest.mark.parametrize(
    "past, length, each, ends",
    [
        (300, 8, 8, [4, 8]), (300, 8, 16, [2, 4, 6, 8]), (300, 8, 6, [5, 8]), (300, 1, 8, [1]),
        (300, 3, 4, [1, 2, 3]),  # so few that their number chooses the order
        (300, 2, 40, [1, 2]),  # more than the kernel takes
        (1020, 6, 6, [3, 4, 6]),  # 1,023 keys are one pass, 1,024 and 1,025 others
        (8188, 8, 8, [4, 8]), (8190, 5, 8, [2, 5]),
    ],
)  # fmt: skip
def test_positions_that_add_up_as_each_does_alone(past, length, each, ends):
    assert alike(past, length, each) == ends
