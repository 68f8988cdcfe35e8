"""A few rows on a CPU: the bits that each has alone, however many go together and however outputs are cut."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_qwen35.experts.resident import ResidentExperts
from mlx_qwen35.kernels import few_rows, lanes
from mlx_qwen35.kernels.matmul import matmul
from mlx_qwen35.kernels.quantized_matmul import quantized_matmul, rows_alone

unpacking = pytest.mark.skipif(not few_rows.fast_blas(), reason="no OpenBLAS: weights are not unpacked")
FORMS = [(2, 32), (4, 64), (8, 128), (1, 32)]


def packed(outputs, inputs, bits, group_size, seed=0):
    weight = np.random.default_rng(seed).standard_normal((outputs, inputs)).astype(np.float32)
    return mx.quantize(mx.array(weight), group_size, bits)


def rows(count, inputs):
    return mx.array(np.random.default_rng(1).standard_normal((count, inputs)).astype(np.float32))


@unpacking
@pytest.mark.parametrize("bits, group_size", FORMS)
@pytest.mark.parametrize("outputs, inputs", [(512, 256), (100, 512), (3000, 1024), (64, 1536)])
def test_a_row_has_the_same_bits_among_any_others(outputs, inputs, bits, group_size):
    parts, how = packed(outputs, inputs, bits, group_size), {"group_size": group_size, "bits": bits, "mode": "affine"}
    x = rows(few_rows.MOST_ROWS, inputs)
    assert few_rows.unpacks(x, outputs, bits=bits, mode="affine") and rows_alone(bits, "affine") == len(x)
    alone = np.concatenate([np.array(quantized_matmul(row[None], *parts, **how)) for row in x])
    expected = np.array(x, np.float64) @ np.array(mx.dequantize(*parts, group_size, bits), np.float64).T
    np.testing.assert_allclose(alone, expected, atol=1e-4 * np.abs(expected).max())
    for count in (2, 5, 8, few_rows.MOST_ROWS):
        found = quantized_matmul(x[:count, None], *parts, **how)  # [B, 1, out]
        assert found.shape == (count, 1, outputs)
        np.testing.assert_array_equal(np.array(found)[:, 0], alone[:count])


@unpacking
@pytest.mark.parametrize("bits, group_size", FORMS)
def test_outputs_in_blocks_and_parts_have_the_bits_of_the_whole(bits, group_size, monkeypatch):
    parts, x = packed(1000, 512, bits, group_size), rows(3, 512)
    how = {"group_size": group_size, "bits": bits}
    monkeypatch.setattr(few_rows, "_BLOCK", {True: 2**30})
    monkeypatch.setattr(lanes, "_OTHERS", [])
    whole = np.array(few_rows.quantized(x, *parts, **how))
    monkeypatch.setattr(few_rows, "_BLOCK", {True: 512 * few_rows.ALIGNED})
    monkeypatch.setattr(lanes, "_OTHERS", [mx.new_thread_local_stream(mx.cpu) for _ in range(2)])
    np.testing.assert_array_equal(np.array(few_rows.quantized(x, *parts, **how)), whole)
    for start, stop in [(0, 64), (64, 1000), (192, 640)]:
        some = [part[start:stop] for part in parts]
        np.testing.assert_array_equal(np.array(few_rows.quantized(x, *some, **how)), whole[:, start:stop])


@pytest.mark.parametrize("outputs, inputs", [(4096, 512), (1000, 336), (3, 7), (1, 2048)])
def test_plain_weights_in_blocks_and_lanes(outputs, inputs, monkeypatch):
    weight, x = rows(outputs, inputs), rows(5, inputs)
    whole = np.array(matmul(x, weight))
    monkeypatch.setattr(few_rows, "_BLOCK", {False: inputs * few_rows.ALIGNED})
    monkeypatch.setattr(few_rows, "_LEAST_SHARED", {True: 1, False: 1})
    monkeypatch.setattr(lanes, "_OTHERS", [mx.new_thread_local_stream(mx.cpu) for _ in range(2)])
    np.testing.assert_array_equal(np.array(matmul(x, weight)), whole)
    np.testing.assert_allclose(whole, np.array(x, np.float64) @ np.array(weight, np.float64).T, atol=1e-3)


@pytest.mark.parametrize("bits", [4, None])
def test_a_row_has_its_bits_among_any_others_through_experts(bits):
    bank = ResidentExperts(8, 128, 64)
    if bits:
        nn.quantize(bank, 64, bits)
    bank.eval()
    x = rows(few_rows.MOST_ROWS, 128)
    ids = mx.array(np.random.default_rng(3).permuted(np.tile(np.arange(8), (len(x), 1)), axis=1)[:, :6])
    weights = mx.softmax(rows(len(x), 6), axis=-1)
    alone = mx.concatenate([bank(x[n : n + 1], ids[n : n + 1], weights[n : n + 1]) for n in range(len(x))])
    for count in (2, 7, 11, len(x)):  # the last two of more pairs than are sorted elsewhere
        np.testing.assert_array_equal(np.array(bank(x[:count], ids[:count], weights[:count])), np.array(alone[:count]))


@pytest.mark.parametrize("bits", [4, None])
def test_gradients_are_those_of_one_product(bits):
    """Of x and of plain weights: a few rows are trained on too."""
    weight, x = mx.random.normal((2048, 512)) / 20, rows(3, 512)
    if bits:
        parts = mx.quantize(weight, 64, bits)
        plain = mx.dequantize(*parts, 64, bits)
        found = mx.grad(lambda x: mx.square(quantized_matmul(x, *parts, group_size=64, bits=bits, mode="affine")).sum())
        expected = mx.grad(lambda x: mx.square(x @ plain.T).sum())
        np.testing.assert_allclose(np.array(found(x)), np.array(expected(x)), rtol=1e-3, atol=1e-2)
        return
    found = mx.grad(lambda x, w: mx.square(matmul(x, w)).sum(), argnums=(0, 1))(x, weight)
    expected = mx.grad(lambda x, w: mx.square(x @ w.T).sum(), argnums=(0, 1))(x, weight)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.array(ours), np.array(theirs), rtol=1e-3, atol=1e-2)
