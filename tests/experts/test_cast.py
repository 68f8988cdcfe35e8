"""Conversions by NumPy are those of MLX, bit by bit."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35.experts.cast import converter

DTYPES = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}
NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
PAIRS = [(a, b) for a in DTYPES for b in DTYPES if a != b]


def patterns(tag: str) -> np.ndarray:
    """Every 16-bit pattern; of float32, random ones and all that lie at or beside a boundary of rounding."""
    short = np.arange(1 << 16, dtype=np.uint32)
    if tag != "F32":
        return short.astype(np.uint16)
    halves = short.astype(np.uint16).view(np.float16).astype(np.float32).view(np.uint32)
    beside = [0, 1, 0xFFF, 0x1000, 0x1001, 0x1FFF, 0x7FFF, 0x8000, 0x8001, 0xFFFFFFFF]
    rng = np.random.default_rng(0)
    more = [grid + np.uint32(step) for grid in (short << 16, halves) for step in beside]
    return np.concatenate([rng.integers(0, 1 << 32, 1 << 18, dtype=np.uint32), *more])


def by_mlx(bits: np.ndarray, tag: str, to: str) -> np.ndarray:
    array = mx.array(bits).view(DTYPES[tag]).astype(DTYPES[to])
    return np.array(array.view(mx.uint32 if to == "F32" else mx.uint16))


@pytest.mark.skipif(mx.default_device().type != mx.cpu, reason="a GPU writes NaN in its own way")
@pytest.mark.parametrize(("tag", "to"), PAIRS)
def test_every_bit(tag: str, to: str) -> None:
    bits = patterns(tag)
    out = np.zeros(bits.size, np.uint32 if to == "F32" else np.uint16)
    converter(tag, NAMES[to])(memoryview(bits).cast("B"), memoryview(out).cast("B"))
    assert np.array_equal(out, by_mlx(bits, tag, to))


def test_same_dtype_needs_none() -> None:
    assert all(converter(tag, name) is None for tag, name in NAMES.items())


@pytest.mark.parametrize(("tag", "to"), [("U32", "float32"), ("F8_E4M3", "bfloat16"), ("F32", "int8")])
def test_others_are_refused(tag: str, to: str) -> None:
    with pytest.raises(ValueError, match="no conversion"):
        converter(tag, to)


def test_sizes_must_fit() -> None:
    with pytest.raises(ValueError, match="do not fill"):
        converter("BF16", "float32")(memoryview(bytearray(4)), memoryview(bytearray(4)))
