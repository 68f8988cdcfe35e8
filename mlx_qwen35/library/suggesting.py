"""Names that are like a name that there is not.

Knows how models are called and what counts as alike: the same words in another order or spelling, under whatever
publisher. Looks nothing up.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

# On the Hugging Face Hub.
PUBLISHED = tuple(
    f"Qwen/{model}"
    for model in (
        *(f"Qwen3.5-{size}" for size in ("0.8B", "2B", "4B", "9B", "27B", "35B-A3B", "122B-A10B", "397B-A17B")),
        *(f"Qwen3.6-{size}" for size in ("27B", "35B-A3B")),
        *(f"Qwen3.8-{size}" for size in ("27B", "2.4T-A95B")),
    )
)
_ALIKE = 0.8  # of difflib's ratio: less is another model, not another spelling
_REST_ALIKE = 0.6  # of what follows the family and its version
_WORDS = re.compile(r"[a-z]+|\d+(?:\.\d+)?")


def alike(ref: str, names: Iterable[str], most: int = 3) -> list[str]:
    """Those of the names that may be meant by `ref`, the most alike first.

    Compared is what stands after the publisher; that decides only between models that are called the same.
    """
    publisher, _, model = ref.lower().rpartition("/")
    found = []
    for name in dict.fromkeys(names):
        theirs, _, its_model = name.lower().rpartition("/")
        if (likeness := _likeness(model, its_model)) >= _ALIKE:
            found.append((-likeness, -_ratio(publisher, theirs), name))
    whole = [each for each in found if each[0] <= -1]
    return [name for _, _, name in sorted(whole or found)[:most]]


def _likeness(asked: str, name: str) -> float:
    words, there = _WORDS.findall(asked), _WORDS.findall(name)
    if any(word.isalpha() and len(word) > 2 for word in words) and set(words) <= set(there):
        return 1 + len(words) / len(there)  # all of it is in the name
    if words[:2] == there[:2] and _ratio("".join(words[2:]), "".join(there[2:])) < _REST_ALIKE:
        return 0.0  # of one family, which makes names alike, and another size
    return _ratio("".join(words), "".join(there))


def _ratio(left: str, right: str) -> float:
    import difflib  # only where something went wrong

    return difflib.SequenceMatcher(None, left, right).ratio()
