"""Holds an operation's kernels against its reference: on a GPU where there is one, in the emulator elsewhere.

Knows how close results must be. Knows no operation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35.kernels.backend import CUDA, METAL, Backend, using

from ..mac.pretended import NO_KERNELS, is_pretended
from . import toolchain
from .emulator import Emulator
from .program import SANITIZERS

Arrays = mx.array | Sequence[mx.array]
# Of the largest value of the reference.
TOLERANCE = {mx.float32: 1e-5, mx.bfloat16: 5e-3, mx.float16: 5e-3}


def check(
    kernels: Callable[..., Arrays],
    reference: Callable[..., Arrays],
    arrays: Sequence[mx.array],
    *,
    tolerance: float | None = None,
    sanitize: bool = False,
    launches: int = 1,
) -> list[mx.array]:
    """Call both with `arrays`; -> what the kernels gave, evaluated.

    kernels: the operation as the package calls it, through kernels.backend. reference: gets narrower floats widened to
    float32, so that only the kernel rounds. Integers must be equal. launches: how many kernels the operation takes.
    sanitize: in the emulator, run them under the sanitizers too; for small shapes.
    Skips the test where neither a GPU nor the emulator is at hand.
    """
    with poisoned_outputs() as emulator:
        made = kernels(*arrays)
        found = [made] if isinstance(made, mx.array) else list(made)
        mx.eval(found)
    if emulator is not None:
        assert len(emulator.launches) == launches
    with using(None):
        made = reference(*(_wide(a) for a in arrays))
    expected = [made] if isinstance(made, mx.array) else list(made)
    assert len(found) == len(expected)
    for number, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        _compare(number, ours, theirs, tolerance)
    if sanitize and emulator is not None:
        for launch in emulator.launches:
            for sanitizer in SANITIZERS:
                launch.program.watch(sanitizer, launch.buffers, launch.grid, launch.threadgroup)
    return found


@contextmanager
def poisoned_outputs() -> Iterator[Emulator | None]:
    """Inside: kernels run, on outputs that were NaN before. -> the emulator, or None on a GPU; skips without either."""
    if is_pretended():
        pytest.skip(NO_KERNELS)
    gpu = METAL if mx.metal.is_available() else CUDA if mx.cuda.is_available() else None
    if gpu is not None:
        with mx.stream(mx.gpu), using(Backend(gpu.name, lambda **parts: _poisoning(gpu.make(**parts)))):
            yield None
        return
    try:
        toolchain.clang(), toolchain.metal_headers()
    except toolchain.Missing as missing:
        pytest.skip(f"kernels cannot be emulated: {missing}")
    emulator = Emulator()
    with using(emulator.backend):
        yield emulator


def _poisoning(kernel: Callable[..., list[mx.array]]) -> Callable[..., list[mx.array]]:
    return lambda **call: kernel(**call, init_value=float("nan"))


def _wide(array: mx.array) -> mx.array:
    return array.astype(mx.float32) if mx.issubdtype(array.dtype, mx.floating) else array


def _compare(number: int, found: mx.array, expected: mx.array, tolerance: float | None) -> None:
    assert found.shape == expected.shape, f"output {number}: {found.shape}, not {expected.shape}"
    ours, theirs = (np.array(_wide(a)) for a in (found, expected))
    if not mx.issubdtype(found.dtype, mx.floating):
        np.testing.assert_array_equal(ours, theirs)
        return
    assert np.isfinite(ours).all(), f"output {number}: {np.count_nonzero(~np.isfinite(ours))} values are not finite"
    most = tolerance or TOLERANCE[found.dtype]
    error = np.abs(ours.astype(np.float64) - theirs).max() / max(np.abs(theirs).max(), 1e-30)
    assert error <= most, f"output {number} is off by {error:.2e} of the largest value; allowed are {most:.0e}"
