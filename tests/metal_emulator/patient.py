"""A small kernel to try the emulator on, whole or with a fault planted. Knows row_sums.metal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx

from mlx_qwen35.kernels.backend import Kernel

SOURCE = (Path(__file__).parent / "row_sums.metal").read_text()
THREADS, ROWS, WIDTH = 96, 3, 250


def operation(folder: Path, source: str = SOURCE, helpers: str = "") -> Callable[[mx.array], mx.array]:
    """The kernel with this text as a function x [R, N] -> [R, 2]; folder: to write the text to."""
    body, header = folder / "body.metal", folder / "helpers.metal"
    body.write_text(source)
    header.write_text(helpers)
    kernel = Kernel("row_sums", ["x"], ["out"], str(body), [str(header)])

    def row_sums(x: mx.array) -> mx.array:
        rows, width = x.shape
        constants = {"T": x.dtype, "N": width, "THREADS": THREADS}
        groups, threads = (rows, 1, 1), (THREADS, 1, 1)
        return kernel([x], [((rows, 2), x.dtype)], constants, groups=groups, threads=threads)[0]

    return row_sums


def reference(x: mx.array) -> mx.array:
    return mx.stack([x.sum(axis=1), 2 * x.sum(axis=1)], axis=1)


def rows(dtype: mx.Dtype = mx.float32) -> mx.array:
    mx.random.seed(7)
    return (mx.random.uniform(shape=(ROWS, WIDTH)) + 0.5).astype(dtype)
