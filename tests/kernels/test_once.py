"""What is remembered of weights: made once, forgotten with them, and never what is only traced."""

import gc
import threading
import weakref

import mlx.core as mx
import numpy as np

from mlx_qwen35.kernels import once as module
from mlx_qwen35.kernels.once import cut, once


def weights(seed=0):
    made = mx.random.normal((12, 5), key=mx.random.key(seed))
    mx.eval(made)
    return made


def test_a_cut_is_made_once_and_takes_no_memory():
    array = weights()
    before = mx.get_active_memory()
    part = cut(array, slice(3, 7))
    assert cut(array, slice(3, 7)) is part and mx.get_active_memory() == before
    np.testing.assert_array_equal(np.array(part), np.array(array)[3:7])
    assert cut(array, slice(0, 12)) is array


def test_another_array_in_its_place_is_heeded():
    holder = {"weight": weights(0)}
    cut(holder["weight"], slice(0, 6))
    holder["weight"] = holder["weight"] * 2
    np.testing.assert_array_equal(np.array(cut(holder["weight"], slice(0, 6))), np.array(holder["weight"])[:6])


def test_what_was_made_goes_with_the_array():
    known = set(module._MADE)
    array = mx.zeros((1024, 64))
    cut(array, slice(0, 512))
    made = weakref.ref(once(array, "double", lambda a: a * 2))
    assert made() is not None and len(set(module._MADE) - known) == 1
    del array
    gc.collect()
    assert made() is None and set(module._MADE) <= known


def test_transformations_see_their_argument():
    array = weights()
    wanted = np.zeros((12, 5), np.float32)
    wanted[:6] = 1
    held = cut(array, slice(0, 6))
    np.testing.assert_array_equal(np.array(mx.grad(lambda a: cut(a, slice(0, 6)).sum())(array)), wanted)
    compiled = mx.compile(lambda a: cut(a, slice(0, 6)))
    for each in (array, weights(1)):
        np.testing.assert_array_equal(np.array(compiled(each)), np.array(each)[:6])
    np.testing.assert_array_equal(np.array(mx.vmap(lambda a: cut(a, slice(0, 2)))(array)), np.array(array)[:, :2])
    assert cut(array, slice(0, 6)) is held


def test_a_constant_of_a_transformation_is_as_ever():
    array = weights()
    compiled = mx.compile(lambda x: x @ cut(array, slice(0, 6)).T)
    x = mx.ones((1, 5))
    assert mx.array_equal(compiled(x), x @ array[:6].T)
    np.testing.assert_allclose(
        np.array(mx.grad(lambda x: (x @ cut(array, slice(6, 12)).T).sum())(x)),
        np.array(array)[6:].sum(0)[None],
        rtol=1e-6,
    )


def test_any_thread_may_use_what_another_made():
    array, found = weights(), []

    def work():
        with mx.stream(mx.new_thread_local_stream(mx.cpu)):
            found.append(cut(array, slice(2, 9)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert mx.array_equal(cut(array, slice(2, 9)) + 1, array[2:9] + 1) and cut(array, slice(2, 9)) is found[0]
