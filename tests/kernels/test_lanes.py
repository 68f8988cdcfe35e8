"""Lanes: which parts there are, that the bits are one core's, in any thread."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import mlx_qwen35.kernels.lanes as lanes
import mlx_qwen35.kernels.rms_norm as rms_norm_kernel
from mlx_qwen35.kernels import few_rows
from mlx_qwen35.kernels.quantized_matmul import quantized_matmul
from mlx_qwen35.kernels.rms_norm import rms_norm

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
        x, wanted = quantized_matmul(x, *packed, **HOW), in_one_lane(quantized_matmul, wanted, *packed, **HOW)
    np.testing.assert_array_equal(np.array(x), np.array(wanted))


def in_one_lane(function, *args, **options):
    lanes._NOW.shared = True
    try:
        return function(*args, **options)
    finally:
        lanes._NOW.shared = False


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


@pytest.mark.parametrize("bits", [4, None])
def test_pairs_of_rows_and_experts_are_shared_out(cores, bits, monkeypatch):
    """Bit for bit what one core gives, whatever lane a pair, or an output of it, is in."""
    import mlx_qwen35.experts.resident as resident

    monkeypatch.setattr(resident, "LEAST_SHARED", 3 * 64 * 32)
    monkeypatch.setattr(resident, "_LEAST_PLAIN", 3 * 64 * 32)
    bank = resident.ResidentExperts(6, 64, 32)
    if bits:
        nn.quantize(bank, 32, bits)
    bank.eval()
    mx.eval(bank.parameters())
    x, ids = mx.random.normal((2, 64)), mx.array([[3, 0, 5, 1, 2], [4, 4, 0, 2, 1]])
    parts = []

    def noted(compute, count, **options):
        made = lanes.in_lanes(compute, count, **options)
        parts.append(len(made))
        return made

    monkeypatch.setattr(resident, "in_lanes", noted)
    shared = bank.pairs(x, ids)
    assert parts == [cores] * (2 if bits else 1)
    expected = in_one_lane(bank.pairs, x, ids)
    np.testing.assert_array_equal(np.array(shared), np.array(expected))
    gathered = bank._gathered(x[:, None, None, :], ids, sorted_indices=False).squeeze(-2)
    np.testing.assert_allclose(np.array(shared), np.array(gathered), atol=1e-5)


def test_many_rows_have_the_bits_of_one_core(cores, monkeypatch):
    """Unpacked in lanes, then multiplied; some rows of weights in blocks."""
    import mlx_qwen35.kernels.quantized_matmul as kernel

    monkeypatch.setattr(kernel, "_LEAST_UNPACKED", 128 * 5)
    monkeypatch.setattr(kernel, "_MOST_UNPACKED", 128 * 40)
    weight = mx.random.normal((96, 128))
    packed = mx.quantize(weight, 64, 4)
    x = mx.random.normal((2, 9, 128))
    expected = np.array(x @ mx.dequantize(*packed, 64, 4).T)
    np.testing.assert_allclose(np.array(quantized_matmul(x, *packed, **HOW)), expected, atol=1e-4)


def test_heads_have_the_bits_of_one_core(cores, monkeypatch):
    """Of the delta rule, outputs and states, from a state on; three value heads a key head, or one."""
    import mlx_qwen35.kernels.gated_delta as rule
    from mlx_qwen35.kernels.gated_delta import gated_delta, plain_gated_delta

    monkeypatch.setattr(rule, "_LEAST_SHARED", 1)
    for key_heads, heads in [(1, 1), (2, 6), (5, 5)]:
        q, k = (mx.random.normal((2, 21, key_heads, 8)) for _ in range(2))
        v, state = mx.random.normal((2, 21, heads, 12)), mx.random.normal((2, heads, 12, 8))
        decay, beta = (mx.random.uniform(0, 1, (2, 21, heads)) for _ in range(2))
        shared = gated_delta(q, k, v, decay, beta, state)
        alone = plain_gated_delta(q, k, v, decay, beta, state)
        for ours, expected in zip(shared, alone, strict=True):
            np.testing.assert_array_equal(np.array(ours), np.array(expected))


@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 64, 33), ()])
def test_elements_have_the_bits_of_one_core(cores, shape, monkeypatch):
    import mlx_qwen35.kernels.activation as activation

    monkeypatch.setattr(activation, "_LEAST", 100)
    x, y = mx.random.normal(shape), mx.random.normal(shape).swapaxes(0, -1) if shape else mx.array(2.0)
    x = x.swapaxes(0, -1) if shape else mx.array(1.0)
    np.testing.assert_array_equal(np.array(activation.silu(x)), np.array(x * mx.sigmoid(x)))
    np.testing.assert_array_equal(np.array(activation.swiglu(x, y)), np.array(x * mx.sigmoid(x) * y))
    np.testing.assert_array_equal(np.array(activation.gated(x, y)), np.array(x * mx.sigmoid(y)))


def test_shares_are_evaluated_in_order_and_do_not_share_again(cores):
    packed = mx.quantize(mx.random.normal((1024, 1024)), 64, 4)
    rows = mx.random.normal((7, 9, 1024))
    mx.eval(packed, rows)
    made = lanes.on_all_cores(lambda number: quantized_matmul(rows[number], *packed, **HOW), 7)
    expected = [quantized_matmul(rows[number], *packed, **HOW) for number in range(7)]
    for ours, alone in zip(made, expected, strict=True):
        np.testing.assert_array_equal(np.array(ours), np.array(alone))
    if cores > 1:
        inner = []
        lanes.on_all_cores(lambda number: inner.append(cut(10, 1)) or mx.array(0), 2)
        assert inner == [[(0, 10)]] * 2
    assert len(cut(10, 1)) == cores  # and here it still does


def test_a_share_that_fails_ends_them_all(cores):
    done = []

    def share(number):
        if number == 1:
            raise KeyError(number)
        done.append(number)
        return mx.array(number)

    with pytest.raises(KeyError):
        lanes.on_all_cores(share, 50)
    count = len(done)
    time.sleep(0.05)
    assert len(done) == count
    assert [a.item() for a in lanes.on_all_cores(mx.array, 3)] == [0, 1, 2]


def _on_another_thread(function):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


@pytest.mark.parametrize("rows", [1, 3, 64])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_what_is_remembered_is_good_on_any_thread(rows, bits):
    """Constants are kept from call to call, and one thread may have made what another evaluates."""
    packed = mx.quantize(mx.random.normal((512, 256)), 64, bits)
    x, weight = mx.random.normal((rows, 256)), mx.random.normal((256,))
    mx.eval(packed, x, weight)

    def lazy():
        return [quantized_matmul(x, *packed, **HOW | {"bits": bits}), rms_norm(x, weight, 1e-6)]

    for remembered in (few_rows._mask, rms_norm_kernel._numbers):
        remembered.cache_clear()
    _on_another_thread(lazy)  # and nobody evaluates that
    for ours, again in zip(_on_another_thread(lambda: [mx.eval(made := lazy()), made][1]), lazy(), strict=True):
        np.testing.assert_array_equal(np.array(ours), np.array(again))


class Blas:
    """As much of OpenBLAS as is asked for."""

    threads = 6

    def openblas_get_num_threads(self):
        return self.threads

    def openblas_set_num_threads(self, count):
        self.threads = count


def test_blas_has_its_threads_again_when_the_last_caller_is_done(monkeypatch):
    blas, pool = Blas(), lanes.ThreadPoolExecutor(4)
    entered, leave = threading.Barrier(3), [threading.Event(), threading.Event()]
    monkeypatch.setattr(lanes.ctypes, "CDLL", lambda name: blas)
    monkeypatch.setattr(lanes, "_OTHERS", [None])
    monkeypatch.setattr(lanes, "_pool", lambda size: pool)

    def caller(which):
        def share(number):
            if number == 0:
                entered.wait()
            leave[which].wait()
            return mx.array(number)

        lanes.on_all_cores(share, 2)

    callers = []
    for which in range(2):  # the second comes in while the first computes
        callers.append(threading.Thread(target=caller, args=(which,)))
        callers[-1].start()
    entered.wait()
    assert blas.threads == 1
    leave[0].set()
    callers[0].join()
    assert blas.threads == 1
    leave[1].set()
    callers[1].join()
    assert blas.threads == 6


def test_experts_on_threads_have_the_bits_of_one_core(cores, monkeypatch):
    import mlx_qwen35.experts.resident as resident

    bank = resident.ResidentExperts(5, 64, 32)
    nn.quantize(bank, 32, 4)
    bank.eval()
    rows, counts = mx.random.normal((61, 64)), [9, 20, 1, 31]
    alone = np.array(bank.runs(rows, [0, 1, 2, 4], counts))
    monkeypatch.setattr(resident, "LEAST_ON_CORES", 1)
    np.testing.assert_array_equal(np.array(bank.runs(rows, [0, 1, 2, 4], counts)), alone)


def test_on_one_core_gives_what_many_give_and_puts_blas_back():
    import ctypes

    a = [mx.random.normal((25, 192)) for _ in range(5)]
    b = mx.random.normal((64, 192))
    mx.eval(a, b)
    blas = ctypes.CDLL(None)
    before = blas.openblas_get_num_threads() if hasattr(blas, "openblas_get_num_threads") else None
    made = lanes.on_one_core(lambda number: a[number] @ b.T, 5)
    for number, one in enumerate(made):
        assert mx.allclose(one, a[number] @ b.T, rtol=1e-5, atol=1e-5)
    assert before is None or blas.openblas_get_num_threads() == before


def test_small_products_are_computed_by_one_thread_of_blas(monkeypatch):
    """All of those that a piece of a prompt has, and large ones by all, as before."""
    blas = Blas()
    monkeypatch.setattr(lanes.ctypes, "CDLL", lambda name: blas)
    monkeypatch.setattr(lanes, "lane_count", lambda: 2)
    for products, threads in ((lanes.LEAST_ON_CORES - 1, 1), (lanes.LEAST_ON_CORES, 6)):
        with lanes.on_cores_worth_waking(products):
            assert blas.threads == threads
        assert blas.threads == 6
