"""The IPython that this runs in, if any: what it can show, and which cell is running."""

from __future__ import annotations

import sys
from typing import Any

from mlx_qwen35.errors import Qwen35Error


class DisplayError(Qwen35Error):
    """What was asked cannot be shown here."""


def running() -> Any:
    """IPython's shell, or None: it is there only if IPython was imported, by itself."""
    return sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None


def is_rich() -> bool:
    """Whether this is a notebook, or another front end that shows more than text."""
    return hasattr(running(), "kernel")


def cell() -> int | None:
    """The number of the cell that is running, None outside of IPython."""
    return getattr(running(), "execution_count", None)


def show(bundle: dict[str, str], *, updatable: bool = False) -> Any:
    """Shows {mime type: text}; updatable: returns a handle for `update`."""
    try:
        from IPython.display import display
    except ImportError as error:
        raise DisplayError(
            "IPython is not installed, so nothing can be shown as in a notebook: pip install ipython, "
            'or display="text"'
        ) from error
    return display(bundle, raw=True, display_id=True if updatable else None)


def update(handle: Any, bundle: dict[str, str]) -> None:
    """Shows something else in the place of what `show` has shown."""
    if handle is not None:  # a shell without displays gives none
        handle.update(bundle, raw=True)
