"""The MTP layer of a checkpoint: in its shards, in mtp/weights.safetensors beside them, or in a drafter of mlx-vlm.

Knows where its tensors lie and how they are named there, and makes an MTPHead of them. A drafter is a folder of its own
(model_type qwen3_5_mtp) whose names lack "mtp." and whose config.json has a quantization of its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from mlx_qwen35.checkpoint import files, fp8
from mlx_qwen35.checkpoint.files import Entry
from mlx_qwen35.checkpoint.fp8 import Fp8
from mlx_qwen35.checkpoint.inventory import Shape, is_linear, mtp_tensors
from mlx_qwen35.checkpoint.load import Progress, check_experts, compute_dtype, read_config, read_weights, specs_of
from mlx_qwen35.checkpoint.names import MLX, Layout, find_layout
from mlx_qwen35.checkpoint.part import FLOATS, make_part
from mlx_qwen35.checkpoint.quantize import packed
from mlx_qwen35.checkpoint.source import AnyPart, Source, open_source, spec_of
from mlx_qwen35.config import ModelConfig, QuantSpec
from mlx_qwen35.errors import CheckpointError
from mlx_qwen35.mtp import MTPHead

MTP_FILE = Path("mtp") / "weights.safetensors"
DRAFTER = "qwen3_5_mtp"  # the model_type of mlx-vlm's drafters
_LAYER = re.compile(r"mtp\.layers\.(\d+)\.")


@dataclass(frozen=True)
class MtpTensors:
    """Where the tensors lie, under the names mtp.*. config: what says how they are quantized, by paths that begin with
    `prefix`; foreign: as in Source."""

    folder: Path
    entries: dict[str, Entry]
    layout: Layout
    config: ModelConfig
    prefix: str = "mtp."
    foreign: Fp8 | None = None

    def spec(self, module: str) -> QuantSpec | None:
        return spec_of(self.config, self.prefix + module.removeprefix("mtp."))

    def part(self, ours: str, experts: int) -> AnyPart | str:
        """How one of our tensors is made, or what is wrong with it, in words."""
        part = make_part(ours, self.entries, self.layout, experts)
        if isinstance(part, str):
            return f"{part} is missing beside its neighbours"
        mixed = next((entry for entry in part.entries if entry.dtype != part.dtype), None)
        if mixed:
            return f"{mixed} has dtype {mixed.dtype}, its neighbours {part.dtype}"
        if part.dtype == fp8.CODES and self.foreign:
            return fp8.with_scales(part, self.entries, self.foreign)
        return part


def find_mtp(origin: Source) -> MtpTensors:
    """Those of a checkpoint; no entries where it has none. Raises CheckpointError if they are in two places."""
    shards = {name: entry for name, entry in origin.files.entries.items() if name.startswith("mtp.")}
    foreign = origin.foreign if isinstance(origin.foreign, Fp8) else None
    found = MtpTensors(origin.folder, shards, origin.layout, origin.config, foreign=foreign)
    path = origin.folder / MTP_FILE
    if not path.exists():
        return found
    if shards:
        raise CheckpointError(f"{origin.folder} has MTP tensors in its shards and in {MTP_FILE}: keep one of them")
    beside = files.open_file(path)
    stray = [name for name in beside.entries if not name.startswith("mtp.")]
    if stray:
        raise CheckpointError(f"{path} holds {stray[0]}, which is no MTP tensor: download or convert it again")
    return replace(found, entries=beside.entries, layout=_layout(beside.entries, beside.formats, str(path)))


def mtp_specs(folder: str | Path, config: ModelConfig) -> tuple[int, dict[str, QuantSpec]]:
    """(layers of the head that `load_mtp` would load, how its modules are quantized); errors as there."""
    layers, _, specs = _checked(Path(folder), config)
    return layers, specs


def is_drafter(folder: str | Path) -> bool:
    """Whether a folder is a drafter as mlx-vlm writes them."""
    try:
        return json.loads((Path(folder) / "config.json").read_bytes()).get("model_type") == DRAFTER
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def load_mtp(
    folder: str | Path,
    config: ModelConfig,
    *,
    dtype: mx.Dtype | str | None = None,
    on_progress: Progress | None = None,
) -> MTPHead:
    """The head that drafts for a model of this config, from its checkpoint's folder or a drafter of mlx-vlm.

    dtype, on_progress, errors: as in `load_model`. Raises CheckpointError too where the folder has no MTP layer, or one
    for another model. Its experts are in memory, whatever becomes of the model's.
    """
    folder, compute = Path(folder), compute_dtype(dtype)
    layers, parts, specs = _checked(folder, config)
    check_experts(parts.values(), folder, compute)
    head = MTPHead(config.text, layers)
    if specs:
        nn.quantize(head, class_predicate=specs_of({path.removeprefix("mtp."): spec for path, spec in specs.items()}))
    weights: list[tuple[str, mx.array]] = []
    try:
        read_weights(list(parts.values()), compute, on_progress, weights)
    except BaseException:
        weights.clear()
        mx.clear_cache()
        raise
    head.load_weights([(name.removeprefix("mtp."), weight) for name, weight in weights])
    head.eval()
    return head


def _checked(folder: Path, config: ModelConfig) -> tuple[int, dict[str, AnyPart], dict[str, QuantSpec]]:
    """Layers, parts and quantizations of the head in a folder, held against the model's config."""
    found = _open_drafter(folder) if is_drafter(folder) else find_mtp(open_source(folder, read_config(folder)))
    if not found.entries:
        raise CheckpointError(
            f"{folder} has no MTP layer (mtp.* tensors, in the shards or in {MTP_FILE}): load it without one, or take "
            "a conversion that keeps it"
        )
    layers = 1 + max((int(at[1]) for name in found.entries if (at := _LAYER.match(name))), default=0)
    layers = min(layers, len(found.entries))  # a damaged number must not grow a list that no file could hold
    parts, specs, problems = _plan(found, config, layers)
    if problems:
        shown = "".join(f"\n  {problem}" for problem in problems[:6])
        raise CheckpointError(f"{folder}: this MTP layer does not belong to this model:{shown}\nDownload it again")
    return layers, parts, specs


