"""Random matrices in the forms that kernels read, flat for check() and put together again.

Knows kernels.weights. Knows no operation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_qwen35.kernels.weights import Weights

# (mode, bits, group): every width, every group, and mxfp4.
AFFINE = [(2, 64), (3, 32), (3, 128), (4, 32), (4, 64), (4, 128), (5, 64), (6, 32), (6, 128), (8, 64)]
FORMS = [("affine", bits, group) for bits, group in AFFINE] + [("mxfp4", 4, 32), None]
Form = tuple[str, int, int] | None  # None: plain


@dataclass(frozen=True)
class Matrix:
    """A matrix or a stack of them; arrays: what an operation gets of it."""

    form: Form
    arrays: tuple[mx.array, ...]

    @staticmethod
    def random(form: Form, shape: Sequence[int], dtype: mx.Dtype = mx.float32) -> Matrix:
        values = (mx.random.normal(shape) * shape[-1] ** -0.5).astype(dtype)
        if form is None:
            return Matrix(None, (values,))
        mode, bits, group = form
        return Matrix(form, tuple(mx.quantize(values, group, bits, mode)))

    def of(self, arrays: Sequence[mx.array]) -> Weights:
        """The same matrix from its arrays, which check() may have widened."""
        if self.form is None:
            made = Weights.of(*arrays)
        else:
            mode, bits, group = self.form
            made = Weights.of(*arrays, group_size=group, bits=bits, mode=mode)
        assert made is not None
        return made


def all_of(matrices: Sequence[Matrix], arrays: Sequence[mx.array]) -> list[Weights]:
    """The matrices from all their arrays, one after the other."""
    made, arrays = [], list(arrays)
    for matrix in matrices:
        count = len(matrix.arrays)
        made.append(matrix.of(arrays[:count]))
        arrays = arrays[count:]
    assert not arrays
    return made


def flat(matrices: Sequence[Matrix]) -> list[mx.array]:
    return [array for matrix in matrices for array in matrix.arrays]
