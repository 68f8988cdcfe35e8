"""What drafts for a model, and what memory it takes: its own MTP head, one in a drafter's folder, a small model.

Knows folders and figures. How drafts are made and checked is speculative/'s business.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx

from mlx_qwen35.checkpoint.inventory import mtp_tensors
from mlx_qwen35.checkpoint.load import compute_dtype, load_model, read_config
from mlx_qwen35.checkpoint.mtp import is_drafter, load_mtp, mtp_specs
from mlx_qwen35.checkpoint.source import open_source
from mlx_qwen35.config import ModelConfig
from mlx_qwen35.errors import CheckpointError
from mlx_qwen35.library.finding import find
from mlx_qwen35.library.footprint import cache_at, cache_bytes, feeding_bytes, mixing_bytes, tensor_bytes
from mlx_qwen35.library.holding import of_source
from mlx_qwen35.mtp import PRIME_AT_ONCE

if TYPE_CHECKING:
    from mlx_qwen35.model import Model
    from mlx_qwen35.mtp import MTPHead


def load_draft_model(
    ref: str | Path,
    model: Model,
    *,
    dtype: mx.Dtype | str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> MTPHead | Model:
    """What drafts for `model` (`stream_generate(draft_model=...)`): the head in a drafter's folder, as mlx-vlm splits
    one off, or a small model with the same tokenizer. Arguments and errors as in `load`; all of it is in memory."""
    folder = find(ref, on_progress=on_progress)
    if is_drafter(folder):
        return load_mtp(folder, model.config, dtype=dtype, on_progress=on_progress)
    small = load_model(folder, dtype=dtype, on_progress=on_progress)
    sizes = [each.config.text.vocab_size for each in (small, model)]
    if sizes[0] != sizes[1]:
        raise CheckpointError(
            f"{folder} has {sizes[0]} tokens, the model it is to draft for {sizes[1]}: take a smaller model of the "
            "same release, whose tokenizer is the same"
        )
    return small


def drafting_bytes(
    folder: str | Path, mtp: bool, draft: str | Path | None, dtype: mx.Dtype | str | None = None
) -> Callable[[int], int] | None:
    """Tokens of context -> bytes of what drafts for the model in `folder`; None where nothing does.

    mtp: its own head does. draft: the folder of a drafter or of a small model. Raises CheckpointError where `load`
    would.
    """
    compute, config = compute_dtype(dtype), read_config(folder)
    heads = [Path(folder)] if mtp else []
    if draft is not None and is_drafter(draft):
        heads.append(Path(draft))
    parts = [_head_bytes(head, config, compute.size) for head in heads]
    if draft is not None and not is_drafter(draft):
        small = replace(of_source(open_source(draft, read_config(draft)), compute), reserve=0)
        parts.append(small.resident())
    return (lambda tokens: sum(part(tokens) for part in parts)) if parts else None


def _head_bytes(folder: Path, config: ModelConfig, itemsize: int) -> Callable[[int], int]:
    layers, specs = mtp_specs(folder, config)
    gpu = mx.default_device().type == mx.gpu
    weights = sum(
        tensor_bytes(name, shape, specs.get(name.removesuffix(".weight")), itemsize)
        for name, shape in mtp_tensors(config, layers).items()
    )
    head = replace(config, vision=None, text=replace(config.text, layer_types=("full_attention",) * layers))
    named = {name.removeprefix("mtp."): spec for name, spec in specs.items()}
    per_token, _ = cache_bytes(head, itemsize)

    def needed(tokens: int) -> int:
        how = (head, named, PRIME_AT_ONCE, tokens, itemsize)
        working = mixing_bytes(*how, gpu=gpu) + feeding_bytes(*how, gpu=gpu)
        return weights + cache_at(tokens, per_token, 0) + working

    return needed