def _open_drafter(folder: Path) -> MtpTensors:
    raw = json.loads((folder / "config.json").read_bytes())
    text = raw.get("text_config")
    if not isinstance(text, dict):
        raise CheckpointError(f"{folder / 'config.json'} has no text_config: split the drafter off again")
    kind = "qwen3_5_moe_text" if text.get("num_experts") else "qwen3_5_text"
    kept = {key: raw[key] for key in ("quantization", "quantization_config") if key in raw}
    config = ModelConfig.from_dict({**text, **kept, "model_type": kind}, where=str(folder / "config.json"))
    found = files.open_folder(folder)
    entries = {f"mtp.{name}": replace(entry, name=f"mtp.{name}") for name, entry in found.entries.items()}
    return MtpTensors(folder, entries, _layout(entries, found.formats, str(folder)), config, prefix="")


def _layout(entries: Mapping[str, Entry], formats: Mapping[str, str | None], where: str) -> Layout:
    # The marker says how they are written; the name added says nothing, but find_layout() wants a text model.
    return find_layout([*entries, "model.norm.weight"], formats.values(), where)


def _plan(
    found: MtpTensors, config: ModelConfig, layers: int
) -> tuple[dict[str, AnyPart], dict[str, QuantSpec], list[str]]:
    parts: dict[str, AnyPart] = {}
    specs: dict[str, QuantSpec] = {}
    problems: list[str] = []
    experts = config.text.moe.num_experts if config.text.moe else 0
    floats = (*FLOATS, fp8.CODES) if found.foreign else FLOATS
    for name, shape in mtp_tensors(config, layers).items():
        module = name.removesuffix(".weight")
        wanted: dict[str, tuple[Shape, tuple[str, ...]]] = {name: (shape, floats)}
        path = found.layout.source(name).names[0].removesuffix(".weight") if found.layout.kind == MLX else None
        if path and is_linear(name, shape) and f"{path}.scales" in found.entries:
            spec = found.spec(path)
            if spec is None or shape[-1] % spec.group_size:
                problems.append(f"{path}.scales is there, but config.json does not say how {path} is quantized")
                continue
            specs[module] = spec
            wanted = {f"{module}.{kind}": rest for kind, rest in packed(shape, spec).items()}
        for ours, (ours_shape, dtypes) in wanted.items():
            part = found.part(ours, experts)
            if isinstance(part, str):
                problems.append(part)
            elif part.shape != ours_shape or part.entries[0].dtype not in dtypes:
                entry = part.entries[0]
                problems.append(f"{entry} is {entry.dtype} {list(entry.shape)}, not as config.json has it")
            else:
                parts[ours] = part
    used = {entry.name for part in parts.values() for entry in part.entries}
    if not problems:
        problems += [f"{entry} is left over" for name, entry in found.entries.items() if name not in used]
    return parts, specs, problems
