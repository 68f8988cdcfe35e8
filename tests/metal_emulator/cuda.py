"""Compiles kernels for CUDA with nvcc, which needs no GPU: the text as MLX puts it together, without MLX's own header.

Knows that text and nvcc. Knows no operation; nothing is run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import pytest

from mlx_qwen35.kernels.backend import Backend, using
from mlx_qwen35.kernels.cuda_text import CUDA_NAMES, cuda_body

from . import toolchain

_TYPES = {
    mx.float32: "float",
    mx.bfloat16: "__nv_bfloat16",
    mx.float16: "__half",
    mx.int32: "int32_t",
    mx.uint32: "uint32_t",
    mx.uint8: "uint8_t",
}
_FRAME = """{header}
namespace mlx::core::cu {{
__global__ void {name}({parameters}) {{
{constants}
{body}
}}
}}
"""


def compile_for_cuda(kernels: Callable[..., Any], arrays: Sequence[mx.array]) -> set[str]:
    """Compile every kernel that kernels(*arrays) calls; -> their names. Raises CompileError; skips without nvcc."""
    try:
        nvcc = toolchain.nvcc()
    except toolchain.Missing as missing:
        pytest.skip(f"kernels cannot be compiled for CUDA: {missing}")
    texts: dict[str, str] = {}
    with using(Backend("cuda text", lambda **parts: _writer(texts, **parts))):
        kernels(*arrays)
    assert texts, "no kernel was called"
    for text in texts.values():
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        source = toolchain.write(toolchain.CACHE / f"kernel-{digest}.cu", text)
        toolchain.once(source.with_suffix(".cubin"), [nvcc, "-std=c++17", "-arch=sm_80", "-cubin", "-w", str(source)])
    return set(texts)


def _writer(
    texts: dict[str, str], *, name: str, input_names: list[str], output_names: list[str], source: str, header: str
) -> Callable[..., list[mx.array]]:
    """A kernel that notes its text and leaves zeros."""

    def call(*, inputs: list[mx.array], **how: Any) -> list[mx.array]:
        typed = [(f"const {_TYPES[a.dtype]}* {n}") for n, a in zip(input_names, inputs, strict=True)]
        typed += [f"{_TYPES[d]}* {n}" for n, d in zip(output_names, how["output_dtypes"], strict=True)]
        typed += [f"const int* {n}_shape" for n in input_names if f"{n}_shape" in source]
        texts[name] = _FRAME.format(
            header=CUDA_NAMES + cuda_body(header),
            name=_name(name, how["template"]),
            parameters=", ".join(typed),
            constants="\n".join(_constant(*item) for item in how["template"]),
            body=cuda_body(source),
        )
        shapes = zip(how["output_shapes"], how["output_dtypes"], strict=True)
        return [mx.zeros(shape, dtype) for shape, dtype in shapes]

    return call


def _constant(name: str, value: int | bool | mx.Dtype) -> str:
    if isinstance(value, mx.Dtype):
        return f"  using {name} = {_TYPES[value]};"
    return f"  constexpr {'bool' if isinstance(value, bool) else 'int'} {name} = {str(value).lower()};"


def _name(name: str, constants: list[tuple[str, int | bool | mx.Dtype]]) -> str:
    """What MLX calls the kernel: constants are part of it, as they are."""
    written = [("t" if v else "f") if isinstance(v, bool) else str(v) for _, v in constants]
    return "_".join(["custom_kernel", name, *(w.removeprefix("mlx.core.") for w in written)])
