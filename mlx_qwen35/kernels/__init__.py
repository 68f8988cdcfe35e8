"""One folder per operation: reference.py in plain MLX, and a dispatch that takes the fastest form at hand."""

from __future__ import annotations


def checked() -> dict[str, str | None]:
    """Kernels that were checked on this machine with these versions: name -> what is wrong with one, None: nothing."""
    from .verdicts import checked

    return checked()
