"""A rank's share of a LoRA adapter: cut as the weights are that it goes beside, so that no further message is needed.

Knows adapters and cuts. Knows no files.

    W cut by rows       y_r = W_r x + s (x A) B_r      B by its columns; every rank has A
    W cut by columns    y_r = W_r x_r + s (x_r A_r) B  A by its rows; the sum over the ranks is there already
    experts             A and B of the experts that are here
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace

import mlx.core as mx

from mlx_qwen35.checkpoint.adapters import EMBEDDING, Adapter, check_loadable, fitted
from mlx_qwen35.config import ModelConfig
from mlx_qwen35.errors import CheckpointError
from mlx_qwen35.parallel.cuts import WHOLE, Cut, cut_of
from mlx_qwen35.parallel.plan import Plan

_CHUNK = 1 << 20


def adapter_identity(adapter: Adapter) -> str:
    """Equal for copies of one adapter, wherever they lie."""
    made = hashlib.blake2b(digest_size=16)
    for path in adapter.files:
        with open(path, "rb") as file:
            while chunk := file.read(_CHUNK):
                made.update(chunk)
    return made.hexdigest()


def adapter_share(adapter: Adapter, config: ModelConfig, plan: Plan, rank: int) -> Adapter:
    """What of it a rank puts on; empty where it has none of what is adapted.

    Raises CheckpointError where the adapter is not of a model of this config, or cannot be cut so.
    """
    adapter = fitted(adapter, config)
    check_loadable(adapter, config)
    full, tensors = adapter.kind == "full", {}
    for name, leaves in adapter.tensors.items():
        cut = cut_of(name if full else f"{name}.weight", config, plan, rank)
        if cut is not None:
            tensors[name] = {"": _part(leaves[""], cut)} if full else _cut(name, leaves, cut, adapter)
    whole = {name: (value, cut_of(name, config, plan, rank)) for name, value in adapter.whole.items()}
    parts = {name: _part(value, cut) for name, (value, cut) in whole.items() if cut is not None}
    mx.eval(tensors, parts)
    return replace(adapter, tensors=tensors, whole=parts)


def _cut(name: str, leaves: Mapping[str, mx.array], cut: Cut, adapter: Adapter) -> dict[str, mx.array]:
    if cut == WHOLE or name == EMBEDDING:
        return dict(leaves)
    found = dict(leaves)
    if leaves["lora_a"].ndim == 3:
        return {leaf: _part(value, cut) for leaf, value in leaves.items()}
    if cut.rows is not None:
        found["lora_b"] = mx.concatenate([leaves["lora_b"][:, start:stop] for start, stop in cut.rows], axis=1)
        if "m" in leaves:
            found["m"] = _part(leaves["m"], cut)
    if cut.columns is not None:
        if "m" in leaves:
            raise CheckpointError(
                f"the adapter {adapter.folder} is DoRA, which needs whole rows of {name}, and the tensor plan cuts "
                "them: take the plan experts or pipeline, or merge it first (fuse)"
            )
        found["lora_a"] = _part(leaves["lora_a"].T, Cut(columns=cut.columns)).T
    return found


def _part(value: mx.array, cut: Cut) -> mx.array:
    if cut.rows is not None:
        value = mx.concatenate([value[start:stop] for start, stop in cut.rows])
    if cut.columns is not None:
        first, stop, count = cut.columns
        width = value.shape[-1]
        value = value[..., width * first // count : width * stop // count]
    return value
