"""What drafts for a model, and what memory it takes: its own MTP head, one in a drafter's folder, a small model.

Knows folders and figures. How drafts are made and checked is speculative/'s business.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx

from mlx_qwen35.checkpoint.load import compute_dtype, load_model, read_config
from mlx_qwen35.checkpoint.mtp import is_drafter, load_mtp, mtp_specs
from mlx_qwen35.checkpoint.source import open_source
from mlx_qwen35.config import ModelConfig
from mlx_qwen35.errors import CheckpointError
from mlx_qwen35.library import hub
from mlx_qwen35.library.finding import find, look_up
from mlx_qwen35.library.holding import Demand, of_source
from mlx_qwen35.library.stored import Stored
from mlx_qwen35.library.told import head_bytes, told_demand, told_head, told_specs

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
    check_vocabulary(small.config, model.config, folder)
    return small


def drafting_bytes(
    folder: str | Path, mtp: bool, draft: str | Path | None, dtype: mx.Dtype | str | None = None
) -> Callable[[int], int] | None:
    """Tokens of context -> bytes of what drafts for the model in `folder`; None where nothing does.

    mtp: its own head does. draft: the name of a drafter or of a small model, of which nothing is downloaded. Raises
    CheckpointError where `load` would.
    """
    return told_drafting(read_config(folder), mtp, draft, dtype, where=str(folder), folder=Path(folder))


def told_drafting(
    config: ModelConfig,
    mtp: bool,
    draft: str | Path | None,
    dtype: mx.Dtype | str | None = None,
    *,
    where: str,
    folder: Path | None = None,
) -> Callable[[int], int] | None:
    """The same for a model of which only the config is here, or, in `folder`, all of it. where: for errors."""
    compute = compute_dtype(dtype)
    found = None if draft is None else look_up(draft)
    heads = [folder] if mtp and folder is not None else []
    parts = [told_head(config, compute, where)] if mtp and folder is None else []
    if isinstance(found, Stored) and is_drafter(found.folder):
        heads.append(found.folder)
    elif isinstance(found, Stored):
        small = read_config(found.folder)
        check_vocabulary(small, config, found.folder)
        parts.append(_small(of_source(open_source(found.folder, small), compute)))
    elif found is not None:
        small = hub.look(found.name, found.revision).config
        check_vocabulary(small, config, found.name)
        parts.append(_small(told_demand(small, told_specs(small), compute)))
    for head in heads:
        layers, specs = mtp_specs(head, config)
        parts.append(head_bytes(config, layers, specs, compute.size))
    return (lambda tokens: sum(part(tokens) for part in parts)) if parts else None


def check_vocabulary(small: ModelConfig, large: ModelConfig, where: str | Path) -> None:
    """Raises CheckpointError if a small model, that of `where`, has other tokens than the one it is to draft for."""
    if small.text.vocab_size != large.text.vocab_size:
        raise CheckpointError(
            f"{where} has {small.text.vocab_size} tokens, the model it is to draft for {large.text.vocab_size}: take a "
            "smaller model of the same release, whose tokenizer is the same"
        )


def _small(demand: Demand) -> Callable[[int], int]:
    """What a whole model takes beside another one, in the same process."""
    return replace(demand, reserve=0).resident()
