"""Files that publishers put beside a model's shards and no index names: a vision tower, an MTP layer.

Knows their places by who writes them, and the keys of config.json that name one. Reads no weight.

    optiq/optiq_vision.safetensors, optiq_vision.safetensors    OptiQ's vision tower
    mtp/weights.safetensors                                     this package's MTP layer, and mlx-serve's
    optiq/mtp.safetensors, mtp.safetensors                      OptiQ's; MTPLX's and OptiQ's older ones
    mtp/model.safetensors, model-mtp.safetensors                Rapid-MLX's; others'
    model_extra_tensors.safetensors                             AutoRound's
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_qwen35.checkpoint import files
from mlx_qwen35.checkpoint.files import TensorFiles
from mlx_qwen35.checkpoint.names import TOWERS

MTP_FILE = Path("mtp") / "weights.safetensors"
TOWER_FILES = ("optiq/optiq_vision.safetensors", "optiq_vision.safetensors")
MTP_FILES = (
    MTP_FILE.as_posix(), "optiq/mtp.safetensors", "mtp.safetensors", "mtp/model.safetensors", "model-mtp.safetensors",
    "model_extra_tensors.safetensors",
)  # fmt: skip
# What config.json says of these files: no word of a conversion, which has them elsewhere and otherwise.
KEYS = (
    "optiq_vision", "mlx_lm_extra_tensors", "mtp_file", "mtplx_mtp_quantization", "mtplx_mtp", "mtplx_mtp_contract",
    "mtplx_mtp_norm_encoding", "mtp_norm_encoding", "mtplx_runtime",
)  # fmt: skip


def tower_file(raw: Mapping[str, Any], there: Container[str]) -> str | None:
    """The file that holds a vision tower outside of the shards. raw: config.json; there: the names of files."""
    return next((name for name in (*_named(raw, ("optiq_vision", "sidecar")), *TOWER_FILES) if name in there), None)


def named_mtp_file(raw: Mapping[str, Any]) -> str | None:
    """The file that config.json names as the MTP layer's."""
    return next(iter(_named(raw, ("mlx_lm_extra_tensors", "mtp_file"), ("mtp_file",))), None)


def mtp_files(raw: Mapping[str, Any], there: Container[str]) -> list[str]:
    """The files that may hold the MTP layer: the one that config.json names, or else all that are there."""
    named = named_mtp_file(raw)
    if named in there:
        return [named]
    return [name for name in MTP_FILES if name in there]


class Folder(Container[str]):
    """The names of a folder's files, those in folders below it too."""

    def __init__(self, folder: Path):
        self._folder = folder

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and (self._folder / name).is_file()


def with_tower(found: TensorFiles, raw: Mapping[str, Any]) -> TensorFiles:
    """The files with the vision tower that lies beside them, where config.json describes one and they have none."""
    if not raw.get("vision_config") or any(name.startswith(TOWERS) for name in found.entries):
        return found
    beside = tower_file(raw, Folder(found.folder))
    if beside is None:
        return found
    tower = files.open_file(found.folder / beside).entries
    new = {name: entry for name, entry in tower.items() if name.startswith(TOWERS)}
    return replace(found, entries=found.entries | new)


def _named(raw: Mapping[str, Any], *paths: tuple[str, ...]) -> list[str]:
    """The names of files that config.json has under these keys."""
    found = []
    for path in paths:
        value: Any = raw
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        if files.is_below(value):
            found.append(value)
    return found
