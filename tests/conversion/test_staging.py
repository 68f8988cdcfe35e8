"""Memory that NumPy and MLX share: the same bytes, room for what was announced, and nothing lost beyond that."""

import threading

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35.conversion.staging import Staging, staging


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float16, np.uint32, np.float32])
def test_mlx_sees_what_numpy_writes(dtype: type) -> None:
    room = staging(7, 5 * 3 * 4)
    room.empty((7,), np.uint8)[:] = 255
    array = room.empty((5, 3), dtype)
    array[:] = np.arange(15).reshape(5, 3)
    seen = room.as_mlx(array)
    assert seen.shape == (5, 3) and np.array_equal(np.array(seen), array)
    assert np.array(seen, copy=False).__array_interface__["data"][0] == array.__array_interface__["data"][0]


def test_computing_leaves_the_memory_as_it_is() -> None:
    """MLX writes a result over an input that nobody else has; this one somebody has."""
    room = staging(4 * 64)
    array = room.empty((64,), np.float32)
    array[:] = np.arange(64)
    doubled = room.as_mlx(array) * 2
    mx.eval(doubled)
    assert np.array_equal(array, np.arange(64)) and np.array_equal(np.array(doubled), 2 * np.arange(64))


def test_the_next_piece_takes_the_same_memory_and_a_larger_one_more() -> None:
    first = staging(100).empty((100,), np.uint8)
    again = staging(60, 10)
    assert np.shares_memory(first, again.empty((60,), np.uint8))
    larger = staging(1 << 16)
    assert not np.shares_memory(first, larger.empty((1 << 16,), np.uint8))


def test_what_does_not_fit_is_other_memory_and_a_copy() -> None:
    room = Staging(64)
    inside, outside = room.empty((64,), np.uint8), room.empty((1,), np.uint16)
    inside[:], outside[:] = 1, 2
    assert room.as_mlx(outside).item() == 2 and inside.min() == inside.max() == 1
    assert room.as_mlx(room.empty((0, 3), np.float32)).shape == (0, 3)


def test_each_thread_has_its_own() -> None:
    found = []
    threads = [threading.Thread(target=lambda: found.append(staging(64).empty((64,), np.uint8))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not np.shares_memory(*found)
