"""A prompt as the store looks at it, made once: it is asked for again and again while it waits.

Knows tokens and what they show. Knows nothing of what was computed.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mlx_qwen35.session.timeline import Shown, placed
from mlx_qwen35.session.tree import key_of

if TYPE_CHECKING:
    from mlx_qwen35.model import Model
    from mlx_qwen35.processor import Prompt

@dataclass(frozen=True)
class Asked:
    """key: as tree.key_of makes it; shown: where each image and video begins."""

    prompt: Prompt
    key: np.ndarray
    shown: tuple[Shown, ...]


class Prompts:
    """Those that were asked for and have not begun. None is kept alive, with all its pixels, by having been here."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._asked: dict[int, tuple[weakref.ref[Prompt], np.ndarray, tuple[Shown, ...]]] = {}  # by identity

    def of(self, prompt: Prompt) -> Asked:
        """What a prompt is made of."""
        self._asked = {key: known for key, known in self._asked.items() if known[0]() is not None}
        known = self._asked.get(id(prompt))
        if known is None:
            shown = tuple((start, medium) for start, _, medium in placed(self._model, prompt))
            known = weakref.ref(prompt), key_of(prompt.tokens, shown), shown
            self._asked[id(prompt)] = known
        return Asked(prompt, *known[1:])

    def begun(self, prompt: Prompt) -> None:
        """It is not asked for any more."""
        self._asked.pop(id(prompt), None)
