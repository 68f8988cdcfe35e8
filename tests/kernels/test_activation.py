"""What a GPU runs as one kernel gives what its steps give, in mixed dtypes and at every shape."""

import shutil

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35.kernels.attention_inputs.reference import _turned
from mlx_qwen35.layers.delta_net import decay
from mlx_qwen35.layers.moe import _with_shared
from mlx_qwen35.layers.norm import _gated

HALF, FULL = mx.bfloat16, mx.float32
# What is broadcast, and in which dtypes, as the layers call it; None stands for a length that changes.
CASES = {
    decay: [((1, None, 4), HALF), ((4,), FULL), ((4,), HALF)],
    _with_shared: [((None, 4), HALF), ((None, 4), HALF), ((None, 1), HALF)],
    _gated: [((1, None, 3, 4), HALF)] * 2,
    _turned: [((1, 2, None, 4), HALF)] * 2 + [((1, 1, None, 4), FULL)] * 2,
}


@pytest.mark.skipif(shutil.which("g++") is None, reason="mx.compile needs g++ on a CPU")
@pytest.mark.parametrize("function", CASES)
def test_compiled_is_step_by_step(function):
    rng = np.random.default_rng(0)
    compiled = mx.compile(function, shapeless=True)
    for length in (1, 5):
        arguments = []
        for shape, dtype in CASES[function]:
            drawn = rng.standard_normal([length if n is None else n for n in shape])
            arguments.append(mx.array(drawn.astype(np.float32)).astype(dtype))
        wanted, found = function(*arguments), compiled(*arguments)
        for one, other in zip(*((x,) if isinstance(x, mx.array) else x for x in (wanted, found)), strict=True):
            assert one.dtype == other.dtype and one.shape == other.shape
            np.testing.assert_allclose(*(np.array(x.astype(FULL)) for x in (one, other)), atol=1e-6, rtol=1e-2)
