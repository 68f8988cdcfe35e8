"""One translated kernel, compiled and run on buffers: plainly, or watched by a sanitizer.

Knows compilers' options and the runtime. Knows buffers as addresses; arrays are emulator.py's business.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from . import toolchain
from .translation import Translated, headers_as_cpp

HERE = Path(__file__).parent
_UTILS = '#include <metal_stdlib>\n#include "mlx/backend/metal/kernels/utils.h"\n'  # what MLX puts before every kernel
_DEFINES = ["-D__METAL__", "-D__METAL_VERSION__=310", "-DMLX_METAL_JIT"]
# Float is the only literal and the only excess precision; what a Mac's compiler does not take is an error.
_KERNEL = [
    "-std=c++14",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-exceptions",
    "-Xclang",
    "-cl-single-precision-constant",
]
for _type in ("float16", "bfloat16"):
    _KERNEL += ["-Xclang", f"-f{_type}-excess-precision=none"]
_KERNEL += [
    "-Wno-everything",
    "-Wuninitialized",
    *(f"-Werror={e}" for e in ("uninitialized", "return-type", "vla-extension")),
]

SANITIZERS = {
    "address": [
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=undefined",
        "-fno-sanitize=vptr,function",
        "-DEMU_ASAN",
    ],
    "thread": ["-fsanitize=thread", "-DEMU_TSAN"],
}
_PLAIN = ["-O2", "-fPIC", "-DEMU_ADDRESS_SPACES"]
_WATCHED = ["-O1", "-g"]


class KernelFault(Exception):
    """What the emulator or a sanitizer objects to."""


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


@functools.cache
def _sources() -> str:
    return "".join((HERE / name).read_text() for name in ("runtime.h", "runtime.cpp", "sanitized_main.cpp", "msl.h"))


@functools.cache
def _prelude() -> Path:
    """msl.h and MLX's headers, as one header."""
    command = [toolchain.clang(), "-E", "-P", "-x", "c++", "-nostdinc", "-nostdinc++", "-std=c++14", *_DEFINES]
    text = toolchain.compiled([*command, *toolchain.metal_headers(), "-"], _UTILS)
    text = f'#pragma once\n#include "{HERE / "msl.h"}"\n{headers_as_cpp(text)}'
    return toolchain.write(toolchain.CACHE / f"prelude-{_digest(text, _sources())}.h", text)


@functools.cache
def _precompiled(options: tuple[str, ...]) -> list[str]:
    prelude = _prelude()
    path = prelude.with_name(f"{prelude.stem}-{_digest(*_KERNEL, *options)}.pch")
    # Its name says what is in it: a checkout that touches the files changes nothing.
    untimed = ["-Xclang", "-fno-pch-timestamp"]
    command = [toolchain.clang(), "-x", "c++-header", *untimed, *_KERNEL, *_DEFINES, *options, str(prelude)]
    return ["-include-pch", str(toolchain.once(path, command))]


@functools.cache
def _runtime(options: tuple[str, ...], name: str) -> Path:
    path = toolchain.CACHE / f"{Path(name).stem}-{_digest(_sources(), *options)}.o"
    # The runtime itself is not watched: it hands values from one thread to another as hardware does.
    watched = [o for o in options if not o.startswith("-fsanitize=thread")]
    return toolchain.once(path, [toolchain.clang(), "-std=c++17", *watched, "-c", str(HERE / name)])


class Program:
    """A kernel that can be run."""

    def __init__(self, kernel: Translated):
        self._cpp = kernel.cpp
        self._library: ctypes.CDLL | None = None

    def run(
        self, addresses: Sequence[int], grid: Sequence[int], threadgroup: Sequence[int], order: int, first: int = 0
    ) -> None:
        """addresses: of the buffers. order: of threads, 0, 1 or 2. first: the threadgroups from this number on.

        Raises KernelFault.
        """
        if self._library is None:
            source = self._source(_PLAIN)
            runtime = _runtime(tuple(_PLAIN), "runtime.cpp")
            options = [*_KERNEL, *_DEFINES, *_PLAIN, "-shared", *toolchain.LINK, *_precompiled(tuple(_PLAIN))]
            command = [toolchain.clang(), *options, str(source), str(runtime)]
            self._library = ctypes.CDLL(str(toolchain.once(source.with_suffix(".so"), command)))
        sizes = ctypes.c_uint32 * 3
        error = ctypes.create_string_buffer(2048)
        buffers = (ctypes.c_void_p * len(addresses))(*addresses)
        kernel = ctypes.cast(self._library.emu_kernel, ctypes.c_void_p)
        given = kernel, buffers, sizes(*grid), sizes(*threadgroup), ctypes.c_uint64(first)
        if self._library.emu_dispatch(*given, order, error, 2048):
            raise KernelFault(error.value.decode())

    def watch(
        self, sanitizer: str, buffers: Sequence[np.ndarray], grid: Sequence[int], threadgroup: Sequence[int]
    ) -> None:
        """Run once, on copies, in a process of its own; raises KernelFault with what the sanitizer found."""
        options = [*_WATCHED, *SANITIZERS[sanitizer]]
        source = self._source(options)
        objects = [str(_runtime(tuple(options), name)) for name in ("runtime.cpp", "sanitized_main.cpp")]
        command = [
            toolchain.clang(),
            *_KERNEL,
            *_DEFINES,
            *options,
            *toolchain.LINK,
            *_precompiled(tuple(options)),
            str(source),
            *objects,
        ]
        program = toolchain.once(source.with_suffix(""), [*command, "-lstdc++", "-lm"])
        with tempfile.TemporaryDirectory() as folder:
            for number, buffer in enumerate(buffers):
                buffer.tofile(f"{folder}/{number}.bin")
            arguments = [folder, *map(str, (len(buffers), *grid, *threadgroup, 0))]
            said = os.environ | {
                "TSAN_OPTIONS": "halt_on_error=1 report_thread_leaks=0",
                "ASAN_OPTIONS": "detect_leaks=0",
            }
            done = subprocess.run([program, *arguments], capture_output=True, text=True, env=said)
        if done.returncode:
            found = re.search(
                r"(WARNING: ThreadSanitizer.*|ERROR: AddressSanitizer: .*|runtime error.*|emulator: .*)", done.stderr
            )
            raise KernelFault(f"{sanitizer} sanitizer: {found[1] if found else done.stderr[-2000:]}")

    def _source(self, options: Sequence[str]) -> Path:
        name = f"kernel-{_digest(self._cpp, _sources(), *_KERNEL, *toolchain.LINK, *options)}.cpp"
        return toolchain.write(toolchain.CACHE / name, self._cpp)
