"""Rotary positions: the pattern of the axes, partial rotation and YaRN."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35.config import Rope, Yarn
from mlx_qwen35.kernels.attention_inputs.reference import rotate
from mlx_qwen35.layers.rope import RotaryEmbedding

PUBLISHED = Rope(theta=1e7, rotary_dim=64, mrope_section=(11, 11, 10), yarn=None)


def angles(rope: Rope, positions) -> np.ndarray:
    """The angle of each frequency [.., T, half], small enough to be read back from its sine."""
    cos, sin = RotaryEmbedding(rope)(mx.array(positions))
    return np.arctan2(np.array(sin), np.array(cos))[:, 0]


def test_text_is_plain_rope():
    cos, sin = RotaryEmbedding(PUBLISHED)(mx.array([[0, 1, 300]]))
    assert cos.shape == (1, 1, 3, 32) and cos.dtype == mx.float32
    wanted = np.outer([0, 1, 300], 1e7 ** (-np.arange(0, 64, 2) / 64))
    np.testing.assert_allclose(np.array(cos)[0, 0], np.cos(wanted), atol=2e-5)
    np.testing.assert_allclose(np.array(sin)[0, 0], np.sin(wanted), atol=2e-5)


def test_equal_axes_are_text():
    flat = mx.array([[0, 5, 17], [1, 2, 3]])
    rope = RotaryEmbedding(PUBLISHED)
    for one, three in zip(rope(flat), rope(mx.stack([flat] * 3)), strict=True):
        np.testing.assert_array_equal(np.array(one), np.array(three))


@pytest.mark.parametrize(
    "rotary_dim, section, pattern",
    [
        (64, (11, 11, 10), "thw" * 10 + "th"),
        (8, (2, 1, 1), "thwt"),
        (16, (3, 3, 2), "thwthwth"),
        (8, (4, 0, 0), "tttt"),
    ],
)
def test_axes_interleave(rotary_dim, section, pattern):
    rope = Rope(theta=1e7, rotary_dim=rotary_dim, mrope_section=section, yarn=None)
    unit = angles(rope, [[1]])[0, 0]
    for n, axis in enumerate("thw"):
        positions = np.zeros((3, 1, 1))
        positions[n] = 1
        turned = angles(rope, positions)[0, 0]
        np.testing.assert_allclose(turned, unit * [p == axis for p in pattern], rtol=1e-6)


@pytest.mark.parametrize("half", [2, 5, 6])
def test_the_rest_passes_through(half):
    x = np.random.RandomState(0).standard_normal((2, 3, 4, 12)).astype(np.float32)
    angle = np.random.RandomState(1).standard_normal((2, 1, 4, half)).astype(np.float32)
    out = np.array(rotate(mx.array(x), mx.array(np.cos(angle)), mx.array(np.sin(angle))))
    turned = (x[..., :half] + 1j * x[..., half : 2 * half]) * np.exp(1j * angle)
    np.testing.assert_allclose(out[..., : 2 * half], np.concatenate([turned.real, turned.imag], axis=-1), atol=1e-5)
    np.testing.assert_array_equal(out[..., 2 * half :], x[..., 2 * half :])


def test_rotate_keeps_the_dtype():
    x = mx.ones((1, 1, 2, 8), mx.bfloat16)
    assert rotate(x, mx.ones((1, 1, 2, 2)), mx.zeros((1, 1, 2, 2))).dtype == mx.bfloat16


def yarn(**keys) -> RotaryEmbedding:
    keys = {"factor": 4.0, "original_max_position_embeddings": 262144} | keys
    return RotaryEmbedding(Rope(1e7, 64, (11, 11, 10), Yarn(**keys)))


def test_yarn_scales_cosines_and_sines():
    cos, sin = yarn()(mx.array([[0, 7]]))
    norm = np.sqrt(np.array(cos) ** 2 + np.array(sin) ** 2)
    np.testing.assert_allclose(norm, 1.138629, atol=1e-5)  # 0.1 ln 4 + 1


@pytest.mark.parametrize(
    "keys, factor",
    [
        ({"attention_factor": 0.5}, 0.5),
        ({"factor": 1.0}, 1.0),
        ({"mscale": 0.5, "mscale_all_dim": 2.0}, (0.05 * np.log(4) + 1) / (0.2 * np.log(4) + 1)),
        ({"mscale": 0.5}, 0.1 * np.log(4) + 1),
    ],
)
def test_yarn_attention_factor(keys, factor):
    assert yarn(**keys).factor == pytest.approx(factor)


def test_yarn_keeps_fast_frequencies_and_divides_slow_ones():
    rope = Rope(1e7, 64, (11, 11, 10), Yarn(4.0, 262144))
    ratio = angles(rope, [[1]])[0, 0] / angles(PUBLISHED, [[1]])[0, 0]
    # 32 turns in 262144 positions fall on frequency 14.2, one turn on 21.1: kept up to 14, divided by 4 from 22.
    np.testing.assert_allclose(ratio[:15], 1, rtol=1e-5)
    np.testing.assert_allclose(ratio[22:], 0.25, rtol=1e-5)
    np.testing.assert_allclose(ratio[18], (1 - 0.5) + 0.5 / 4, rtol=1e-5)
    exact = Rope(1e7, 64, (11, 11, 10), Yarn(4.0, 262144, truncate=False))
    assert angles(exact, [[1]])[0, 0][18] != angles(rope, [[1]])[0, 0][18]
