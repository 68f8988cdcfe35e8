"""A catalogue of two models that loads nothing, for the tests of interfaces."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mlx_qwen35.library.listing import LocalModel
from mlx_qwen35.serving.catalogue import Listed, found

NOW = 1_764_000_000.0


def stored(name: str, architecture: str, parameters: int, *, vision: bool) -> LocalModel:
    """What the library says of a model."""
    return LocalModel(
        name=name,
        folder=Path("/nowhere") / name,
        place="LM Studio",
        architecture=architecture,
        nbytes=parameters // 2,
        parameters=parameters,
        quantization="4-bit",
        group_size=64,
        bits_per_weight=4.5,
        vision=vision,
        mtp=False,
        context_length=262_144,
        missing=(),
        problem=None,
    )


class Shelf:
    """asked: what was loaded and unloaded, with what."""

    def __init__(self) -> None:
        self.asked: list[tuple] = []
        self._models = {
            "org/Qwen3.5-35B-A3B-4bit": Listed(
                "org/Qwen3.5-35B-A3B-4bit", stored("org/x", "moe", 35_100_000_000, vision=True)
            ),
            "org/Qwen3.5-2B-4bit": Listed("org/Qwen3.5-2B-4bit", stored("org/y", "dense", 2_300_000_000, vision=False)),
        }

    def models(self) -> Sequence[Listed]:
        return list(self._models.values())

    async def load(self, name: str, ttl: float | None = None, context_length: int | None = None) -> Listed:
        listed = found(self, name)
        self.asked.append(("load", listed.name, ttl, context_length))
        loaded = replace(
            listed,
            state="loaded",
            since=NOW,
            used=NOW + 60,
            ttl=math.inf if ttl is None else ttl,
            context_length=context_length or 262_144,
            nbytes=listed.stored.nbytes,
            parallel=8,
        )
        self._models[listed.name] = loaded
        return loaded

    async def unload(self, name: str) -> None:
        listed = found(self, name)
        self.asked.append(("unload", listed.name))
        self._models[listed.name] = Listed(listed.name, listed.stored)
