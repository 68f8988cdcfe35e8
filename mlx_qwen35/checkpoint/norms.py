"""Whether norms are stored zero-centred (the scale is 1 + w) or as scales, as their values tell.

Knows a few norms of a checkpoint. A scale below zero would turn a channel around, which no trained model does; values
around zero have both signs. Where the values do not tell, this says so.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from mlx_qwen35.checkpoint import files
from mlx_qwen35.checkpoint.files import Entry, TensorFiles
from mlx_qwen35.checkpoint.names import HF, MLX, Layout, is_centred
from mlx_qwen35.errors import CheckpointError

_LOOKED_AT = 16  # norms of a model, spread over its layers
_SOME, _NONE = 0.05, 0.005  # shares of values below zero, in the mean over norms
_LEAST_SCALE = 0.3  # mean of what can be scales


def written(entries: Iterable[Entry]) -> str | None:
    """"hf": these norms are zero-centred; "mlx": they are scales; None: their values could be either."""
    below, means = [], []
    for entry in entries:
        if len(entry.shape) != 1 or not entry.shape[0] or entry.dtype not in ("F32", "F16", "BF16"):
            continue
        values = files.read(entry)
        if entry.dtype == "BF16":
            values = (values.astype(np.uint32) << 16).view(np.float32)
        below.append(float(np.mean(values < 0)))
        means.append(float(np.mean(values, dtype=np.float64)))
    if not below:
        return None
    if np.mean(below) > _SOME:
        return HF
    return MLX if np.mean(below) < _NONE and np.mean(means) > _LEAST_SCALE else None


def check_norms(layout: Layout, found: TensorFiles) -> None:
    """Hold the norms of the text model against what `layout` says of them; raises CheckpointError.

    They have to confirm it where something speaks against it, and must not contradict it where nothing does: a norm
    that is shifted twice, or not at all, still makes a model that talks.
    """
    names = [name for name in found.entries if name.endswith("norm.weight") and not layout.is_mtp(name)]
    norms = [found.entries[name] for name in names if any(map(is_centred, layout.ours(name)))]
    seen = written(norms[:: -(-len(norms) // _LOOKED_AT) or 1])
    if seen == layout.values or (seen is None and not layout.doubt):
        return
    how = {HF: "zero-centred, as Hugging Face writes them", MLX: "scales, as MLX writes them"}
    raise CheckpointError(
        f"{found.folder}: it is unclear whether the norms are shifted. The checkpoint looks as if they were "
        f"{how[layout.values]}"
        + (f", but {layout.doubt}" if layout.doubt else "")
        + (f", but their values are {how[seen]}" if seen not in (None, layout.values) else "")
        + ". Convert the original checkpoint again"
    )
