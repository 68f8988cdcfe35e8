"""Which GGUF files in a folder are models, and what of the others goes with one.

Knows how publishers call files: model-Q4_K_M.gguf, model-00001-of-00003.gguf, mmproj-F16.gguf, mtp-model.gguf; and what
headers say where names do not. Reads no weight.
"""

from __future__ import annotations

import re
from pathlib import Path

from mlx_qwen35.checkpoint.gguf.container import first_file, read_metadata
from mlx_qwen35.errors import CheckpointError
from mlx_qwen35.machine.files import listed

SUFFIX = ".gguf"
_PROJECTOR = re.compile(r"mmproj|mm-proj|projector|(?:^|[-_.])clip(?:[-_.]|$)", re.IGNORECASE)
_BESIDE = re.compile(r"mtp-|(?:.*[-_.])?(?:imatrix|lora)(?:[-_.].*)?\.gguf", re.IGNORECASE)
_VARIANT = re.compile(
    r"(?:^|[-_.])(?P<found>(?:UD-)?(?:I?Q\d+(?:_[A-Z0-9]+)*|TQ\d_\d|MXFP4(?:_MOE)?|NVFP4|BF16|FP?16|FP?32))"
    r"(?=(?:[-.]\d{5}-of-\d{5})?\.gguf$)",
    re.IGNORECASE,
)


def is_gguf(path: Path) -> bool:
    """Whether a path is a GGUF file, or a folder whose weights are GGUF and nothing else that this package reads."""
    if path.is_dir():
        return bool(models_in(path)) and not any(listed(path, "*.safetensors"))
    return path.suffix.lower() == SUFFIX


def models_in(folder: Path) -> list[Path]:
    """The models in a folder by their names, each by its first file: no projectors, heads and importance matrices."""
    found = dict.fromkeys(first_file(path) for path in listed(folder, f"*{SUFFIX}"))
    return [path for path in found if not _PROJECTOR.search(path.name) and not _BESIDE.match(path.name)]


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


def projectors_beside(model: Path) -> list[Path]:
    """The vision towers in the folder of a model, by their names; those in 16 bits first, as they were published."""
    found = [path for path in listed(model.parent, f"*{SUFFIX}") if _PROJECTOR.search(path.name)]
    order = ("bf16", "f32", "fp32", "f16", "fp16")
    return sorted(found, key=lambda path: (order.index(v) if (v := variant_of(path)) in order else 9, path.name))


def heads_beside(model: Path) -> list[Path]:
    """The files in the folder of a model that hold an MTP head alone."""
    return [path for path in listed(model.parent, f"mtp-*{SUFFIX}") if path != model]


def _is_model(path: Path) -> bool:
    """Whether a header does not say that it is something else; a damaged file is not passed over in silence."""
    try:
        metadata = read_metadata(path)
    except CheckpointError:
        return True
    told = metadata.get("general.architecture"), metadata.get("general.type")
    return not any(word in ("clip", "imatrix", "adapter", "mmproj") for word in told)
