"""The whole text model: against NumPy, and against itself cut, batched, padded and rolled back."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35.layers.delta_net import GatedDeltaNet
from tests.tiny_model import run, some_tokens, tiny_model

L, F = "linear_attention", "full_attention"
TOLERANCE = 1e-3  # of logits whose standard deviation is 1 to 8

SHAPES = {
    "dense": ("dense", {}),
    "moe": ("moe", {}),
    "attention first": ("dense", {"layer_types": [F, L, F, F, L], "tie_word_embeddings": False}),
    "only delta": ("moe", {"layer_types": [L, L], "tie_word_embeddings": True}),
    "only attention": ("dense", {"layer_types": [F, F], "num_key_value_heads": 1}),
    "short conv": ("dense", {"layer_types": [L, F], "linear_conv_kernel_dim": 2, "linear_num_value_heads": 2}),
    "no conv": ("dense", {"layer_types": [L, F], "linear_conv_kernel_dim": 1}),
    "long conv": ("dense", {"layer_types": [L, L], "linear_conv_kernel_dim": 7, "linear_value_head_dim": 5}),
    "all turned": (
        "dense",
        {"layer_types": [F, L], "rope_parameters": {"partial_rotary_factor": 1.0, "mrope_section": [4, 2, 2]}},
    ),
    "yarn": (
        "moe",
        {
            "layer_types": [F, L, F],
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                "rope_theta": 10000,
            },
        },
    ),
}


@pytest.fixture(scope="module", params=["dense", "moe"])
def model(request):
    return tiny_model(request.param)[0]


@pytest.mark.parametrize("name", SHAPES)
def test_equals_the_reference(name):
    kind, overrides = SHAPES[name]
    model, reference = tiny_model(kind, **overrides)
    tokens = some_tokens(63)
    wanted = reference.logits(tokens)
    np.testing.assert_allclose(run(model, tokens), wanted, atol=TOLERANCE)
    np.testing.assert_allclose(run(model, tokens, cuts=[1, 7, 2, 30]), wanted, atol=TOLERANCE)


@pytest.mark.parametrize("length", [1, 2, 257])
def test_equals_the_reference_at_length(length):
    model, reference = tiny_model("moe")
    tokens = some_tokens(length)
    np.testing.assert_allclose(run(model, tokens), reference.logits(tokens), atol=TOLERANCE)


@pytest.mark.parametrize(
    "length, cuts", [(2, [1]), (63, [1]), (257, [63]), (257, [256, 1]), (257, [1, 256]), (257, [3, 1, 64, 5])]
)
def test_cut_anywhere_is_whole(model, length, cuts):
    tokens = some_tokens(length)
    np.testing.assert_allclose(run(model, tokens, cuts=cuts), run(model, tokens), atol=TOLERANCE)


def test_rows_of_a_batch_are_single_sequences(model):
    rows = [some_tokens(63, seed=s) for s in range(3)]
    together = np.array(model(mx.array(rows), model.make_cache(3)))
    for row, logits in zip(rows, together, strict=True):
        np.testing.assert_allclose(logits, run(model, row), atol=TOLERANCE)


@pytest.mark.parametrize("cut", [1, 11, 64])
def test_padding_on_the_left_changes_nothing(model, cut):
    rows = [some_tokens(n, seed=n) for n in (33, 1, 20)]
    width = max(map(len, rows))
    padding = [width - len(row) for row in rows]
    cache = model.make_cache(3, padding)
    padded = mx.array([[pad] * pad + row for pad, row in zip(padding, rows, strict=True)])  # padded with any token
    logits = np.concatenate([np.array(model(padded[:, i : i + cut], cache)) for i in range(0, width, cut)], axis=1)
    assert np.isfinite(logits).all()
    following = np.array(model(mx.array([[5], [6], [7]]), cache))
    for n, row in enumerate(rows):
        alone = run(model, row + [5 + n])
        np.testing.assert_allclose(logits[n, padding[n] :], alone[:-1], atol=TOLERANCE)
        np.testing.assert_allclose(following[n, 0], alone[-1], atol=TOLERANCE)


def test_delta_layers_mask_only_where_there_is_padding(monkeypatch):
    model, _ = tiny_model("dense", layer_types=[L])
    masks, call = [], GatedDeltaNet.__call__

    def watched(self, x, state, present):
        masks.append(present)
        return call(self, x, state, present)

    monkeypatch.setattr(GatedDeltaNet, "__call__", watched)
    cache = model.make_cache(2, [5, 0])
    for length in (4, 2, 3, 1):
        model(mx.ones((2, length), mx.int32), cache)
    assert [mask is not None for mask in masks] == [True, True, False, False]
    assert masks[1].tolist() == [[False, True], [True, True]]


def test_rollback_is_as_if_it_never_happened(model):
    start, wrong, right = some_tokens(50, seed=1), some_tokens(220, seed=2), some_tokens(9, seed=3)
    cache = model.make_cache()
    run(model, start, cuts=[32], cache=cache)
    snapshot = cache.snapshot()
    for cuts in ([220], [1, 219]):
        run(model, wrong, cuts=cuts, cache=cache)
        cache.restore(snapshot)
        assert cache.offset == len(start)
    after = run(model, right, cuts=[2], cache=cache)
    untouched = model.make_cache()
    run(model, start, cuts=[32], cache=untouched)
    np.testing.assert_array_equal(after, run(model, right, cuts=[2], cache=untouched))


def test_an_interrupted_call_is_undone_by_restore():
    model, _ = tiny_model("dense", layer_types=[F, L, F])
    cache = model.make_cache()
    run(model, some_tokens(5), cuts=[5], cache=cache)
    snapshot = cache.snapshot()
    cache.layers[0].update(*(mx.ones((1, 3, 2, 16)) for _ in range(2)))  # a layer ran, the call did not end
    cache.restore(snapshot)
    again = run(model, some_tokens(5) + [1, 2], cuts=[5, 2])[5:]
    np.testing.assert_array_equal(run(model, [1, 2], cache=cache), again)


def test_head_of_the_last_row_is_the_last_logits(model):
    tokens = mx.array([some_tokens(9)])
    hidden = model.hidden(tokens)
    assert hidden.shape == (1, 9, 64)
    np.testing.assert_allclose(np.array(model.head(hidden[:, -1])), np.array(model(tokens))[:, -1], atol=1e-5)


def test_rope_delta_shifts_what_comes_after():
    """As an image does, which takes fewer positions than tokens."""
    model, reference = tiny_model("dense", layer_types=[F, L, F])
    cache, tokens = model.make_cache(), some_tokens(30)
    run(model, tokens[:20], cache=cache)
    cache.rope_delta = -8
    wanted = reference.logits(tokens, positions=[*range(20), *range(12, 22)])
    np.testing.assert_allclose(run(model, tokens[20:], cuts=[4], cache=cache), wanted[20:], atol=TOLERANCE)


def test_positions_count_from_the_first_token_of_each_row():
    model, _ = tiny_model("dense", layer_types=[F])
    rope, seen = model._rope, []
    model._rope = lambda positions: seen.append(positions.tolist()) or rope(positions)
    cache = model.make_cache(2, [3, 0])
    model(mx.ones((2, 5), mx.int32), cache)
    model(mx.ones((2, 2), mx.int32), cache)
    assert seen == [[[0, 0, 0, 0, 1], [0, 1, 2, 3, 4]], [[2, 3], [5, 6]]]


def test_bfloat16_stays_bfloat16_but_for_the_delta_state():
    model, _ = tiny_model("dense", layer_types=[L, F])
    whole = run(model, some_tokens(20))
    model.set_dtype(mx.bfloat16)
    norm = model.layers[0].input_layernorm
    norm.weight = norm.weight.astype(mx.float32)
    model.layers[0].linear_attn.A_log = model.layers[0].linear_attn.A_log.astype(mx.float32)
    cache = model.make_cache()
    logits = model(mx.array([some_tokens(20)]), cache)
    assert logits.dtype == mx.bfloat16
    delta, attention = cache.layers
    assert delta.matrix.dtype == mx.float32
    assert {delta.conv.dtype, attention.keys.dtype, attention.values.dtype} == {mx.bfloat16}
    assert np.abs(np.array(logits.astype(mx.float32))[0] - whole).mean() < 0.1 * whole.std()


def test_parameters_carry_the_agreed_names():
    from mlx.utils import tree_flatten

    model, _ = tiny_model("moe", layer_types=[L, F])
    names = {name for name, _ in tree_flatten(model.parameters())}
    ffn = ["gate", "shared_expert_gate"]
    ffn += [f"{b}.{p}_proj" for b in ("experts", "shared_expert") for p in ("gate", "up", "down")]
    both = ["input_layernorm", "post_attention_layernorm", *(f"mlp.{f}" for f in ffn)]
    delta = [*(f"in_proj_{p}" for p in ("qkv", "z", "b", "a")), "conv1d", "norm", "out_proj"]
    attention = [*(f"{p}_proj" for p in "qkvo"), "q_norm", "k_norm"]
    wanted = {"embed_tokens.weight", "norm.weight", "lm_head.weight"}
    wanted |= {f"layers.{n}.{b}.weight" for n in range(2) for b in both}
    wanted |= {f"layers.0.linear_attn.{d}.weight" for d in delta}
    wanted |= {"layers.0.linear_attn.A_log", "layers.0.linear_attn.dt_bias"}
    wanted |= {f"layers.1.self_attn.{a}.weight" for a in attention}
    assert names == wanted


@pytest.mark.parametrize("tokens", [[1, 2], [[[1]]], [[]]])
def test_tokens_of_another_shape_are_refused(tokens):
    model, _ = tiny_model("dense", layer_types=[F])
    with pytest.raises(ValueError, match=r"\[batch, length\]"):
        model(mx.array(tokens, mx.int32))


@pytest.mark.parametrize("padding", [[1], [1, 2, 3], [-1, 0]])
def test_left_padding_of_another_batch_is_refused(padding):
    model, _ = tiny_model("dense", layer_types=[F])
    with pytest.raises(ValueError, match="left_padding"):
        model.make_cache(2, padding)
