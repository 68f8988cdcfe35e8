"""The models that a server may load, by name: those that were named, or all that lie on this machine.

Knows names and folders, and what a client may call a model. Knows nothing of loading.
"""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_qwen35.library.finding import find
from mlx_qwen35.library.listing import described, list_models
from mlx_qwen35.library.stored import Stored
from mlx_qwen35.serving.catalogue import Listed

if TYPE_CHECKING:
    from mlx_qwen35.library.listing import LocalModel
    from mlx_qwen35.processor import Processor
    from mlx_qwen35.serving.loaded import Loaded


@dataclass(eq=False)
class Place:
    """A model that may be loaded, and is or is not. asked: what it was called where the server was told of it.

    busy: answers that it is needed for, and requests that wait for it. used: when it last was, of time.monotonic.
    ttl: idle seconds that it stays. share: of the model that is loaded, while it is. context_length: another than the
    server's own. processor: its own, where prompts were counted without it.
    """

    name: str
    folder: Path
    stored: LocalModel
    asked: str | None = None
    loaded: Loaded | None = None
    loading: asyncio.Task[Loaded] | None = None
    share: float = 0.0
    busy: int = 0
    used: float = field(default_factory=time.monotonic)
    used_at: float | None = None  # seconds since 1970
    ttl: float = math.inf
    expiry: asyncio.TimerHandle | None = None
    context_length: int | None = None
    processor: Processor | None = None

    def listed(self, parallel: int) -> Listed:
        """As interfaces see it. parallel: answers at once."""
        if self.loaded is None:
            return Listed(self.name, self.stored, "not-loaded" if self.loading is None else "loading", busy=self.busy)
        return Listed(
            self.name,
            self.stored,
            "loaded",
            since=self.loaded.since,
            used=self.used_at,
            ttl=self.ttl,
            busy=self.busy,
            context_length=self.loaded.context_length,
            nbytes=self.loaded.nbytes,
            parallel=parallel,
        )


def named(
    models: Sequence[str | Path], on_progress: Callable[[int, int], None] | None = None, *, mtp: bool = False
) -> list[Place]:
    """Places of models that were named, in this order; what is not on this machine is downloaded, with mtp their heads
    too. Raises CheckpointError for what cannot be found."""
    places: list[Place] = []
    for ref in models:
        folder = find(ref, on_progress=on_progress)
        if mtp:
            from mlx_qwen35.library.hub import complete_head

            complete_head(folder, on_progress)
        name = _short(ref, folder)
        if any(place.name.lower() == name.lower() for place in places):
            name = str(ref)
        places.append(Place(name, folder, described(name, Stored(name, folder, "folder")), asked=str(ref)))
    return places


def on_this_machine(known: Iterable[Place] = ()) -> list[Place]:
    """Places of all models that lie here and can be loaded; those of `known` stay the same objects, and stay here as
    long as they are in use."""
    by_name = {place.name: place for place in known}
    here = [model for model in list_models() if model.complete]
    found = [by_name.pop(model.name, None) or Place(model.name, model.folder, model) for model in here]
    return [*found, *(place for place in by_name.values() if place.busy or place.loaded is not None)]


def _short(ref: str | Path, folder: Path) -> str:
    """What a model is called by clients: a folder or GGUF by its last name, which tells nothing of this machine."""
    text = os.fspath(ref)
    path = os.path.expanduser(text)
    if text.startswith((".", "~", os.sep)) or (os.sep in text and os.path.exists(path)) or not isinstance(ref, str):
        return os.path.basename(os.path.abspath(path)).removesuffix(".gguf") or folder.name
    return text.strip()
