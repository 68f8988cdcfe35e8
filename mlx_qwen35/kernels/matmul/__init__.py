"""x @ w.T with plain weights, in which a few rows have the bits that each has alone.

Knows which form to run. Knows no layers.
A BLAS adds up the products of a single row in another order than those of several: OpenBLAS on x86 differs from one row
to two, others do not. What verifies drafted tokens has to say of each what decoding says of it alone, and so has a
batch, so on the CPU a few rows go together as far as each has its own bits: kernels/few_rows. A GPU joins rows unless
exactness is asked for: kernels/one_row.
"""

from __future__ import annotations

import mlx.core as mx

from .. import few_rows


def matmul(x: mx.array, weight: mx.array) -> mx.array:
    """x [.., in], weight [out, in] -> [.., out]."""
    if mx.default_device().type == mx.cpu and few_rows.rows_of(x) <= few_rows.MOST_ROWS:
        return few_rows.matmul(x, weight)
    return x @ weight.T
