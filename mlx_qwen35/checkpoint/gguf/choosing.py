"""Which GGUF files in a folder are models, and what of the others goes with one.

Knows how publishers call files: model-Q4_K_M.gguf, model-00001-of-00003.gguf, mmproj-F16.gguf, mtp-model.gguf, and
folders: UD-Q4_K_XL/model-UD-Q4_K_XL-00001-of-00003.gguf; and what headers say where names do not. Reads no weight.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from mlx_qwen35.checkpoint.gguf.container import first_file, named_files, read_metadata
from mlx_qwen35.errors import CheckpointError
from mlx_qwen35.machine.files import listed

SUFFIX = ".gguf"
_PROJECTOR = re.compile(r"mmproj|mm-proj|projector|(?:^|[-_.])clip(?:[-_.]|$)", re.IGNORECASE)
_BESIDE = re.compile(r"mtp-|(?:.*[-_.])?(?:imatrix|lora)(?:[-_.].*)?\.gguf", re.IGNORECASE)
_KIND = r"(?:UD-)?(?:I?Q\d+(?:_[A-Z0-9]+)*|TQ\d_\d|MXFP4(?:_MOE)?|NVFP4|BF16|FP?16|FP?32)"
_VARIANT = re.compile(rf"(?:^|[-_.])(?P<found>{_KIND})(?=(?:[-.]\d{{5}}-of-\d{{5}})?\.gguf$)", re.IGNORECASE)
_TOWERS = ("bf16", "f32", "fp32", "f16", "fp16")  # the best first


def is_gguf(path: Path) -> bool:
    """Whether a path is a GGUF file, or a folder whose weights are GGUF and nothing else that this package reads."""
    if path.is_dir():
        return bool(models_in(path)) and not any(listed(path, "*.safetensors"))
    return path.suffix.lower() == SUFFIX


def models_in(folder: Path) -> list[Path]:
    """The models in a folder by their names, each by its first file: no projectors, heads and importance matrices.

    In folders that are called as a quantization, too.
    """
    inner = [folder / name for name in _folders(folder) if is_variant(name)]
    return models_among(path for place in (folder, *inner) for path in listed(place, f"*{SUFFIX}"))


def models_among(files: Iterable[Path]) -> list[Path]:
    """The same among files by their names, whether or not they are here."""
    found = dict.fromkeys(first_file(path) for path in files if path.suffix.lower() == SUFFIX)
    return [path for path in found if not _PROJECTOR.search(path.name) and not _BESIDE.match(path.name)]


def missing_files(model: Path) -> list[Path]:
    """Of the files that the name of a model's first one calls for, those that are not there."""
    return [path for path in named_files(model) if not path.exists()]


def _folders(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    except OSError:
        return []


def model_at(path: Path) -> Path:
    """The first file of the model that a path means: a file of it, or a folder with one model.

    Names say nothing of some projectors and matrices: where there are several files, their headers do. Raises
    CheckpointError for a folder with several models, and one with none.
    """
    if not path.is_dir():
        return first_file(path)
    found = models_in(path)
    if len(found) > 1:
        found = [file for file in found if _is_model(file)]
    if len(found) > 1:
        shown = "".join(f"\n  {file}" for file in found[:12])
        raise CheckpointError(f"{path} holds {len(found)} models: give one of these files{shown}")
    if not found:
        raise CheckpointError(f"{path} holds no GGUF of a model: give the folder or the file of one")
    return found[0]


def variant_of(path: Path) -> str | None:
    """How a file is quantized, by its name: "q4_k_m", "ud-iq2_xxs", "bf16"; None where it does not say."""
    found = _VARIANT.search(path.name)
    return found["found"].lower() if found else None


def is_variant(text: str) -> bool:
    """Whether a text is what publishers call a quantization: "Q4_K_M", "UD-IQ2_XXS", "BF16"."""
    return re.fullmatch(_KIND, text, re.IGNORECASE) is not None


def projectors_beside(model: Path) -> list[Path]:
    """The vision towers beside a model, by their names; those in 16 bits first, as they were published."""
    return projectors_among(_beside(model), model)


def projectors_among(files: Iterable[Path], model: Path) -> list[Path]:
    """The same among files by their names."""
    found = [path for path in _at(files, model) if _PROJECTOR.search(path.name)]
    return sorted(found, key=lambda p: (_TOWERS.index(v) if (v := variant_of(p)) in _TOWERS else 9, p.name))


def heads_beside(model: Path) -> list[Path]:
    """The files beside a model that hold an MTP head alone."""
    return heads_among(_beside(model), model)


def heads_among(files: Iterable[Path], model: Path) -> list[Path]:
    """The same among files by their names; that of the model's own quantization first."""
    found = [path for path in _at(files, model) if path.name.lower().startswith("mtp-") and path != model]
    wanted = variant_of(model)
    return sorted(found, key=lambda p: (variant_of(p) != wanted, p.name))


def _places(model: Path) -> list[Path]:
    """The folder of a model, and the one above it where that is called as a quantization."""
    return [model.parent, model.parent.parent] if is_variant(model.parent.name) else [model.parent]


def _at(files: Iterable[Path], model: Path) -> list[Path]:
    places = _places(model)
    return [path for path in files if path.suffix.lower() == SUFFIX and path.parent in places]


def _beside(model: Path) -> list[Path]:
    return [path for place in _places(model) for path in listed(place, f"*{SUFFIX}")]


def _is_model(path: Path) -> bool:
    """Whether a header does not say that it is something else; a damaged file is not passed over in silence."""
    try:
        metadata = read_metadata(path)
    except CheckpointError:
        return True
    told = metadata.get("general.architecture"), metadata.get("general.type")
    return not any(word in ("clip", "imatrix", "adapter", "mmproj") for word in told)
