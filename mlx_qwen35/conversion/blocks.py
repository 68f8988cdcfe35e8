"""A block drafter as an MLX folder, quantized or not.

Knows which of its weights are worth bits, and files. One tensor after the other goes from files to a file.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_qwen35.checkpoint.blocks import CODEBOOKS, OpenedBlocks, is_packable, open_blocks
from mlx_qwen35.checkpoint.companions import companions
from mlx_qwen35.checkpoint.load import compute_dtype
from mlx_qwen35.checkpoint.part import DTYPES, Part
from mlx_qwen35.checkpoint.quantize import default_spec, pack, packed
from mlx_qwen35.checkpoint.source import read_parts
from mlx_qwen35.config import QuantSpec
from mlx_qwen35.conversion.asked import check_target
from mlx_qwen35.conversion.partial import Partial, claim
from mlx_qwen35.conversion.staging import as_numpy
from mlx_qwen35.conversion.write import TAGS, SafetensorsFile, TensorSpec, make_durable, write_error, write_json
from mlx_qwen35.errors import CheckpointError

_FILE = "model.safetensors"


def convert_blocks(
    source: Path,
    target: Path,
    *,
    bits: int | None,
    group_size: int,
    mode: str,
    dtype: mx.Dtype | str | None,
    overwrite: bool,
    on_progress: Callable[[int, int], None] | None,
    **others: Any,
) -> Path:
    """Write the drafter in folder `source` into folder `target`, and return that. Arguments as in `convert`; others:
    what a drafter has no use for, which is refused.

    All maps are quantized whose rows the groups divide. The two tables of a DFlash2's selector stay as they are: of
    those a few rows are read for a guess, so that bits would save memory and no time.
    """
    if others.pop("gguf"):
        raise CheckpointError(f"{source} is a drafter, of which no GGUF file is made: give a folder as the target")
    needless = sorted(name for name, value in others.items() if value)
    if needless:
        raise CheckpointError(f"{source} is a drafter, for which {needless[0]} means nothing: leave it out")
    spec = None if bits is None else default_spec(bits, group_size, mode)
    wanted = None if dtype is None else compute_dtype(dtype)
    opened = open_blocks(source)
    if opened.specs:
        raise CheckpointError(f"{source} is quantized already: use it as it is, or convert the original")
    if spec is None and wanted is None:
        raise CheckpointError(f"{source} would be copied as it is: say bits or dtype (-q, --dtype)")
    check_target(source, target, overwrite)
    with claim(target) as partial:
        try:
            partial.clear()
            _write(opened, partial, spec, wanted, on_progress)
            partial.finish(overwrite)
        except BaseException:
            partial.discard()
            raise
    return target


def _write(
    opened: OpenedBlocks,
    partial: Partial,
    spec: QuantSpec | None,
    dtype: mx.Dtype | None,
    on_progress: Callable[[int, int], None] | None,
) -> None:
    folder, parts = partial.folder, list(opened.parts.values())
    how = {part.ours: _spec_of(part, opened, spec) for part in parts}
    specs = [made for part in parts for made in _specs(part, how[part.ours], dtype)]
    total, done = sum(part.nbytes for part in parts), 0
    if on_progress:
        on_progress(0, total)
    try:
        folder.mkdir()
        for companion in companions(opened.folder):
            (folder / companion.name).write_bytes(companion.read())
    except OSError as error:
        raise write_error(error, folder) from error
    file = SafetensorsFile(folder / _FILE, specs)
    try:
        file.open()
        for part, raw in read_parts(parts):
            weight = part.finish(raw, dtype)
            if not mx.isfinite(weight).all().item():
                raise CheckpointError(f"{part.entries[0]} has values that are NaN or infinite: download it again")
            for name, array in _arrays(part.ours, weight, how[part.ours]).items():
                file.write(name, memoryview(as_numpy(array)).cast("B"), 0)
            done += part.nbytes
            if on_progress:
                on_progress(done, total)
        file.sync()
    finally:
        file.close()
    kept = {key: value for key, value in opened.raw.items() if not key.startswith("quantization")}
    if spec is not None:
        kept["quantization"] = {"group_size": spec.group_size, "bits": spec.bits, "mode": spec.mode}
    write_json(folder / "config.json", kept)
    make_durable(folder)


def _spec_of(part: Part, opened: OpenedBlocks, spec: QuantSpec | None) -> QuantSpec | None:
    name, shape = part.ours, opened.shapes[part.ours]
    table = name.removesuffix(".weight") in CODEBOOKS
    return None if spec is None or table or not is_packable(name, shape) or shape[-1] % spec.group_size else spec


def _specs(part: Part, spec: QuantSpec | None, dtype: mx.Dtype | None) -> list[TensorSpec]:
    """Of what one weight becomes."""
    own = TAGS[dtype or DTYPES[part.dtype]]
    if spec is None:
        return [TensorSpec(_published(part.ours), own, part.shape)]
    stem = part.ours.removesuffix(".weight")
    return [
        TensorSpec(f"{stem}.{kind}", own if own in tags else tags[0], shape)
        for kind, (shape, tags) in packed(part.shape, spec).items()
    ]


def _arrays(name: str, weight: mx.array, spec: QuantSpec | None) -> dict[str, mx.array]:
    if spec is None:
        return {_published(name): weight}
    return {f"{name.removesuffix('.weight')}.{kind}": array for kind, array in pack(weight, spec).items()}


def _published(name: str) -> str:
    stem = name.removesuffix(".weight")
    return stem if stem in CODEBOOKS else name
