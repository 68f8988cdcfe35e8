"""Experts that stay in the files of a checkpoint: which layers', and the banks that read them.

Knows how a Source and a StreamPlan become banks. What is in memory is theirs to say.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx

from mlx_qwen35.checkpoint.expert_files import expert_layouts, fingerprint
from mlx_qwen35.checkpoint.share import Share
from mlx_qwen35.checkpoint.source import Source
from mlx_qwen35.errors import CheckpointError
from mlx_qwen35.experts.budget import StreamPlan
from mlx_qwen35.experts.hot_list import HotList
from mlx_qwen35.experts.layout import LayerLayout
from mlx_qwen35.experts.pool import ExpertPool
from mlx_qwen35.experts.reader import Reader
from mlx_qwen35.experts.streamed import StreamedExperts
from mlx_qwen35.model import Model


def experts_of(layer: int) -> str:
    """What the names of our tensors of a layer's experts begin with."""
    return f"layers.{layer}.mlp.experts."


def streamed_layouts(source: Source, plan: StreamPlan, share: Share | None = None) -> dict[int, LayerLayout]:
    """Where the experts lie of those layers that do not have them all in memory, of a share its own; raises
    CheckpointError."""
    moe = source.config.text.moe
    if moe is None:
        raise CheckpointError(f"{source.folder} has no experts to stream: leave the plan out")
    if len(plan.slots) != source.config.text.num_hidden_layers:
        raise ValueError(f"the plan has {len(plan.slots)} layers, {source.folder} has others")
    found = expert_layouts(source) if share is None else share.layouts(expert_layouts(source))
    for number, layout in found.items():
        least = min(moe.experts_per_token, layout.num_experts)
        if plan.slots[number] < least:
            raise ValueError(f"the plan has {plan.slots[number]} slots in layer {number}; a token needs {least}")
    return {number: layout for number, layout in found.items() if plan.slots[number] < layout.num_experts}


def stream_experts(
    model: Model,
    source: Source,
    plan: StreamPlan,
    layouts: Mapping[int, LayerLayout],
    dtype: mx.Dtype,
    hot_lists: Path | None,
    *,
    prefetch: bool = True,
) -> None:
    """Give these layers of a model, whose other weights are loaded, banks that read from the files.

    hot_lists: the folder of the lists for warm starts; None: without one. prefetch: whether guesses may be read ahead.
    """
    if not layouts:
        return
    hot_list = None if hot_lists is None else HotList(hot_lists, fingerprint(layouts))
    pool = ExpertPool(Reader(layouts), plan, prefetch=prefetch, hot_list=hot_list)
    try:
        banks = {}
        for number, layout in layouts.items():
            start = experts_of(number)
            specs = {name.removeprefix(start): s for name, s in source.specs.items() if name.startswith(start)}
            banks[number] = StreamedExperts(pool, layout, specs, plan.slots[number], dtype)
        model.stream_experts(pool, banks)
        pool.warm_up()
    except BaseException:
        pool.close()
        raise
