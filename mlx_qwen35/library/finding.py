"""From a name to a folder.

Knows folders and the demo inside the package. Knows nothing of what their files hold: that is checkpoint's and
processor's business.
"""

from __future__ import annotations

from pathlib import Path

import mlx_qwen35
from mlx_qwen35.errors import CheckpointError


def find(ref: str | Path | None) -> Path:
    """The folder that `ref` names; raises CheckpointError if there is none."""
    if ref is None:
        return demo_folder()
    folder = Path(ref).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{folder} is a file: give the folder that holds config.json and the weights")
    raise CheckpointError(
        f"{ref} is no folder on this machine. Names of the Hugging Face Hub are not looked up yet: download the "
        f"checkpoint (`hf download PUBLISHER/MODEL --local-dir DIR`) and give DIR"
    )


def demo_folder() -> Path:
    """The checkpoint inside the package; raises CheckpointError if this installation was built without it."""
    folder = Path(mlx_qwen35.__file__).parent / "demo"
    if not (folder / "config.json").exists():
        raise CheckpointError(f"{folder} holds no demo checkpoint: install the package again, or give a folder")
    return folder
