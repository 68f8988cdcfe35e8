"""The bytes of GGUF's types against gguf-py's quantizers, which are held against ggml's own."""

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from mlx_qwen35.checkpoint.gguf.types import KINDS, NUMBERS
from mlx_qwen35.conversion.gguf.blocks import BLOCKED, ENCODERS, Overflow, encode

SHAPES = ((1, 32), (3, 96), (2, 5, 64))


def drawn(shape: tuple[int, ...], seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(shape) * np.exp(rng.uniform(-12, 6, (*shape[:-1], 1)))
    return values.astype(np.float32)


def as_bfloat16(values: np.ndarray) -> np.ndarray:
    return (values.view(np.uint32) & 0xFFFF0000).view(np.float32)


def theirs(values: np.ndarray, kind: str) -> bytes:
    return quantize(values, GGMLQuantizationType[kind]).tobytes()


@pytest.mark.parametrize("kind", ENCODERS)
def test_bytes_are_those_of_the_reference(kind: str) -> None:
    for seed, shape in enumerate(SHAPES):
        values = drawn(shape, seed)
        for given in (values, as_bfloat16(values)):
            found = encode(given, kind)
            assert found.shape == (*shape[:-1], shape[-1] // KINDS[NUMBERS[kind]].values * KINDS[NUMBERS[kind]].nbytes)
            assert found.tobytes() == theirs(given, kind)


@pytest.mark.parametrize("kind", ENCODERS)
def test_a_million_values(kind: str) -> None:
    values = as_bfloat16(drawn((4096, 256), 7))
    assert encode(values, kind).tobytes() == theirs(values, kind)


@pytest.mark.parametrize("kind", BLOCKED)
def test_ties_zeros_and_single_values(kind: str) -> None:
    steps = np.arange(-128, 128, dtype=np.float32) / 2  # halves of every step, in blocks of growing size
    rows = [np.roll(steps, shift) * np.float32(2.0**power) for shift in range(0, 32, 5) for power in (-20, 0, 9)]
    rows += [np.zeros(256, np.float32), np.eye(8, 32, dtype=np.float32).reshape(-1), -np.ones(256, np.float32)]
    rows += [np.full(256, -0.0, np.float32)]
    values = np.stack(rows)
    assert encode(values, kind).tobytes() == theirs(values, kind)


@pytest.mark.parametrize("kind", BLOCKED)
def test_what_vanishes_is_zero(kind: str) -> None:
    """Where the reciprocal of a scale would be infinite, C leaves the codes undefined; ours are those of zeros."""
    values = np.zeros((1, 32), np.float32)
    values[0, 3], values[0, 7] = 1e-41, -3e-43
    back = dequantize(encode(values, kind), GGMLQuantizationType[kind])
    assert np.abs(back).max() <= 2e-41


@pytest.mark.parametrize("kind", BLOCKED)
def test_quantizing_what_is_quantized_changes_nothing(kind: str) -> None:
    once = encode(drawn((64, 256), 3), kind)
    again = encode(dequantize(once, GGMLQuantizationType[kind]), kind)
    first, second = (dequantize(found, GGMLQuantizationType[kind]) for found in (once, again))
    if kind in ("MXFP4", "Q4_0"):
        assert np.array_equal(first, second)
    else:  # a maximum that was rounded is another maximum
        assert np.abs(first - second).max() <= 2e-3 * np.abs(first).max()


def test_every_e2m1_grid_of_another_scale_is_held_exactly() -> None:
    """MLX takes other scales than ggml: a block whose largest code is small gets a smaller one, and the same values."""
    grid = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    rng = np.random.default_rng(0)
    blocks = [
        rng.choice(grid[: most + 1], 32) * rng.choice([-1, 1], 32) * np.float32(2.0**power)
        for most in range(1, 8) for power in (-100, -9, 0, 60)
    ]  # fmt: skip
    values = np.stack(blocks).astype(np.float32)
    assert np.array_equal(dequantize(encode(values, "MXFP4"), GGMLQuantizationType.MXFP4), values)


@pytest.mark.parametrize(("kind", "value"), [("F16", 7e4), ("Q8_0", 1e7), ("Q4_0", 1e6), ("Q4_1", -1e5)])
def test_what_float16_does_not_hold_is_no_infinity(kind: str, value: float) -> None:
    values = np.ones((2, 32), np.float32)
    encode(values, kind)
    values[1, 5] = value
    with pytest.raises(Overflow):
        encode(values, kind)
