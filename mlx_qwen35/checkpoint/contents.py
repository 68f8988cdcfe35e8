"""What lies at a path, before it is held against the configuration: config.json, files, names, and who quantized them.

Knows where each of these is found, in a folder of safetensors files or in a GGUF. Reads headers and no weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mlx_qwen35.checkpoint import files
from mlx_qwen35.checkpoint.beside import with_tower
from mlx_qwen35.checkpoint.files import TensorFiles
from mlx_qwen35.checkpoint.forms import hadamard
from mlx_qwen35.checkpoint.forms.face import Form
from mlx_qwen35.checkpoint.forms.table import find_form, form_beside
from mlx_qwen35.checkpoint.gguf.choosing import is_gguf
from mlx_qwen35.checkpoint.gguf.opened import open_model
from mlx_qwen35.checkpoint.names import MLX, MTP_PREFIXES, TARGET, TOWERS, Layout, find_layout
from mlx_qwen35.config import ModelConfig
from mlx_qwen35.errors import CheckpointError


@dataclass(frozen=True)
class Contents:
    """A checkpoint as it lies there. form: how another tool quantized it; None: MLX did, or nobody."""

    path: Path
    config: ModelConfig
    files: TensorFiles
    layout: Layout
    form: Form | None


def read_config(path: str | Path) -> ModelConfig:
    """The configuration of a checkpoint; raises CheckpointError where it is missing, damaged or not supported."""
    path = Path(path)
    return open_model(path).config if is_gguf(path) else ModelConfig.from_folder(path)


def open_contents(path: str | Path, config: ModelConfig | None = None) -> Contents:
    """Look at what lies at a path. config: what read_config() gave, where it was read already.

    Raises CheckpointError for damaged files, and for forms and layouts that are not read.
    """
    path = Path(path)
    config = config or read_config(path)
    if is_gguf(path):
        opened = open_model(path)
        found = TensorFiles(opened.gguf.path.parent, opened.form.entries(), {})
        return Contents(path, config, found, TARGET, opened.form)
    form = hadamard.read_config(config.raw, str(path / "config.json")) or find_form(config, str(path / "config.json"))
    found = with_tower(files.open_folder(path), config.raw)
    form = form or form_beside(path, config, found.entries)
    layout = _layout(found, form)
    if form and form.endings and (layout.kind == MLX or layout.packed):  # without endings, names are MLX's
        said = (config.source_quantization or {}).get("quant_method", form.name)
        raise CheckpointError(
            f"{path / 'config.json'} says quant_method {said!r:.40}, but the files "
            "have MLX's layout: restore the config.json that came with them, or convert the original again"
        )
    return Contents(path, config, found, layout, form)


def _layout(found: TensorFiles, form: Form | None) -> Layout:
    """Markers count of those files only that hold something of the text model: a tower may be another writer's."""
    main = [entry for name, entry in found.entries.items() if not name.startswith((*TOWERS, *MTP_PREFIXES))]
    holding = {file.relative_to(found.folder).as_posix() for file in {entry.file for entry in main}}
    formats = [found.formats[name] for name in found.formats if name in holding]
    convolutions = {entry.shape for entry in main if entry.name.endswith("linear_attn.conv1d.weight")}
    return find_layout(found.entries, formats, str(found.folder), convolutions, form.endings if form else ())
