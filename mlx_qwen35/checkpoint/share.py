"""The face of a share of a model, which one of several machines reads. parallel/share.py has those that there are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

from mlx_qwen35.checkpoint.part import AnyPart
from mlx_qwen35.config import ModelConfig
from mlx_qwen35.experts.layout import LayerLayout
from mlx_qwen35.model import Model


class Share(Protocol):
    """What of a model is read where several machines have it together (parallel/share.py)."""

    def model(self, config: ModelConfig) -> Model:
        """With the layers and experts of the share, and no others."""
        ...

    def parts(self, parts: Iterable[AnyPart]) -> list[AnyPart]:
        """Those that it has something of, each as far as it does."""
        ...

    def layouts(self, layouts: Mapping[int, LayerLayout]) -> dict[int, LayerLayout]:
        """Of the experts that are its own."""
        ...
