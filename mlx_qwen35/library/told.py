"""What config.json alone says that a model takes, where no weights are on this machine.

Knows how quantizations are told there. The arithmetic is footprint.py's, what follows from it holding.py's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import mlx.core as mx

from mlx_qwen35.blocks.config import BlockConfig
from mlx_qwen35.checkpoint.blocks import blocks_tensors
from mlx_qwen35.checkpoint.forms.table import find_form
from mlx_qwen35.checkpoint.inventory import is_linear, mtp_tensors, text_tensors, vision_tensors
from mlx_qwen35.checkpoint.names import TARGET
from mlx_qwen35.checkpoint.source import spec_of
from mlx_qwen35.config import ModelConfig, QuantSpec
from mlx_qwen35.conversion.recipes import role
from mlx_qwen35.errors import CheckpointError
from mlx_qwen35.library.footprint import (
    CACHE_STEP,
    CHUNK_SIZE,
    Specs,
    cache_at,
    cache_bytes,
    feeding_bytes,
    mixing_bytes,
    tensor_bytes,
)
from mlx_qwen35.library.holding import Demand, process_bytes
from mlx_qwen35.model.mtp import PRIME_AT_ONCE


def told_specs(config: ModelConfig) -> Specs:
    """How config.json alone says that modules are quantized."""
    linear = {n: s for n, s in text_tensors(config).items() if is_linear(n, s)}
    if config.quantization is not None:
        told = {n.removesuffix(".weight"): spec_of(config, _path(n)) for n in linear}
        return {m: s for m, s in told.items() if s and linear[f"{m}.weight"][-1] % s.group_size == 0}
    form = find_form(config, "config.json")
    spec = form.spec if form else None
    if spec is not None:
        # Which modules are packed only the files know; the official ones leave all but these as they were.
        return {m: spec for m in (n.removesuffix(".weight") for n in linear) if role(m) in ("experts", "mlp")}
    return {}


def _path(name: str) -> str:
    return TARGET.source(name).names[0].removesuffix(".weight")


def told_demand(config: ModelConfig, specs: Specs, compute: mx.Dtype, folder: Path | None = None) -> Demand:
    """The demand of a checkpoint of which no weights are here: two of the largest tensor, as memory has it, at once.

    folder: where its tokenizer is, if it is here.
    """
    loading, loading_layer = 0, 0
    for name, shape in (text_tensors(config) | vision_tensors(config)).items():
        taken = 2 * tensor_bytes(name, shape, specs.get(name.removesuffix(".weight")), compute.size)
        if ".mlp.experts." in name:
            loading_layer = max(loading_layer, taken)
        else:
            loading = max(loading, taken)
    gpu = mx.default_device().type == mx.gpu
    demand = Demand(config, specs, compute.size, loading, loading_layer, process_bytes(folder), gpu)
    form = find_form(config, "config.json")
    return replace(demand, streamable=form is None or form.streams)


def told_head(config: ModelConfig, compute: mx.Dtype, where: str) -> Callable[[int], int]:
    """Tokens of context -> bytes of the model's MTP head, which conversions leave unquantized; where: for errors.

    Raises CheckpointError where config.json has none.
    """
    layers = config.text.mtp_num_hidden_layers
    if not layers:
        raise CheckpointError(f"{where} has no MTP layer, by its config.json: leave --mtp (mtp=True) out")
    return head_bytes(config, layers, {}, compute.size)


def blocks_bytes(config: BlockConfig, specs: Mapping[str, QuantSpec], itemsize: int) -> Callable[[int], int]:
    """Tokens of context -> bytes of a block drafter: its weights, its windows, and what a chunk of a prompt makes."""
    weights = sum(
        tensor_bytes(name, shape, specs.get(name.removesuffix(".weight")), itemsize)
        for name, shape in blocks_tensors(config).items()
    )
    position = 2 * config.kv_heads * config.head_dim * itemsize
    chunk = (2 * len(config.taps) + 2) * config.hidden_size * itemsize  # outputs of layers, and those side by side

    def needed(tokens: int) -> int:
        held = sum(tokens if most is None else min(tokens, most) + CACHE_STEP for most in config.windows)
        return weights + position * held + chunk * min(tokens, CHUNK_SIZE)

    return needed


def head_bytes(
    config: ModelConfig, layers: int, specs: Mapping[str, QuantSpec], itemsize: int
) -> Callable[[int], int]:
    """Tokens of context -> bytes of an MTP head of so many layers. specs: by names mtp.*."""
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
