"""The patient compiles for CUDA, and what CUDA does not have is an error."""

import mlx.core as mx
import pytest

from mlx_qwen35.kernels.cuda_text import cuda_body
from tests.metal_emulator import compile_for_cuda
from tests.metal_emulator.patient import SOURCE, operation, rows
from tests.metal_emulator.toolchain import CompileError


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_compiles(dtype, tmp_path):
    assert compile_for_cuda(operation(tmp_path), [rows(dtype)]) == {"row_sums"}


def test_an_unknown_name_does_not(tmp_path):
    with pytest.raises(CompileError, match="simd_total"):
        compile_for_cuda(operation(tmp_path, SOURCE.replace("simd_sum", "simd_total")), [rows()])


def test_what_is_respelled():
    assert cuda_body("threadgroup float a[4][N];\nthreadgroup T b;") == "__shared__ float a[4][N];\n__shared__ T b;"
    assert cuda_body("const device T* p = x; thread float& r") == "const  T* p = x;  float& r"
    assert cuda_body("float4(1, 2, 3, 4) + (device float4*)x") == "make_float4(1, 2, 3, 4) + ( float4*)x"
