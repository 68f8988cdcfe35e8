"""Decoding with drafts: a cheap guess at a few tokens, one look of the model at all of them, and only its word counts.

    drafters.py    who guesses: the model's own MTP head, or a small model of the same vocabulary
    blocks.py      and a block drafter, which reads some of the model's layers
    drafting.py    which of them, for one request
    lookup.py      how the end of a text went on when it was there before; text.py: of a conversation, kept for the next
    rounds.py      guess, verify, keep what is right: as many tokens as the model agrees with, and one of its own
                   (when there is a round, whose, and when a plain step, engine/drafted.py says)
    rows.py        how many tokens are verified in one call
    rejection.py   which guesses are kept, so that what is drawn is distributed as without them
    pace.py        how many to guess, from what guesses cost and how many are kept; none where it does not pay
    copying.py     the same of what is copied, by how long the match is

Knows one sequence at a time. Knows nothing of text and prompts. docs/SPECULATIVE.md has the why.
"""

from mlx_qwen35.speculative.drafters import Drafter, Tapped
from mlx_qwen35.speculative.drafting import Drafting, most_of
from mlx_qwen35.speculative.pace import check_count
from mlx_qwen35.speculative.text import Text

__all__ = ["Drafter", "Drafting", "Tapped", "Text", "check_count", "most_of"]
