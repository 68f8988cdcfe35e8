"""Cosines and sines of positions in one: against the reference, for one position a token and for three."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35.kernels.angles import angles
from mlx_qwen35.kernels.angles.reference import angles as reference
from tests.metal_emulator import check, compile_for_cuda


def inputs(shape, half, seed=0):
    rng = np.random.RandomState(seed)
    positions = mx.array(rng.randint(0, 3000, shape).astype(np.int32))
    rates = mx.array((1e4 ** -rng.uniform(0, 1, half)).astype(np.float32))
    return [positions, rates, mx.array(rng.randint(0, 3, half).astype(np.int32))]


@pytest.mark.parametrize(
    "shape, half, factor",
    [((1, 1), 32, 1.0), ((3, 1), 5, 1.3), ((2, 67), 7, 0.7), ((3, 1, 1), 32, 1.0), ((3, 2, 61), 11, 1.2)],
)
def test_equals_the_reference(shape, half, factor):
    arrays = inputs(shape, half)
    check(lambda *a: angles(*a, factor), lambda *a: reference(*a, factor), arrays, sanitize=shape == (2, 67))


def test_far_positions_turn_as_near_ones_do():
    """A position of a long context: no step of the arithmetic loses more than float32 has to."""
    positions, rates, axes = mx.array([[262_143, 1_010_000]]), mx.array([1.0, 0.5, 1e-3]), mx.zeros(3, mx.int32)
    cos, sin = check(lambda *a: angles(*a), lambda *a: reference(*a), [positions, rates, axes])
    turned = np.array(positions)[0][:, None] * np.array(rates)
    np.testing.assert_allclose(np.array(cos)[0, 0], np.cos(turned.astype(np.float32).astype(np.float64)), atol=1e-6)
    np.testing.assert_allclose(np.array(sin)[0, 0], np.sin(turned.astype(np.float32).astype(np.float64)), atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 3), (3, 2, 5)])
def test_compiles_for_cuda(shape):
    assert compile_for_cuda(lambda *a: angles(*a), inputs(shape, 5)) == {"angles"}
