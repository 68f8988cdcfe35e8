"""Faults planted in kernels: the emulator has to find every one, and to leave the text without a fault alone."""

import re

import mlx.core as mx
import pytest

from mlx_qwen35.kernels.backend import using
from tests.metal_emulator import check, toolchain
from tests.metal_emulator.emulator import Emulator
from tests.metal_emulator.patient import SOURCE, operation, reference, rows
from tests.metal_emulator.program import KernelFault
from tests.metal_emulator.toolchain import CompileError
from tests.metal_emulator.translation import ForbiddenText

pytestmark = pytest.mark.skipif(mx.metal.is_available() or mx.cuda.is_available(), reason="a GPU runs its own compiler")

WRITTEN = "threadgroup_barrier(mem_flags::mem_threadgroup);  // written"
READ = "threadgroup_barrier(mem_flags::mem_threadgroup);  // read"
WRONG = AssertionError  # runs, and computes something else

# What is replaced, by what, which error is raised and what it says.
MUTANTS = {
    "no reduction": ("sum = simd_sum(sum);", "", WRONG, "off by"),
    "one thread too few": ("i += THREADS", "i += THREADS + 1", WRONG, "off by"),
    "the last SIMD group is left out": ("THREADS / 32", "THREADS / 32 - 1", WRONG, "off by"),
    "an output not written": ("out[row * 2 + round]", "out[row * 2]", WRONG, "not finite"),
    "threadgroup memory never written": ("parts[simdgroup_index_in_threadgroup] = sum;", "", WRONG, "not finite"),
    "no barrier before reading": (WRITTEN, "", KernelFault, "depends on the order|not finite"),
    "no barrier before writing again": (READ, "", KernelFault, "depends on the order"),
    "a barrier not all threads reach": (
        WRITTEN,
        "if (mine < 64) { " + WRITTEN + "\n}",
        KernelFault,
        "wait at different|barrier",
    ),
    "threads that end before a barrier": (
        "float total",
        "if (mine > 90) return; float total",
        KernelFault,
        "not reached",
    ),
    "a SIMD operation not all threads reach": (
        "sum = simd_sum(sum);",
        "if (thread_index_in_simdgroup < 16) { sum = simd_sum(sum); } else { sum = simd_max(sum); }",
        KernelFault,
        "divergence",
    ),
    "a shuffle from a thread that has ended": (
        "sum = simd_sum(sum);",
        "if (thread_index_in_simdgroup == 31) return; sum += simd_shuffle_xor(sum, 16);",
        KernelFault,
        "reads thread 31",
    ),
    "a write behind a threadgroup array": (
        "parts[simdgroup_index_in_threadgroup] =",
        "parts[32] =",
        KernelFault,
        "outside",
    ),
    "too much threadgroup memory": ("parts[32]", "parts[10000]", KernelFault, "over the limit"),
    "an input written to": ("float total", "const_cast<device T*>(x)[0] = 1; float total", KernelFault, "was written"),
    "a pointer without an address space": ("float total", "float* p = 0; float total", ForbiddenText, "address space"),
    "a pointer of another address space": (
        "float total",
        "const thread T* p = x; float total",
        CompileError,
        "cannot initialize",
    ),
    "double": ("float total = 0.0f", "double total = 0", ForbiddenText, "double"),
    "a lambda": ("float total", "auto f = [&](float v) { return v; }; float total", ForbiddenText, "lambda"),
    "a static variable": ("float total", "static int n = 0; float total", ForbiddenText, "static"),
    "min of two types": ("float total", "auto m = min(1, 2u); float total", CompileError, "deleted"),
    "exp of an integer": ("float total", "float e = exp(1); float total", CompileError, "ambiguous"),
    "a variable never set": ("float sum = 0.0f;", "float sum;", CompileError, "uninitialized"),
    "an array of unknown length": (
        "float total",
        "int n = mine + 1; float a[n]; float total",
        CompileError,
        "variable length",
    ),
    "a function that is not there": ("simd_sum(sum)", "simd_total(sum)", CompileError, "simd_total"),
}
# Found by a sanitizer, whether or not the result is right.
WATCHED = {
    "a read behind an input": ("x[row * N + i]", "x[row * N + i + 4]", "heap-buffer-overflow"),
    "a write behind a threadgroup array": ("parts[simdgroup_index_in_threadgroup] =", "parts[36] =", "out of bounds"),
    "a misaligned vector": (
        "float sum = 0.0f;",
        "float4 v = ((const device float4*)(x + 1))[mine % 8]; float sum = v.x * 0.0f;",
        "misaligned",
    ),
    "a shift too far": (
        "float sum = 0.0f;",
        "float sum = static_cast<float>((1u << (31 + (mine & 1))) & 0u);",
        "shift exponent",
    ),
    "no barrier before reading": (WRITTEN, "", "ThreadSanitizer: data race"),
    "no barrier before writing again": (READ, "", "ThreadSanitizer: data race"),
    "two threads write one output": ("if (mine == 0)", "if (mine < 2)", "ThreadSanitizer: data race"),
}


def planted(old: str, new: str) -> str:
    assert SOURCE.count(old) == 1
    return SOURCE.replace(old, new)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_no_fault(dtype, tmp_path):
    check(operation(tmp_path), reference, [rows(dtype)], sanitize=dtype == mx.float32)


@pytest.mark.parametrize("name", MUTANTS)
def test_found(name, tmp_path):
    old, new, error, said = MUTANTS[name]
    with pytest.raises(error, match=re.compile(said, re.S)):
        check(operation(tmp_path, planted(old, new)), reference, [rows()])


@pytest.mark.parametrize("name", WATCHED)
def test_found_by_a_sanitizer(name, tmp_path):
    old, new, said = WATCHED[name]
    emulator = needs_emulator()
    with using(emulator.backend):
        try:
            mx.eval(operation(tmp_path, planted(old, new))(rows()))
        except KernelFault:
            pass  # the launch is on record; what the sanitizer says of it is the question
    (launch,) = emulator.launches
    sanitizer = "thread" if "Thread" in said else "address"
    with pytest.raises(KernelFault, match=said):
        launch.program.watch(sanitizer, launch.buffers, launch.grid, launch.threadgroup)


def test_helpers_are_looked_at(tmp_path):
    with pytest.raises(ForbiddenText, match="address space"):
        check(operation(tmp_path, helpers="inline void inc(float& v) { v += 1; }\n"), reference, [rows()])


def test_a_wrong_reference_is_noticed(tmp_path):
    with pytest.raises(AssertionError, match="off by"):
        check(operation(tmp_path), lambda x: reference(x) * 1.001, [rows()])


def test_the_number_of_launches_is_checked(tmp_path):
    row_sums = operation(tmp_path)
    with pytest.raises(AssertionError):
        check(lambda x: row_sums(row_sums(x)), lambda x: reference(reference(x)), [rows()])


def needs_emulator() -> Emulator:
    try:
        toolchain.clang(), toolchain.metal_headers()
    except toolchain.Missing as missing:
        pytest.skip(f"kernels cannot be emulated: {missing}")
    return Emulator()
