"""How many tokens are verified in one call of a model. Knows devices and forms of weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn

from mlx_qwen35.kernels import few_rows, one_row
from mlx_qwen35.kernels.quantized_matmul import rows_alone
from mlx_qwen35.speculative import copying

if TYPE_CHECKING:
    from mlx_qwen35.model import Model


def row_exact(model: Model) -> bool:
    """Whether each of `most_rows` tokens of a call has the bits that it has alone (docs/EXACTNESS.md)."""
    return mx.default_device().type == mx.cpu or getattr(model, "exact", False)


def most_rows(model: Model) -> int:
    """Tokens of a call: as many as have the bits that each has alone, where that is to be; otherwise as many as a
    draft may have and one."""
    if not row_exact(model) or not isinstance(model, nn.Module):
        return copying.MOST + 1
    if mx.default_device().type != mx.cpu:
        return one_row.ROWS
    forms = {(m.bits, m.mode) for m in model.modules() if hasattr(m, "bits") and hasattr(m, "mode")}
    return min([few_rows.MOST_ROWS, *(rows_alone(*form) for form in forms)])
