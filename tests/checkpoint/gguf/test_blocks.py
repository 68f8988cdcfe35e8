"""Blocks of every type against gguf-py, bit for bit, and as MLX's packed arrays against MLX."""

import mlx.core as mx
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize

from mlx_qwen35.checkpoint.gguf.codebooks import book
from mlx_qwen35.checkpoint.gguf.decode import can_decode, decode
from mlx_qwen35.checkpoint.gguf.grids import SIXTEEN, SPECS, grid_of, groups_of, scales_of, words_of
from mlx_qwen35.checkpoint.gguf.types import FILE_TYPES, KINDS, NUMBERS

# Where a block keeps float16 numbers: random bits there would be infinite now and then.
HALVES = {
    "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q2_K": [80, 82], "Q3_K": [108],
    "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208], "IQ4_NL": [0], "IQ4_XS": [0], "TQ1_0": [52], "TQ2_0": [64],
    "Q1_0": [0], "Q2_0": [0], "IQ2_XXS": [0], "IQ2_XS": [0], "IQ2_S": [0], "IQ3_XXS": [0], "IQ3_S": [0], "IQ1_S": [0],
    "F16": [0],
}  # fmt: skip
READ = [kind for kind in NUMBERS if can_decode(kind)]
OWN = ("Q1_0", "Q2_0")  # which gguf-py from PyPI does not decode


def blocks_of(kind: str, count: int, seed: int = 0) -> np.ndarray:
    """[count, bytes] random blocks of a type with finite scales of both signs."""
    rng = np.random.default_rng([seed, NUMBERS[kind]])
    made = rng.integers(0, 256, (count, KINDS[NUMBERS[kind]].nbytes), dtype=np.uint8)
    for at in HALVES.get(kind, ()):
        made[:, at : at + 2] = (rng.standard_normal(count) * 0.01).astype(np.float16).view(np.uint8).reshape(-1, 2)
    if kind == "IQ1_M":  # the four top nibbles of a float16
        bits = (rng.standard_normal(count) * 0.01).astype(np.float16).view(np.uint16)
        for n in range(4):
            made[:, 49 + 2 * n] = made[:, 49 + 2 * n] & 15 | (bits >> 4 * n & 15).astype(np.uint8) << 4
    if kind == "MXFP4":
        made[:, 0] %= 250  # above, products overflow
    if kind == "NVFP4":
        made[:, :4] %= 127
    if kind in ("F32", "BF16"):
        numbers = rng.standard_normal(count).astype(np.float32)
        made = numbers.view(np.uint8).reshape(-1, 4)[:, 4 - made.shape[1] :].copy()
    return made


def wanted(kind: str, blocks: np.ndarray) -> np.ndarray:
    """What ggml makes of blocks, by gguf-py where it can, else by the format's words."""
    if kind not in OWN:  # in one row, as gguf-py takes 16 rows at a time
        return dequantize(blocks.reshape(1, -1), GGMLQuantizationType[kind]).reshape(len(blocks), -1)
    d = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    if kind == "Q1_0":
        return np.where(np.unpackbits(blocks[:, 2:], axis=1, bitorder="little"), d, -d)
    codes = np.stack([blocks[:, 2:] >> shift & 3 for shift in (0, 2, 4, 6)], axis=-1).reshape(len(blocks), -1)
    return (codes.astype(np.float32) - 1) * d


def test_every_type_that_llama_quantize_writes_has_a_decoder():
    assert {kind for kind in NUMBERS if not can_decode(kind)} == {"I8", "I16", "I32", "I64", "F64"}
    plain = {name for name in FILE_TYPES.values() if name in NUMBERS}
    assert len(plain) == 24 and all(can_decode(kind) for kind in plain)


def test_sizes_are_those_of_ggml():
    known = {t.name: GGML_QUANT_SIZES[t] for t in GGMLQuantizationType}
    for kind in KINDS.values():
        if kind.name in known:
            assert (kind.values, kind.nbytes) == known[kind.name], kind.name
            assert GGMLQuantizationType[kind.name] == kind.number


@pytest.mark.parametrize("kind", READ)
def test_decoded_values_are_those_of_ggml(kind):
    blocks = blocks_of(kind, 3 * 701)
    found = decode(kind, blocks.reshape(3, -1))
    assert found.dtype == np.float32 and found.shape[0] == 3
    np.testing.assert_array_equal(found.reshape(-1), wanted(kind, blocks).reshape(-1))


@pytest.mark.parametrize("kind", SPECS)
def test_packed_values_are_those_of_ggml(kind):
    spec, blocks = SPECS[kind], blocks_of(kind, 513, seed=1)
    groups = groups_of(kind)
    words = mx.array(np.ascontiguousarray(words_of(kind, blocks)).view(np.uint32))
    scales, biases = scales_of(kind, blocks)
    assert scales.shape == (513, groups)
    whole = grid_of(kind, blocks)
    np.testing.assert_array_equal(whole.scales, scales)
    if spec.mode == "affine":
        np.testing.assert_array_equal(whole.biases, biases)
        if kind in SIXTEEN:
            np.testing.assert_array_equal(scales.astype(np.float16).astype(np.float32), scales)
            np.testing.assert_array_equal(biases.astype(np.float16).astype(np.float32), biases)
        found = mx.dequantize(words, mx.array(scales), mx.array(biases), group_size=spec.group_size, bits=spec.bits)
    else:
        found = mx.dequantize(words, mx.array(np.ascontiguousarray(scales)), mode=spec.mode, dtype=mx.float32)
    np.testing.assert_array_equal(np.array(found).reshape(513, -1), wanted(kind, blocks))


@pytest.mark.parametrize("name", ["iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "iq1"])
def test_codebooks_are_those_of_ggml(name):
    from gguf import quants

    theirs = getattr(quants, {"iq1": "IQ1_S"}.get(name, name.upper()))
    theirs.init_grid()
    np.testing.assert_array_equal(book(name), theirs.grid.reshape(theirs.grid_shape))


def test_nothing_becomes_of_no_rows():
    assert decode("Q4_K", np.empty((0, 144), np.uint8)).shape == (0, 256)
