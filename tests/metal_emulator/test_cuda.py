"""The patient compiles for CUDA, and what CUDA does not have is an error."""

import mlx.core as mx
import pytest

from mlx_qwen35.kernels.backend import Kernel
from mlx_qwen35.kernels.cuda_text import cuda_body
from tests.metal_emulator import check, compile_for_cuda
from tests.metal_emulator.patient import SOURCE, operation, rows
from tests.metal_emulator.toolchain import CompileError


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_compiles(dtype, tmp_path):
    assert compile_for_cuda(operation(tmp_path), [rows(dtype)]) == {"row_sums"}


def test_an_unknown_name_does_not(tmp_path):
    with pytest.raises(CompileError, match="simd_total"):
        compile_for_cuda(operation(tmp_path, SOURCE.replace("simd_sum", "simd_total")), [rows()])


def test_a_negative_constant_does_not(tmp_path):
    """It compiles for Metal, where MLX takes the sign out of the kernel's name."""
    (tmp_path / "body.metal").write_text("out[0] = x[0] + static_cast<float>(N);")
    kernel = Kernel("negative", ["x"], ["out"], str(tmp_path / "body.metal"))

    def call(x):
        return kernel([x], [((1,), mx.float32)], {"N": -4}, groups=(1, 1, 1), threads=(1, 1, 1))[0]

    check(call, lambda x: x[:1] - 4, [mx.ones(8)])
    with pytest.raises(CompileError):
        compile_for_cuda(call, [mx.ones(8)])


def test_what_is_respelled():
    assert cuda_body("threadgroup float a[4][N];\nthreadgroup T b;") == "__shared__ float a[4][N];\n__shared__ T b;"
    assert cuda_body("const device T* p = x; thread float& r") == "const  T* p = x;  float& r"
    assert cuda_body("float4(1, 2, 3, 4) + (device float4*)x") == "make_float4(1, 2, 3, 4) + ( float4*)x"
