"""How many bytes caches may take beside a model that is loaded.

Knows what the machine has, what MLX holds now and what a cache takes. Knows nothing of requests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import mlx.core as mx

from mlx_qwen35.cache.kv import STEP
from mlx_qwen35.errors import ArgumentError
from mlx_qwen35.library.footprint import cache_bytes, working_bytes
from mlx_qwen35.library.memory import memory_left, memory_size
from mlx_qwen35.library.plan import shown_size

if TYPE_CHECKING:
    from mlx_qwen35.model import Model

_SHARE = 0.5  # of what is left, where nothing is said
_STATES = 4  # of its delta states that a row has: its own, the next step's, and two to go back to


def bytes_of_rows(model: Model) -> tuple[int, int]:
    """(bytes of a cache by the token, by the row)."""
    per_token, states = cache_bytes(model.config, model.norm.weight.itemsize, model.kv_form)
    return per_token, _STATES * states + STEP * per_token


def room(model: Model, memory: int | str | None = None) -> int:
    """Bytes for caches and what is kept of them. memory: all that this process may take, as `load` has it; None: half
    of what is left. Raises ArgumentError where that is not enough for a cache."""
    _, per_row = bytes_of_rows(model)
    if memory is None:
        return max(int(_SHARE * memory_left()), 2 * per_row)
    size, source = memory_size(memory)
    held = mx.get_active_memory()
    chunk = model.prefill_chunk
    working = working_bytes(model.config, {}, chunk, model.norm.weight.itemsize, gpu=mx.default_device().type == mx.gpu)
    left = size - held - working
    if left < per_row:
        raise ArgumentError(
            f"memory is {shown_size(size)} ({source}): MLX holds {shown_size(held)} already and reading a prompt takes "
            f"{shown_size(working)}, which leaves less than the {shown_size(per_row)} of one row. Give more, or load "
            "the model with less"
        )
    return left
