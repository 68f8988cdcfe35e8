"""Allotment: the bits of each module for a size that the whole checkpoint is to have.

Knows how large a module is in each of MLX's formats, and how far it is from the source in each. Knows nothing of how
a checkpoint is written.
"""

from __future__ import annotations

from collections.abc import Callable

from mlx_qwen35.checkpoint.source import Source
from mlx_qwen35.config import QuantSpec


def fit(
    origin: Source,
    target_bytes: int,
    *,
    beside: int = 0,
    group_size: int = 64,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, QuantSpec | None]:
    """How each linear module of the text model is to be quantized so that the checkpoint has at most `target_bytes`.

    beside: the bytes of what is written besides the text model: vision and MTP tensors, copied files. group_size: of
    affine quantization. on_progress: called with (modules measured, modules in all).
    Raises CheckpointError, with the figures, where even the smallest form is larger.
    """
    raise NotImplementedError
