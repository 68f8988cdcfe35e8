"""Lanes: which parts there are, that the bits are one core's, in any thread."""

import threading

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import mlx_qwen35.kernels.lanes as lanes
from mlx_qwen35.kernels.quantized_matmul import quantized_matmul

HOW = {"group_size": 64, "bits": 4, "mode": "affine"}


@pytest.fixture(params=[1, 2, 3])
def cores(request, monkeypatch):
    others = [mx.new_thread_local_stream(mx.cpu) for _ in range(request.param - 1)]
    monkeypatch.setattr(lanes, "_OTHERS", others)
    return request.param


def cut(count, least):
    seen = []
    made = lanes.in_lanes(lambda rows: seen.append((rows.start, rows.stop)) or mx.array(rows.start), count, least=least)
    assert [a.item() for a in made] == [start for start, _ in seen]
    return seen


def test_parts_cover_the_rows_and_are_never_small(cores):
    for count, least in [(1, 1), (2, 1), (7, 1), (7, 3), (100, 30), (5, 100)]:
        parts = cut(count, least)
        assert [start for start, _ in parts] == [0, *(stop for _, stop in parts[:-1])] and parts[-1][1] == count
        assert len(parts) == max(1, min(cores, count // least))
        assert all(stop - start >= min(least, count) for start, stop in parts)


def test_a_product_has_the_bits_of_one_core(cores, monkeypatch):
    import mlx_qwen35.kernels.quantized_matmul as kernel

    monkeypatch.setattr(kernel, "LEAST_SHARED", 128 * 20)
    packed = mx.quantize(mx.random.normal((96, 128)), 64, 4)
    for shape in [(128,), (1, 1, 128), (2, 3, 128)]:
        x = mx.random.normal(shape)
        expected = mx.quantized_matmul(x, *packed, transpose=True, **HOW)
        np.testing.assert_array_equal(np.array(quantized_matmul(x, *packed, **HOW)), np.array(expected))


def test_lanes_wait_for_what_they_need_and_are_waited_for(cores):
    """A chain in which each product needs both halves of the one before."""
    packed = mx.quantize(mx.random.normal((1024, 1024)) / 32, 64, 4)
    wanted = x = mx.random.normal((1, 1024))
    for _ in range(20):
        x, wanted = quantized_matmul(x, *packed, **HOW), mx.quantized_matmul(wanted, *packed, **HOW)
    np.testing.assert_array_equal(np.array(x), np.array(wanted))


def test_another_thread_has_lanes_of_its_own(cores):
    packed = mx.quantize(mx.random.normal((1024, 1024)), 64, 4)
    x = mx.random.normal((1, 1024))
    expected = quantized_matmul(x, *packed, **HOW)
    mx.eval(packed, x, expected)
    found = []

    def work():
        y = quantized_matmul(x, *packed, **HOW)
        mx.eval(y)
        found.append(np.array(y))

    for _ in range(2):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        np.testing.assert_array_equal(found.pop(), np.array(expected))


def test_pairs_of_rows_and_experts_are_shared_out(cores, monkeypatch):
    """Bit for bit what one gathered product gives, whatever lane a pair is in."""
    import mlx_qwen35.experts.resident as resident

    monkeypatch.setattr(resident, "LEAST_SHARED", 3 * 64 * 32)
    bank = resident.ResidentExperts(6, 64, 32)
    nn.quantize(bank, 32, 4)
    bank.eval()
    mx.eval(bank.parameters())
    x, ids = mx.random.normal((2, 64)), mx.array([[3, 0, 5, 1, 2], [4, 4, 0, 2, 1]])
    calls = []
    gathered = bank._gathered
    monkeypatch.setattr(bank, "_gathered", lambda *a, **how: calls.append(a[1].shape) or gathered(*a, **how))
    shared = bank.pairs(x, ids)
    expected = gathered(x[:, None, None, :], ids, sorted_indices=False).squeeze(-2)
    np.testing.assert_array_equal(np.array(shared), np.array(expected))
    assert len(calls) == cores and sum(k for _, k in calls) == 5
