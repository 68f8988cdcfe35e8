"""The fused delta net against its reference, and against the layer's own steps; what is promised about bits."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35.kernels.delta_decode import SIMDS, delta_decode
from mlx_qwen35.kernels.delta_decode.reference import delta_decode as reference
from tests.metal_emulator import check, compile_for_cuda, poisoned_outputs

# batch, tokens, key heads, value heads, Dk, Dv, taps
SIZES = [(1, 1, 2, 6, 8, 12, 4), (2, 2, 3, 3, 20, 7, 2), (1, 8, 1, 2, 40, 33, 4), (1, 3, 2, 2, 128, 128, 4),
         (1, 63, 1, 2, 12, 9, 3), (1, 257, 1, 2, 12, 9, 4)]  # fmt: skip
EPS = 1e-6


def inputs(size, dtype=mx.float32, *, seed=0, spare=0):
    """The reference's arrays, as layers make them; spare: columns of other things around b and a."""
    batch, tokens, key_heads, heads, key_dim, value_dim, count = size
    channels = 2 * key_heads * key_dim + heads * value_dim
    rng = np.random.RandomState(seed)

    def normal(*shape, spread=1.0, middle=0.0):
        return mx.array((middle + spread * rng.standard_normal(shape)).astype(np.float32))

    arrays = [
        normal(batch, tokens, channels + heads * value_dim), normal(batch, tokens, 2 * heads + 2 * spare),
        normal(batch, count - 1, channels), normal(channels, count, spread=0.5),
    ]  # fmt: skip
    kept = [normal(heads), normal(heads, middle=-2), normal(value_dim, spread=0.3, middle=1)]
    return [a.astype(dtype) for a in arrays] + [*kept, normal(batch, heads, value_dim, key_dim)]


def last(result):
    y, windows, states = result
    return y, windows[:, -1], states[:, -1]


F32, BF16 = mx.float32, mx.bfloat16


@pytest.mark.parametrize(
    "number, dtype, each",
    [(0, F32, False), (1, F32, True), (2, F32, True), (2, BF16, True), (3, BF16, False), (3, F32, True),
     (4, F32, True), (4, BF16, False), (5, F32, False)],
)  # fmt: skip
def test_equals_the_reference(number, dtype, each):
    size = SIZES[number]
    how = {"key_heads": size[2], "eps": EPS}
    check(
        lambda *a: delta_decode(*a, **how, each=each),
        lambda *a: reference(*a, **how) if each else last(reference(*a, **how)),
        inputs(size, dtype),
        sanitize=number < 2,
    )


def test_columns_of_a_joined_product():
    """b and a lie behind the rest in one array."""
    size = SIZES[1]
    mixed, gates, *rest = inputs(size, spare=2)
    joined = mx.concatenate([mixed, gates], axis=-1)
    at = mixed.shape[-1] + 2
    check(
        lambda j, *a: delta_decode(j, j, *a, key_heads=3, eps=EPS, gates_at=at),
        lambda j, *a: last(reference(mixed, gates[..., 2:-2], *a, key_heads=3, eps=EPS)),
        [joined, *rest],
    )


def test_extremes_stay_finite():
    """Decays of 0 and 1, gates shut and open, keys of zeros."""
    mixed, gates, *rest = inputs(SIZES[0])
    gates[..., :6] = mx.array([-200.0, 200, 0, 90, -90, 1])
    gates[..., 6:] = mx.array([200.0, -200, 90, -90, 0, 1])
    mixed[..., :32] = 0
    rest[0][..., :32] = 0
    check(
        lambda *a: delta_decode(*a, key_heads=2, eps=EPS),
        lambda *a: last(reference(*a, key_heads=2, eps=EPS)),
        [mixed, gates, *rest],
    )


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_token_has_the_same_bits_alone(dtype):
    """Verified with others or decoded by itself: outputs, windows and states, and what goes on from them."""
    mixed, gates, window, *weights, state = inputs(SIZES[2], dtype)
    how = {"key_heads": 1, "eps": EPS}
    with poisoned_outputs():
        together = delta_decode(mixed, gates, window, *weights, state, **how, each=True)
        for t in range(mixed.shape[1]):
            token = slice(t, t + 1)
            y, window, state = delta_decode(mixed[:, token], gates[:, token], window, *weights, state, **how)
            assert mx.array_equal(y, together[0][:, token])
            assert mx.array_equal(window, together[1][:, t]) and mx.array_equal(state, together[2][:, t])


def test_fewer_simd_groups_give_the_same_bits():
    """For a GPU that does not give so many threads so many registers."""
    size = SIZES[2]
    how = {"key_heads": size[2], "eps": EPS}
    arrays = inputs(size)
    made = [check(lambda *a: delta_decode(*a, **how, each=True, most_simds=n),  # noqa: B023
                  lambda *a: reference(*a, **how), arrays) for n in SIMDS]  # fmt: skip
    for others in zip(*made, strict=True):
        assert all(mx.array_equal(others[0], other) for other in others[1:])


def test_one_kernel_for_any_number_of_tokens():
    """Decoded alone or verified with others, wanted after each or not: not a text that is compiled for each."""
    with poisoned_outputs() as emulator:
        for tokens, each in [(1, False), (1, True), (3, True), (5, False)]:
            arrays = inputs((2, tokens, *SIZES[1][2:]))
            mx.eval(delta_decode(*arrays, key_heads=3, eps=EPS, each=each))
    if emulator is not None:
        assert len({id(launch.program) for launch in emulator.launches}) == 1


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_compiles_for_cuda(dtype):
    made = compile_for_cuda(lambda *a: delta_decode(*a, key_heads=2, eps=EPS, each=True), inputs(SIZES[3], dtype))
    assert made == {"delta_decode"}
