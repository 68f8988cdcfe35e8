"""Which model is meant, and what belongs to it: a folder, or the demo inside the package.

Knows folders. Knows nothing of what their files hold: that is checkpoint's and processor's business.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_qwen35.checkpoint.load import load_model, read_config
from mlx_qwen35.errors import CheckpointError
from mlx_qwen35.processor import Processor

if TYPE_CHECKING:
    import mlx.core as mx

    from mlx_qwen35.model import Model

__all__ = ["demo_folder", "find", "load", "load_model", "load_processor"]


def load(
    ref: str | Path | None = None,
    *,
    dtype: mx.Dtype | str | None = None,
    context_length: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[Model, Processor]:
    """The model and the processor (tokenizer, chat template, defaults) of a checkpoint.

    ref: a folder; None is the small trained demo inside this package. dtype: to compute in; None is float32 on the
    CPU and bfloat16 on a GPU. context_length: the most tokens to allow, at most what the checkpoint allows.
    on_progress: called with (bytes read, bytes in all).
    Raises CheckpointError if there is no such folder or something in it is missing, damaged or not supported.
    """
    # The small files first: a tokenizer that is missing should not be found out after minutes of weights.
    processor = load_processor(ref, context_length=context_length)
    return load_model(find(ref), dtype=dtype, context_length=context_length, on_progress=on_progress), processor


def load_processor(ref: str | Path | None = None, *, context_length: int | None = None) -> Processor:
    """The processor alone: prompts are made, and refused, without reading a weight. Arguments and errors as in `load`.

    `load_model(find(ref), context_length=...)` is the model that belongs to it.
    """
    folder = find(ref)
    return Processor.from_folder(folder, read_config(folder, context_length))


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
    folder = Path(__file__).parent / "demo"
    if not (folder / "config.json").exists():
        raise CheckpointError(f"{folder} holds no demo checkpoint: install the package again, or give a folder")
    return folder
