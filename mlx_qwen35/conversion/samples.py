"""Samples of a source's weights: a few stretches of rows, or a few experts.

Knows where the values of one of our tensors lie. Knows nothing of what a sample is for.
"""

from __future__ import annotations

import mlx.core as mx

from mlx_qwen35.checkpoint.inventory import Shape
from mlx_qwen35.checkpoint.quantize import unpack
from mlx_qwen35.checkpoint.source import Source

_PLACES = 4  # stretches of rows, or experts, of which a sample is made
_SAMPLE = 1 << 16  # values of a sample


def sample_rows(origin: Source, module: str, shape: Shape) -> mx.array:
    """Rows [N, in] of a weight, in the dtype that it has."""
    had, parts = origin.held(module, shape)
    rows, stacked = shape[0], len(shape) == 3
    if not parts["weight"].cuts:
        stretches = [(0, rows)]
    else:
        places = min(_PLACES, rows)
        count = 1 if stacked else max(1, min(rows // places, _SAMPLE // places // shape[-1]))
        starts = (place * (rows - count) // max(1, places - 1) for place in range(places))
        stretches = [(start, start + count) for start in starts]
    found = []
    for start, stop in stretches:
        made = {kind: part.finish(part.fetch(start, stop), None) for kind, part in parts.items()}
        x = unpack(made, had) if had else made["weight"]
        step = max(1, x.size * len(stretches) // _SAMPLE)
        found.append(mx.contiguous(x.reshape(-1, shape[-1])[::step]))
        mx.eval(found)
    return mx.concatenate(found)
