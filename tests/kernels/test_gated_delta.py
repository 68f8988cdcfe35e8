"""The gated delta rule: its definition against NumPy, its twins against the definition, and the hard cases."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35.kernels.gated_delta import gated_delta, gated_delta_states, has_own_form, plain_gated_delta
from mlx_qwen35.kernels.gated_delta.products import gated_delta_products
from mlx_qwen35.kernels.gated_delta.reference import gated_delta_chunks, gated_delta_steps

from ..reference_numpy import delta_rule

FORMS = {
    "dispatch": gated_delta,
    "plain": plain_gated_delta,
    "steps": gated_delta_steps,
    "products": gated_delta_products,
    "chunks of 16": gated_delta_chunks,
    "chunks of 5": lambda *args: gated_delta_chunks(*args, chunk=5),
    "chunks of 64": lambda *args: gated_delta_chunks(*args, chunk=64),
}
SIZES = [(1, 2, 6, 8, 12), (2, 3, 3, 20, 7)]  # batch, key heads, value heads, Dk, Dv


def inputs(length, size=SIZES[0], *, seed=0, low=0.05):
    """q, k, v, decay, beta, state as the layer makes them: keys of length 1, decays in (low, 1), beta in (0, 1)."""
    batch, key_heads, heads, key_dim, dim = size
    rng = np.random.RandomState(seed)
    q, k = (rng.standard_normal((batch, length, key_heads, key_dim)) for _ in range(2))
    q, k = (a / np.linalg.norm(a, axis=-1, keepdims=True) for a in (q, k))
    v = rng.standard_normal((batch, length, heads, dim))
    decay, beta = rng.uniform(low, 1, (batch, length, heads)), rng.uniform(0, 1, (batch, length, heads))
    state = rng.standard_normal((batch, heads, dim, key_dim))
    return [a.astype(np.float32) for a in (q / key_dim**0.5, k, v, decay, beta, state)]


def by_definition(arrays):
    rows = [delta_rule(*(a[b] for a in arrays)) for b in range(len(arrays[0]))]
    return [np.stack(parts) for parts in zip(*rows, strict=True)]


def check(form, arrays, atol=2e-5):
    for got, wanted in zip(form(*map(mx.array, arrays)), by_definition(arrays), strict=True):
        assert got.dtype == mx.float32
        np.testing.assert_allclose(np.array(got), wanted, atol=atol)


@pytest.mark.parametrize("length", [1, 2, 63, 257])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("form", FORMS)
def test_equals_the_definition(form, size, length):
    check(FORMS[form], inputs(length, size))


@pytest.mark.parametrize("form", ["dispatch", "chunks of 16", "chunks of 64"])
@pytest.mark.parametrize("decay, beta", [(1.0, 1.0), (1.0, 0.5), (0.999, 0.9), (1e-30, 0.9), (0.0, 0.9), (0.5, 0.0)])
def test_a_run_of_equal_keys(form, decay, beta):
    """One token repeated makes the triangular system as ill-behaved as it gets."""
    arrays = inputs(130)
    arrays[1][:] = arrays[1][:, :1]
    arrays[3][:], arrays[4][:] = decay, beta
    check(FORMS[form], arrays, atol=1e-4)


@pytest.mark.parametrize("form", ["dispatch", "plain"])
@pytest.mark.parametrize("cut", [1, 16, 17, 100])
def test_cut_anywhere_is_whole(form, cut):
    arrays = [mx.array(a) for a in inputs(101)]
    tokens, state = arrays[:5], arrays[5]
    whole, last = FORMS[form](*tokens, state)
    first, state = FORMS[form](*(a[:, :cut] for a in tokens), state)
    second, state = FORMS[form](*(a[:, cut:] for a in tokens), state)
    np.testing.assert_allclose(np.array(mx.concatenate([first, second], axis=1)), np.array(whole), atol=1e-5)
    np.testing.assert_allclose(np.array(state), np.array(last), atol=1e-5)


def test_no_state_is_a_state_of_zeros():
    arrays = inputs(5)
    arrays[5][:] = 0
    for got, wanted in zip(gated_delta(*map(mx.array, arrays[:5])), by_definition(arrays), strict=True):
        np.testing.assert_allclose(np.array(got), wanted, atol=1e-5)


@pytest.mark.parametrize("length", [1, 2, 8])
@pytest.mark.parametrize("size", SIZES)
def test_a_state_per_token_is_that_of_single_steps(size, length):
    """Bit for bit, and so is going on from any of them."""
    *tokens, state = map(mx.array, inputs(length, size))
    outputs, states = gated_delta_states(*tokens, state)
    for t in range(length):
        output, state = gated_delta(*(a[:, t : t + 1] for a in tokens), state)
        np.testing.assert_array_equal(np.array(outputs[:, t : t + 1]), np.array(output))
        np.testing.assert_array_equal(np.array(states[:, t]), np.array(state))
    np.testing.assert_allclose(np.array(outputs), by_definition(inputs(length, size))[0], atol=2e-5)
    assert states.shape == (size[0], length, *size[2:3], size[4], size[3]) and states.dtype == mx.float32


def test_states_begin_at_zero_without_one():
    *tokens, state = map(mx.array, inputs(3))
    for got, wanted in zip(gated_delta_states(*tokens), gated_delta_states(*tokens, state * 0), strict=True):
        np.testing.assert_array_equal(np.array(got), np.array(wanted))


@pytest.mark.parametrize(
    ("heads", "tokens", "gpu", "metal", "own"),
    [
        (((16, 128), (48, 128)), 2048, True, True, True),  # 27B on a Mac
        (((16, 128), (64, 128)), 1, True, True, True),  # 397B on a Mac
        (((2, 32), (4, 48)), 1, True, True, False),  # the demo: no kernel for these sizes
        (((16, 128), (48, 128)), 1, True, False, False),  # CUDA has no kernel at all
        (((2, 32), (4, 48)), 15, False, False, False),  # on a CPU forms of ours are the faster ones
        (((2, 32), (4, 48)), 16, False, False, False),
    ],
)
def test_the_plain_form_runs_where_mlx_has_no_kernel_or_a_slow_one(heads, tokens, gpu, metal, own):
    expected = own and hasattr(mx.fast, "gated_delta_update")
    assert has_own_form(*heads, tokens, gpu=gpu, metal=metal) is expected


@pytest.mark.parametrize("size", [SIZES[0], (1, 16, 32, 128, 128), (1, 2, 4, 32, 48)])
def test_a_sequence_has_the_same_bits_among_others(size):
    count = 9
    *tokens, state = map(mx.array, inputs(3, (count, *size[1:])))
    outputs, states = gated_delta_products(*tokens, state)
    for row in range(count):
        one = slice(row, row + 1)
        alone, last = gated_delta_products(*(a[one] for a in tokens), state[one])
        np.testing.assert_array_equal(np.array(alone[0]), np.array(outputs[row]))
        np.testing.assert_array_equal(np.array(last[0]), np.array(states[row]))


@pytest.mark.parametrize("cut", [1, 7, 14])
def test_few_tokens_have_the_same_bits_however_they_are_cut(cut):
    """Verified together or decoded one by one."""
    *tokens, state = map(mx.array, inputs(15))
    whole, last = gated_delta(*tokens, state)
    first, state = gated_delta(*(a[:, :cut] for a in tokens), state)
    second, state = gated_delta(*(a[:, cut:] for a in tokens), state)
    np.testing.assert_array_equal(np.array(mx.concatenate([first, second], axis=1)), np.array(whole))
    np.testing.assert_array_equal(np.array(state), np.array(last))
