"""How many columns go into one product of a BLAS and keep the bits that each has as the only one.

Knows products of matrices. No BLAS says it: what is left over at the edge of a tile may be added up in another order
than the inside (OpenBLAS 0.3.21 for Haswell: 8 columns of 32 inputs differ with 1,024 outputs, and do not with 960). So
it is tried, once for each form, when several columns first have it.
"""

from __future__ import annotations

from functools import cache

import mlx.core as mx
import numpy as np

# Multiplications of a product up to which OpenBLAS computes it on the thread that asks. Its own threads look for more
# work, for milliseconds, with a core each, which those that hand out small products and compute them then lack.
_ON_ONE_THREAD = 2**18


@cache
def width_of(forms: frozenset[tuple[int, int]], columns: int) -> int:
    """How many of so many columns go together: weights of the forms [outputs, inputs] give each the bits that it has
    alone."""
    for parts in range(1, columns):
        width = -(-columns // parts)
        if not any(_wakes_others(*form, width) for form in forms) and all(alike(*form, width) for form in forms):
            return width
    return 1


def _wakes_others(outputs: int, inputs: int, columns: int) -> bool:
    """Whether so many columns go to other threads of OpenBLAS where one would not."""
    return outputs * inputs <= _ON_ONE_THREAD < outputs * inputs * columns


@cache
def alike(outputs: int, inputs: int, columns: int) -> bool:
    """Whether weight [outputs, inputs] @ x [inputs, columns] has in each column the bits that this has alone: x in the
    order of rows or of columns, and added to something, too."""
    rng = np.random.default_rng(0)
    weight = mx.array(rng.standard_normal((outputs, inputs), np.float32))
    x, before = (rng.standard_normal((size, columns), np.float32) for size in (inputs, outputs))

    def products(taken: slice) -> list[np.ndarray]:
        some, added = (mx.array(np.ascontiguousarray(each[:, taken])) for each in (x, before))
        by_column = mx.array(np.ascontiguousarray(x[:, taken].T)).T
        return [np.array(weight @ some), np.array(weight @ by_column), np.array(mx.addmm(added, weight, some))]

    together = products(slice(None))
    return all(
        np.array_equal(made[:, column], own[:, 0])
        for column in range(columns)
        for made, own in zip(together, products(slice(column, column + 1)), strict=True)
    )
