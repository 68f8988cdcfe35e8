"""Runs our Metal kernels without a Mac, and holds them against their reference. docs/KERNELS.md says what that proves.

A kernel's text is what MLX generates for it, compiled with clang and run with one fiber a thread. A test needs one
line; without clang or MLX's Metal headers it skips, and on a machine with a GPU the same line runs there:

    from tests.metal_emulator import check
    check(lambda *arrays: operation(*arrays, ...), lambda *arrays: reference(*arrays, ...), arrays)
"""

from .check import check, poisoned_outputs
from .cuda import compile_for_cuda

__all__ = ["check", "compile_for_cuda", "poisoned_outputs"]
