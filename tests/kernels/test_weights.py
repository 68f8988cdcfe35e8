"""What kernels are told of a matrix: its form, its arrays, and nothing where they cannot read it."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35.experts.linear import ExpertLinear
from mlx_qwen35.kernels.weights import Projections, Weights, weights_of
from mlx_qwen35.layers.linear import Linear
from tests.kernels.stacks import FORMS, Matrix


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_module_says_what_it_holds(form):
    for module in (Linear(256, 24, bias=False), ExpertLinear(3, 256, 24)):
        if form is not None:
            mode, bits, group = form
            module = module.to_quantized(group, bits, mode)
        found = weights_of(module)
        kind = found.kind
        assert (kind.rows, kind.width, kind.form) == (
            24,
            256,
            0 if form is None else {"mxfp4": 40}.get(form[0], form[1]),
        )
        assert found.weight is module.weight and kind.weight == module.weight.dtype
        if form is not None:
            assert found.scales is module.scales and kind.group == form[2]
            packed = (module.weight, module.scales, module.get("biases"))
            expected = mx.dequantize(*packed, form[2], form[1], form[0], dtype=mx.float32)
            np.testing.assert_array_equal(np.array(found.values()), np.array(expected))


def test_it_is_found_anew_when_an_array_is_another():
    module = Linear(64, 24, bias=False).to_quantized(32, 4)
    found = weights_of(module)
    assert weights_of(module) is found
    for name in ("weight", "scales", "biases"):
        module[name] = module[name] + 0
        assert weights_of(module) is not found
        found = weights_of(module)
        assert module[name] is getattr(found, name)
    module["bias"] = mx.zeros(24)
    assert weights_of(module) is None


def test_what_kernels_cannot_read():
    assert weights_of(Linear(64, 24, bias=True)) is None
    assert weights_of(Linear(24, 64, bias=False)) is None  # not in blocks of 16
    assert weights_of(Linear(64, 24, bias=False).to_quantized(16, 4, "nvfp4")) is None
    assert weights_of(Linear(64, 24, bias=False).to_quantized(32, 8, "mxfp8")) is None
    assert weights_of(object()) is None
    assert (
        Weights.of(
            mx.zeros((1, 4), mx.uint32), mx.zeros((1, 1)), mx.zeros((1, 1)), group_size=32, bits=4, mode="affine"
        )
        is None
    )
    good = Linear(64, 24, bias=False)
    assert Projections.of(good, good, good) is not None
    assert Projections.of(good, Linear(64, 24, bias=True), good) is None


def test_matrices_of_tests_are_what_they_say():
    matrix = Matrix.random(("affine", 3, 32), (2, 24, 64))
    assert matrix.of(matrix.arrays).kind.form == 3
