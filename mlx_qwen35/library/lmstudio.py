"""Where LM Studio keeps its models.

Knows LM Studio's home and its models folder, <home>/models/<publisher>/<model>/, exactly two levels. Knows nothing of
what the files in there hold, and changes nothing.
"""

from __future__ import annotations

import json
from pathlib import Path


def home() -> Path:
    """LM Studio's folder, whether or not it is there: ~/.lmstudio-home-pointer names it, or it is one of the two."""
    user = Path.home()
    try:
        pointed = (user / ".lmstudio-home-pointer").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        pointed = ""
    if pointed:
        return Path(pointed).expanduser()
    old = user / ".cache" / "lm-studio"
    return old if old.is_dir() else user / ".lmstudio"


def models_folder() -> Path:
    """The folder of <publisher>/<model>/, whether or not it is there; `downloadsFolder` in settings.json moves it."""
    folder = home()
    try:
        settings = json.loads((folder / "settings.json").read_bytes())
        moved = settings.get("downloadsFolder")
    except (OSError, ValueError, RecursionError, AttributeError):
        moved = None
    return Path(moved).expanduser() if isinstance(moved, str) and moved.strip() else folder / "models"
