"""How long a context a checkpoint is read with, up to its own length or beyond it with YaRN.

Knows what the model cards of Qwen3.5 say about that. Knows no files.
"""

from __future__ import annotations

import math
from dataclasses import replace
from numbers import Integral
from pathlib import Path

from mlx_qwen35.config import ModelConfig, Yarn
from mlx_qwen35.errors import ArgumentError, CheckpointError

NATIVE, STRETCHED = 262_144, 1_010_000  # of the published models
FURTHEST = 4  # times the native length, for others


def longest_context(config: ModelConfig) -> int:
    """The most tokens that a checkpoint can be read with, YaRN included."""
    native = config.text.max_position_embeddings
    if config.text.rope.yarn is not None:
        return native
    return STRETCHED if native == NATIVE else FURTHEST * native


def with_context(
    config: ModelConfig, context_length: int | None, *, yarn: bool = False, where: str | Path = "config.json"
) -> ModelConfig:
    """The config with room for `context_length` tokens (None: what it says); where: named in errors.

    yarn: where that is more than the model was made for, stretch its positions 2, 3 or 4 times, as far as is needed.
    Raises CheckpointError where it does not reach, or reaches only with YaRN and that is not asked for.
    """
    native, most = config.text.max_position_embeddings, longest_context(config)
    if context_length is None:
        if yarn:
            raise ArgumentError("yarn stretches positions to a context_length: give it, with how many tokens you need")
        return config
    if isinstance(context_length, bool) or not isinstance(context_length, Integral) or context_length < 1:
        raise ArgumentError(f"context_length is {context_length!r}; give a number of tokens, at most {native}")
    if context_length > most:
        raise CheckpointError(f"{where} allows {native:,} tokens, and up to {most:,} with YaRN, not {context_length:,}")
    rope = config.text.rope
    if context_length > native:
        if not yarn:
            raise CheckpointError(
                f"{where} allows {native:,} tokens (max_position_embeddings), not {context_length:,}. With YaRN it "
                f"reaches {most:,} (yarn=True, --yarn): positions are stretched, which changes every answer, those to "
                f"short prompts too and a little for the worse; so leave it out where {native:,} tokens do"
            )
        rope = replace(rope, yarn=Yarn(float(math.ceil(context_length / native)), native))
    return replace(config, text=replace(config.text, max_position_embeddings=context_length, rope=rope))
