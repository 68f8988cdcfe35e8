"""What drafts for a model, and what memory it takes: its own MTP head, a drafter in a folder, a small model.

Knows folders and figures, and how to find out whether a head's norms were read as they are meant. How drafts are made
and checked is speculative/'s business.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx

from mlx_qwen35 import checks
from mlx_qwen35.blocks.config import MOST_ROWS
from mlx_qwen35.checkpoint.blocks import is_blocks, load_blocks, open_blocks, read_blocks_config
from mlx_qwen35.checkpoint.load import compute_dtype, load_model, read_config
from mlx_qwen35.checkpoint.mtp import is_drafter, mtp_specs, open_head
from mlx_qwen35.checkpoint.names import HF, MLX
from mlx_qwen35.checkpoint.source import open_source
from mlx_qwen35.config import ModelConfig
from mlx_qwen35.errors import ArgumentError, CheckpointError, Qwen35Warning
from mlx_qwen35.library import hub
from mlx_qwen35.library.finding import find, look_up
from mlx_qwen35.library.holding import Demand, of_source
from mlx_qwen35.library.kernel_check import check_kernels
from mlx_qwen35.library.stored import Stored
from mlx_qwen35.library.told import blocks_bytes, head_bytes, told_demand, told_head, told_specs

if TYPE_CHECKING:
    from mlx_qwen35.blocks.drafter import BlockDraftModel
    from mlx_qwen35.library.hub import Offer
    from mlx_qwen35.model import Model
    from mlx_qwen35.model.mtp import MTPHead

NO_ANSWERS = "{} drafts for another model and answers nothing itself: give it as --draft-model (draft_model=)"
_GUESSED = 24  # tokens that tell whether a head's norms are read rightly
_GUESSED_STREAMED = 12
_WRITTEN = {HF: "zero-centred", MLX: "plain scales"}


def load_head(
    folder: str | Path,
    model: Model,
    *,
    dtype: mx.Dtype | str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> MTPHead:
    """The head that drafts for `model`, of its own folder or of a drafter's, with norms as they are meant.

    Where their writer and their values do not say the same of them, the head guesses a few tokens that the model says
    from its first token on; where the other reading guesses clearly more of them, it is taken, with a Qwen35Warning.
    Arguments and errors as in `load_mtp`.
    """
    opened = open_head(folder, model.config)
    head, norms = opened.load(dtype, on_progress), opened.norms
    check_kernels(head, wanted=model.kernels)
    if norms.sure or (norms.seen and model.expert_stats is not None):
        return head
    other = MLX if norms.chosen == HF else HF
    readings = {way: opened.read_norms(way, dtype) for way in (norms.chosen, other)}
    told = _continuation(model, _GUESSED if model.expert_stats is None else _GUESSED_STREAMED)
    tried = {way: _try(model, head, readings[way], *told) for way in readings}
    found, count = {way: len(trial.hits) for way, trial in tried.items()}, told[0].shape[1] - 1
    better = tried[other].is_better(tried[norms.chosen], count)
    chosen = other if better else norms.chosen
    head.load_weights(readings[chosen], strict=False)
    if better or norms.rule not in (None, chosen):
        warnings.warn(
            f"{folder}: the norms of its MTP layer are read as {_WRITTEN[chosen]}, though "
            + ("their values look" if norms.seen not in (None, chosen) else "their writer is known to have them")
            + f" otherwise: so it guesses {found[chosen]} of {count} tokens, and else "
            f"{found[MLX if chosen == HF else HF]}",
            Qwen35Warning,
            stacklevel=3,
        )
    return head


def _continuation(model: Model, count: int) -> tuple[mx.array, mx.array, mx.array]:
    """What the model says from its first token on: tokens [1, T], hidden [1, T, H], likeliest next ones [1, T]."""
    token = mx.array([[next(iter(model.config.eos_token_ids), 0)]])
    cache, tokens, states = model.make_cache(), [], []
    for _ in range(count):
        hidden = model.hidden(token, cache)
        tokens, states = [*tokens, token], [*states, hidden]
        token = mx.argmax(model.head(hidden), axis=-1)
        mx.eval(token, hidden)
    joined = mx.concatenate([*tokens[1:], token], axis=1)
    return mx.concatenate(tokens, axis=1), mx.concatenate(states, axis=1), joined


@dataclass(frozen=True)
class _Trial:
    """hits: the tokens that a head guesses as the model says them; divergence: of its probabilities, nats a token."""

    hits: list[int]
    divergence: float

    def is_better(self, other: _Trial, count: int) -> bool:
        """Whether this reading of a head is right and the other wrong, clearly; of a head that guesses nothing neither.

        Norms that lack their 1 spoil guesses; norms that have it twice leave most, and make the head far too certain.
        """
        least = max(3, count // 8)
        guesses = len(self.hits) >= least and len(set(self.hits)) >= 3
        more = len(self.hits) - len(other.hits)
        return guesses and (more >= least or (more > -least and self.divergence < other.divergence - 1))


def _try(
    model: Model, head: MTPHead, norms: list[tuple[str, mx.array]], tokens: mx.array, hidden: mx.array, said: mx.array
) -> _Trial:
    """What a head with these norms makes of what the model said. Arguments as from _continuation."""
    head.load_weights(norms, strict=False)
    positions = mx.arange(tokens.shape[1] - 1)[None]
    states = head(model.embed_tokens(tokens[:, 1:]).astype(hidden.dtype), hidden[:, :-1], positions)
    mine, right = (_log_probabilities(model.head(x)) for x in (states, hidden[:, 1:]))
    divergence = (mx.exp(right) * (right - mine)).sum(axis=-1).mean().item()
    guessed = mx.argmax(mine, axis=-1)[0].tolist()
    return _Trial([a for a, b in zip(guessed, said[0, 1:].tolist(), strict=True) if a == b], divergence)


def _log_probabilities(logits: mx.array) -> mx.array:
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def load_draft_model(
    ref: str | Path,
    model: Model,
    *,
    dtype: mx.Dtype | str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> BlockDraftModel | MTPHead | Model:
    """What drafts for `model` (`stream_generate(draft_model=...)`): the head in a drafter's folder, as mlx-vlm splits
    one off, a DFlash or DFlash2 drafter that was made for it, or a small model with the same tokenizer. Arguments and
    errors as in `load`; all of it is in memory."""
    checks.pair("load_draft_model", model)
    if not checks.is_model(model):
        raise ArgumentError(f"load_draft_model: model is {checks.shown(model)}; give the model that it drafts for")
    checks.called("on_progress", on_progress)
    folder = find(ref, on_progress=on_progress, check=lambda offer: _check_offer(offer, model.config))
    if is_blocks(folder):
        if model.ranks_told is not None:
            raise ArgumentError(f"{ref} reads layers, which are on several ranks: let mtp or a small model draft there")
        return load_blocks(folder, model.config, dtype=dtype, on_progress=on_progress)
    if is_drafter(folder):
        return load_head(folder, model, dtype=dtype, on_progress=on_progress)
    small = load_model(folder, dtype=dtype, on_progress=on_progress)
    check_vocabulary(small.config, model.config, folder)
    check_kernels(small, wanted=model.kernels)
    return small


def _check_offer(offer: Offer, target: ModelConfig) -> None:
    if offer.blocks is not None:
        offer.blocks.check(target, offer.name)
    else:
        check_vocabulary(offer.config, target, offer.name)


def block_rows(draft: str | Path) -> int | None:
    """Rows of a block of the drafter of that name; None: it is none that drafts in blocks. Fetches nothing: what is not
    here yet may have as many as any."""
    found = look_up(draft)
    if not isinstance(found, Stored):
        return MOST_ROWS
    return read_blocks_config(found.folder).rows if is_blocks(found.folder) else None


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
    if isinstance(found, Stored) and is_blocks(found.folder):
        read_blocks_config(found.folder).check(config, str(found.folder))
        opened = open_blocks(found.folder)
        parts.append(blocks_bytes(opened.config, opened.specs, compute.size))
    elif isinstance(found, Stored) and is_drafter(found.folder):
        heads.append(found.folder)
    elif isinstance(found, Stored):
        small = read_config(found.folder)
        check_vocabulary(small, config, found.folder)
        parts.append(_small(of_source(open_source(found.folder, small), compute)))
    elif found is not None:
        offer = hub.look(found.name, found.revision, found.wanted)
        _check_offer(offer, config)
        small = offer.config
        if offer.blocks is not None:
            parts.append(blocks_bytes(offer.blocks, {}, compute.size))
        elif offer.is_drafter:
            parts.append(head_bytes(config, 1, {}, compute.size))
        else:
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
