"""What is to draft for a request: which drafter, how many tokens, and whether what was said is copied.

Knows what there is that drafts, and which of it goes with which model. How each guesses is known to drafters.py
and blocks.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlx_qwen35.blocks.drafter import BlockDraftModel
from mlx_qwen35.model.mtp import MTPHead
from mlx_qwen35.speculative.blocks import BlockDrafter
from mlx_qwen35.speculative.drafters import Drafter, HeadDrafter, ModelDrafter
from mlx_qwen35.speculative.pace import MOST, Pace, check_count
from mlx_qwen35.speculative.rows import most_rows
from mlx_qwen35.speculative.text import Text

if TYPE_CHECKING:
    from mlx_qwen35.cache import Cache
    from mlx_qwen35.model import Model

USUAL = 3  # drafts at the most where nobody says how many, and each is a pass of what drafts


def most_of(draft_model: BlockDraftModel | MTPHead | Model | None) -> tuple[int, int]:
    """(drafts at the most where nobody says how many, and where somebody does)."""
    if isinstance(draft_model, BlockDraftModel):
        return draft_model.config.usual_rows - 1, draft_model.config.rows - 1
    return USUAL, MOST


@dataclass(frozen=True)
class Drafting:
    """What is to draft: a head for the model, a block drafter for it, or a model with the same vocabulary; None: none
    of them. most, steady: as Pace has them. lookup: whether what was said before is copied."""

    draft_model: BlockDraftModel | MTPHead | Model | None
    most: int
    steady: bool = False
    lookup: bool = False

    def check(self, model: Model) -> None:
        """Raises ValueError if it cannot draft for this model."""
        check_count(self.most, most_of(self.draft_model)[1])
        if self.draft_model is None or isinstance(self.draft_model, MTPHead):
            return
        if isinstance(self.draft_model, BlockDraftModel):
            self.draft_model.config.check(model.config, "the drafter")
            if getattr(model, "ranks_told", None) is not None:
                raise ValueError("a block drafter reads layers, which are on several ranks: let mtp draft there")
            return
        sizes = [each.config.text.vocab_size for each in (self.draft_model, model)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"the draft model has {sizes[0]} tokens and the model {sizes[1]}: a draft model needs the same "
                "tokenizer, so take a smaller one of the same release"
            )

    def text(self, model: Model, tokens: Sequence[int]) -> Text | None:
        """What copies are made from, for an answer to a prompt of these tokens; None: nothing."""
        if not self.lookup:
            return None
        config = model.config
        gaps = [getattr(config, name, None) for name in ("image_token_id", "video_token_id")]
        return Text(model, tokens, [token for token in gaps if token is not None], fresh=self.steady)

    def drafter(self, model: Model, cache: Cache) -> Drafter | None:
        """The one that follows a cache already, if it is this one and knows all its tokens; otherwise a new one."""
        if self.draft_model is None:
            return None
        kept, pace = cache.draft, self._pace(model)
        if isinstance(kept, Drafter) and kept.serves(self.draft_model, cache):
            if (kept.pace.most, kept.pace.steady) != (pace.most, pace.steady):
                kept.pace = pace
            return kept
        kinds = {MTPHead: HeadDrafter, BlockDraftModel: BlockDrafter}
        kind = next((kinds[made] for made in kinds if isinstance(self.draft_model, made)), ModelDrafter)
        return kind(model, cache, pace, self.draft_model)

    def _pace(self, model: Model) -> Pace:
        """Of no more drafts than a call verifies: what is never tried would never be given up."""
        most, limit = min(self.most, most_rows(model) - 1), most_of(self.draft_model)[1]
        return Pace(most, steady=self.steady, limit=limit)
