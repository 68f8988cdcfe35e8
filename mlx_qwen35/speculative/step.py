"""One token of an answer, as it was computed.

Knows where the cache is before and after it. Knows nothing of prompts, text or drafts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx

if TYPE_CHECKING:
    from mlx_qwen35.cache import Snapshot
    from mlx_qwen35.text.parts import Told

# Who drafts: a head or a small model, what was said before, or a grammar that leaves no choice.
SOURCES = "head", "copy", "grammar"

Drawn = tuple[mx.array, mx.array]  # token [B], logprobs [B, V], both perhaps not yet computed


@dataclass(frozen=True)
class Step:
    """logprobs: [V], lazy. before: the cache as it was before it took this token; None: that is not kept, among rows
    that go on together.

    after: the cache as it was when it had taken this token and no more; None: as it is when the step is made.
    from_draft: whether it had been drafted. drafted: how many tokens were, since the step before. source: of these and
    of it, one of SOURCES; "" without drafts.
    told: what was asked for of the distribution that it comes from.
    """

    token: int
    logprobs: mx.array
    before: Snapshot | None
    after: Snapshot | None = None
    from_draft: bool = False
    drafted: int = 0
    source: str = ""
    told: Told | None = None
