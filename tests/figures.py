"""The figures of docs/EXACTNESS.md: measured by the tests, printed at their end, and held to three times that.

A figure is the largest difference that any test of its kind saw. Knows names and numbers only.
"""

from __future__ import annotations

PAGE = "docs/EXACTNESS.md"
# What that page says, in the units of the logits (or features) of the models compared.
CLAIMED = {
    "logits of 20 random models against transformers (tests/golden)": 6.8e-4,
    "the same, rows of unequal length padded on the left": 5.8e-4,
    "logits against mlx-lm on its own files (tests/peers)": 1.3e-3,
    "features of pictures and videos against transformers": 1.4e-5,
    "logits of prompts with pictures and videos against transformers": 9.2e-4,
}
WHOLE, PADDED, PEERS, FEATURES, SEEING = CLAIMED
measured: dict[str, float] = {}


def hold(name: str, difference: float) -> None:
    """Notes a difference; it may be three times what is claimed, and 2e-3 at the most: processors and BLAS libraries
    round differently."""
    measured[name] = max(measured.get(name, 0.0), difference)
    assert difference <= min(3 * CLAIMED[name], 2e-3), f"{name}: {difference:.2e}, and {PAGE} says {CLAIMED[name]:.1e}"


def lines() -> list[str]:
    """One for each figure that was measured."""
    return [f"{name}: {measured[name]:.1e} ({PAGE}: {CLAIMED[name]:.1e})" for name in CLAIMED if name in measured]
