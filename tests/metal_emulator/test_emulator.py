"""What the emulator tells a kernel of its place, what it hands over, and what it leaves behind."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35.kernels.backend import METAL, Kernel, on_gpu, using
from tests.metal_emulator import poisoned_outputs, toolchain
from tests.metal_emulator.emulator import recorded

PLACES = """
uint3 at = thread_position_in_grid;
uint3 size = threadgroups_per_grid * threads_per_threadgroup;
uint i = at.x + size.x * (at.y + size.y * at.z);
out[i * 4] = static_cast<float>(threadgroup_position_in_grid.x + 10 * threadgroup_position_in_grid.y);
out[i * 4 + 1] = static_cast<float>(thread_index_in_threadgroup);
out[i * 4 + 2] = static_cast<float>(simdgroup_index_in_threadgroup * 100 + thread_index_in_simdgroup);
out[i * 4 + 3] = static_cast<float>(x[i % 3]) + static_cast<float>(y[i % 8]);
"""
EXCHANGES = """
uint i = thread_index_in_simdgroup;
float v = x[i];
out[i] = simd_shuffle_xor(v, 5);
out[32 + i] = simd_shuffle_down(v, 3);
out[64 + i] = simd_shuffle_up(v, 3);
out[96 + i] = simd_broadcast_first(v);
out[128 + i] = simd_max(v) - simd_min(v);
out[160 + i] = simd_sum(v);
out[192 + i] = static_cast<float>(as_type<int>(v)) + float2(v, 1.0f).y;
"""


def kernel(folder, source, inputs):
    (folder / "body.metal").write_text(source)
    return Kernel("tried", inputs, ["out"], str(folder / "body.metal"))


def test_places(tmp_path):
    tried = kernel(tmp_path, PLACES, ["x", "y"])
    x, y = mx.array([1.0, 2.0, 3.0]), 10 * mx.arange(8).astype(mx.bfloat16)
    with poisoned_outputs():
        (out,) = tried([x, y], [((2, 2, 6, 8, 4), mx.float32)], {}, groups=(2, 3, 1), threads=(4, 2, 4))
        out = np.array(out).reshape(4, 6, 8, 4)  # z, y, x
    z, y, x = np.meshgrid(np.arange(4), np.arange(6), np.arange(8), indexing="ij")
    index = x % 4 + 4 * (y % 2) + 8 * z
    place = x + 8 * (y + 6 * z)
    np.testing.assert_array_equal(out[..., 0], x // 4 + 10 * (y // 2))
    np.testing.assert_array_equal(out[..., 1], index)
    np.testing.assert_array_equal(out[..., 2], index // 32 * 100 + index % 32)
    np.testing.assert_array_equal(out[..., 3], place % 3 + 1 + 10 * (place % 8))


def test_exchanges(tmp_path):
    tried = kernel(tmp_path, EXCHANGES, ["x"])
    x = np.random.RandomState(3).permutation(32).astype(np.float32)
    with poisoned_outputs():
        (out,) = tried([mx.array(x)], [((7, 32), mx.float32)], {}, groups=(1, 1, 1), threads=(32, 1, 1))
        out = np.array(out)
    i = np.arange(32)
    np.testing.assert_array_equal(out[0], x[i ^ 5])
    np.testing.assert_array_equal(out[1], np.append(x[3:], x[29:]))
    np.testing.assert_array_equal(out[2], np.append(x[:3], x[:29]))
    np.testing.assert_array_equal(out[3:6], np.repeat([[x[0]], [31], [x.sum()]], 32, axis=1))
    np.testing.assert_array_equal(out[6], x.view(np.int32).astype(np.float32) + 1)


def test_kernels_run_only_where_they_are_asked_for(tmp_path):
    assert not on_gpu()  # the tests' default device is the CPU
    with pytest.raises(RuntimeError), using(METAL):
        assert on_gpu()
        raise RuntimeError
    assert not on_gpu()


def test_a_call_can_be_traced_without_running(tmp_path):
    tried = kernel(tmp_path, EXCHANGES, ["x"])
    path = str(tmp_path / "traced.mlxfn")

    def step(x):
        with using(METAL):
            (out,) = tried([x * 2], [((7, 32), mx.float32)], {}, groups=(1, 1, 1), threads=(32, 1, 1))
        return out.sum()

    mx.export_function(path, step, mx.ones((32,)))
    assert b"custom_kernel_tried" in (tmp_path / "traced.mlxfn").read_bytes()


def test_the_text_is_what_mlx_generates():
    made = mx.fast.metal_kernel(name="a", input_names=["x", "n"], output_names=["y"], source="y[0] = x[N] + n[0];")
    how = {"grid": (1, 1, 1), "threadgroup": (1, 1, 1), "output_shapes": [(1,)], "output_dtypes": [mx.float16]}
    name, text = recorded(made, [mx.ones((8,)), mx.ones((1,), mx.int32)], template=[("N", 3)], **how)
    assert f"void {name}(" in text and "y[0] = x[N] + n[0];" in text
    assert "const device float* x [[buffer(0)]]" in text
    assert "const constant int32_t* n [[buffer(1)]]" in text or "const constant int* n [[buffer(1)]]" in text


@pytest.mark.parametrize(
    "program, said",
    [(None, "apt-get install clang-19"), ("clang version 18", "clang-19"), ("clang version 21", "libclang-rt-21-dev")],
)
def test_what_is_missing_is_said(program, said, tmp_path, monkeypatch):
    path = tmp_path / "clang++"
    path.write_text(f'#!/bin/sh\necho "{program}"\ntest "$1" = --version\n')
    path.chmod(0o755)
    found = {"clang++": str(path)} if program else {}
    monkeypatch.setattr(toolchain.shutil, "which", found.get)
    toolchain.clang.cache_clear()
    try:
        with pytest.raises(toolchain.Missing, match=said):
            toolchain.clang()
    finally:
        toolchain.clang.cache_clear()
