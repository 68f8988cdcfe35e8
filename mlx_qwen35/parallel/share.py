"""What of a checkpoint a rank reads and builds, and what that takes.

Knows plans, cuts and sources. Computes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from mlx_qwen35.checkpoint.adapters import Adapter
from mlx_qwen35.checkpoint.part import AnyPart
from mlx_qwen35.config import ModelConfig
from mlx_qwen35.experts.layout import LayerLayout
from mlx_qwen35.model import Model
from mlx_qwen35.parallel.adapted import adapter_share
from mlx_qwen35.parallel.cuts import WHOLE, cut_of
from mlx_qwen35.parallel.group import Group
from mlx_qwen35.parallel.model import RanksModel
from mlx_qwen35.parallel.part import CutPart
from mlx_qwen35.parallel.plan import Plan


class RankShare:
    """One rank's, as checkpoint/load.py asks for it. made: what kind of model."""

    def __init__(self, config: ModelConfig, plan: Plan, group: Group, made: type[RanksModel] = RanksModel) -> None:
        self._config, self._plan, self._group, self._made = config, plan, group, made

    def model(self, config: ModelConfig) -> Model:
        return self._made(config, self._plan, self._group)

    def parts(self, parts: Iterable[AnyPart]) -> list[AnyPart]:
        found = []
        for part in parts:
            cut = cut_of(part.ours, self._config, self._plan, self._group.rank)
            if cut is not None:
                found.append(part if cut == WHOLE else CutPart(part, cut))
        return found

    def adapter(self, adapter: Adapter) -> Adapter:
        """As adapter_share; none of checkpoint/load.py's business."""
        return adapter_share(adapter, self._config, self._plan, self._group.rank)

    def layouts(self, layouts: Mapping[int, LayerLayout]) -> dict[int, LayerLayout]:
        first, stop = self._plan.shares[self._group.rank]
        if self._plan.kind == "pipeline":
            return {number: layout for number, layout in layouts.items() if first <= number < stop}
        return {number: layout.part(first, stop) for number, layout in layouts.items()}


def geometry(config: ModelConfig, plan: Plan, rank: int) -> ModelConfig:
    """A model of the size of a rank's share, to plan its memory by: of a pipeline its layers, else its experts."""
    text = config.text
    first, stop = plan.shares[rank]
    if plan.kind == "pipeline":
        kinds = text.layer_types[first:stop]
        text = replace(text, layer_types=kinds, num_hidden_layers=len(kinds))
    elif text.moe is not None:
        count = stop - first
        per_token = min(text.moe.experts_per_token, count)
        text = replace(text, moe=replace(text.moe, num_experts=count, experts_per_token=per_token))
    return replace(config, text=text, vision=config.vision if rank == 0 else None)
