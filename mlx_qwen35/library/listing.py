"""Every Qwen3.5, 3.6 and 3.8 on this machine.

Knows where to look, what is worth a line, and the columns of the table. What a folder holds is survey's to say.
"""

from __future__ import annotations

import html
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mlx_qwen35 import checks
from mlx_qwen35.checkpoint.blocks import is_blocks, read_blocks_config
from mlx_qwen35.checkpoint.files import missing_shards
from mlx_qwen35.config import MOE_TYPES
from mlx_qwen35.errors import CheckpointError
from mlx_qwen35.library import hub_cache, lmstudio
from mlx_qwen35.library.finding import DEMO, demo_folder
from mlx_qwen35.library.stored import Stored, each_model, expanded, subfolders
from mlx_qwen35.library.survey import adapter_of, is_ours, survey
from mlx_qwen35.machine.files import listed

ADAPTER, DRAFTER = "adapter", "drafter"


@dataclass(frozen=True)
class LocalModel:
    """A model of the family on this machine, or what should be one. What nothing is known of is None.

    name: to load it by; place: "LM Studio", "Hugging Face cache", "folder" or "the package"; nbytes: of its weight
    files; quantization: "4-bit", "mxfp4", "fp8", "bf16", ..., with group_size where it has groups; bits_per_weight: as
    stored, scales included; streams: whether its experts can stay on the disk; context_length: tokens; problem: why it
    cannot be loaded; missing: shards not there. An adapter has the quantization "adapter", and its model as problem; a
    block drafter has "drafter", and what it is for.
    """

    name: str
    folder: Path
    place: str
    architecture: str | None
    nbytes: int
    parameters: int | None
    quantization: str | None
    group_size: int | None
    bits_per_weight: float | None
    vision: bool | None
    mtp: bool | None
    context_length: int | None
    missing: tuple[str, ...]
    problem: str | None
    streams: bool | None = None

    @property
    def complete(self) -> bool:
        """Whether files and config.json are all there and belong together."""
        return self.problem is None


class LocalModels(list[LocalModel]):
    """A list that is shown as a table."""

    def __str__(self) -> str:
        return table(self)

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(table(self))}</pre>"


def list_models(*folders: str | Path) -> LocalModels:
    """The demo, LM Studio's models, the Hugging Face cache, and what lies in `folders`.

    folders: a checkpoint each, or folders of them, two levels deep. Reads headers only; what is damaged or incomplete
    is listed with the reason.

    Models of other families are left out, unless their config.json is missing and their name says Qwen3.5, 3.6 or 3.8.
    """
    for folder in folders:
        checks.path("a folder", folder)
    seen: set[Path] = set()
    names: set[str] = set()
    models = LocalModels()
    for stored in _candidates([expanded(folder) for folder in folders]):
        place = stored.folder.resolve()
        if place in seen or not is_ours(stored.folder, stored.name):
            continue
        seen.add(place)
        name = stored.name if stored.name.lower() not in names else str(stored.folder)
        names.add(stored.name.lower())
        models.append(described(name, stored))
    return models


def table(models: Sequence[LocalModel]) -> str:
    """Aligned columns, with the reason under each model that cannot be loaded."""
    if not models:
        return "No Qwen3.5, 3.6 or 3.8 on this machine."
    rows = [("NAME", "SIZE", "WEIGHTS", "BITS", "SEES", "MTP", "STREAMS", "CONTEXT", "PLACE")]
    rows += [
        (
            model.name,
            f"{model.nbytes / 1e9:.2f} GB" if model.nbytes >= 1e8 else f"{model.nbytes / 1e6:.1f} MB",
            model.quantization or "?",
            f"{model.bits_per_weight:.2f}" if model.bits_per_weight else "?",
            _mark(model.vision),
            _mark(model.mtp),
            _mark(model.streams),
            f"{model.context_length:,}" if model.context_length else "?",
            model.place,
        )
        for model in models
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    right = (1, 3, 7)
    lines = []
    for row, model in zip(rows, [None, *models], strict=True):
        cells = (c.rjust(w) if n in right else c.ljust(w) for n, (c, w) in enumerate(zip(row, widths, strict=True)))
        lines.append("  ".join(cells).rstrip())
        if model and model.problem:
            beside = model.quantization in (ADAPTER, DRAFTER)
            lines.append(f"    {'' if beside else 'cannot be loaded: '}{model.problem}")
    return "\n".join(lines)


def _candidates(folders: list[Path]) -> Iterator[Stored]:
    try:
        yield Stored(DEMO, demo_folder(), "the package")
    except CheckpointError:
        pass
    yield from lmstudio.models()
    yield from hub_cache.models()
    for folder in folders:
        if not os.path.isdir(folder):
            raise CheckpointError(f"{folder} is no folder: give folders of checkpoints")
        for path in (folder, *subfolders(folder), *(inner for sub in subfolders(folder) for inner in subfolders(sub))):
            weights = any(any(listed(path, f"*.{kind}")) for kind in ("safetensors", "gguf"))
            if weights or (path / "config.json").exists():
                name = str(path)
                stored = Stored(name if os.sep in name else os.path.join(os.curdir, name), path, "folder")
                found = each_model(stored)
                # Whoever gives a path loads by it.
                yield from (found if len(found) == 1 else (replace(one, name=str(one.folder)) for one in found))


def described(name: str, stored: Stored) -> LocalModel:
    """What the files of one model say; name: to list it by."""
    found = survey(stored.folder)
    config = found.source.config if found.source else found.config
    base = adapter_of(stored.folder)
    quantization, problem = found.quantization, found.problem
    if base is not None:
        quantization, problem = ADAPTER, f"goes with {base or 'a model'}, as --adapter-path {stored.folder}"
    elif is_blocks(stored.folder):
        quantization, problem = DRAFTER, _drafter(stored.folder, name)
    return LocalModel(
        name=name,
        folder=stored.folder,
        place=stored.place,
        architecture=None if config is None else "moe" if config.model_type in MOE_TYPES else "dense",
        nbytes=found.nbytes,
        parameters=found.parameters or None,
        quantization=None if quantization == "?" else quantization,
        group_size=found.spec.group_size if found.spec else None,
        bits_per_weight=found.bits_per_weight,
        vision=found.vision if config else None,
        mtp=found.mtp_bytes > 0 if found.source else None,
        streams=found.streams,
        context_length=config.text.max_position_embeddings if config else None,
        missing=found.missing,
        problem=problem,
    )


def _drafter(folder: Path, name: str) -> str:
    """What a block drafter is for, or why it cannot be loaded."""
    try:
        config, missing = read_blocks_config(folder), missing_shards(folder)
    except CheckpointError as error:
        return f"cannot be loaded: {error}"
    if missing:
        return f"cannot be loaded: it lacks {', '.join(missing)}; finish the download"
    words = f"a {config.kind} drafter for a model of {config.target_layers} layers and hidden size {config.hidden_size}"
    return f"{words}, as --draft-model {name}"


def _mark(known: bool | None) -> str:
    return "?" if known is None else "yes" if known else "no"
