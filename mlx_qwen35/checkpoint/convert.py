"""From a checkpoint of any layout to an MLX folder that mlx-lm, mlx-vlm and this package load.

Knows the order of the work and what the written folder must look like (docs/CHECKPOINTS.md). The tensors stream from
files to files, some rows at a time: memory does not grow with the model, and no Model is built.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_qwen35.checkpoint import files, fp8
from mlx_qwen35.checkpoint.fp8 import Fp8, Fp8Part
from mlx_qwen35.checkpoint.gptq import Gptq
from mlx_qwen35.checkpoint.inventory import KEPT_FLOAT32, Shape, is_linear, text_tensors
from mlx_qwen35.checkpoint.load import compute_dtype
from mlx_qwen35.checkpoint.names import TARGET, Layout, find_layout
from mlx_qwen35.checkpoint.part import FLOATS, make_part
from mlx_qwen35.checkpoint.quantize import default_spec, module_spec, pack, packed, unpack
from mlx_qwen35.checkpoint.source import AnyPart, Source, open_source
from mlx_qwen35.checkpoint.write import (
    TAGS,
    SafetensorsWriter,
    TensorSpec,
    complete_folder,
    plan_shards,
    write_index,
    write_json,
)
from mlx_qwen35.config import QuantSpec
from mlx_qwen35.errors import CheckpointError

_PIECE_BYTES = 64 << 20  # of a source tensor in memory at a time
_COPIED = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "LICENSE*", "NOTICE*")
_MTP_FILE = Path("mtp") / "weights.safetensors"
_DTYPES = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}


@dataclass(frozen=True)
class _Task:
    """One of our tensors on its way: the parts that hold it now and how it is to be quantized.

    parts: {"weight": ..} and, for a quantized source, "scales" and "biases". had, has: its quantization in the source
    and in the target. dtype: of the unquantized values in the target, scales and biases included.
    """

    name: str
    parts: dict[str, AnyPart]
    had: QuantSpec | None
    has: QuantSpec | None
    dtype: mx.Dtype

    @property
    def carried(self) -> bool:
        """Whether packed values go over as they are."""
        return self.had is not None and self.had == self.has

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts.values())

    def specs(self, shape: Shape) -> list[TensorSpec]:
        """What is written for it; `shape` is its unquantized shape."""
        stem = TARGET.source(self.name).names[0]
        if self.has is None:
            return [TensorSpec(stem, TAGS[self.dtype], shape)]
        stem = stem.removesuffix(".weight")
        return [
            TensorSpec(f"{stem}.{kind}", TAGS[self.dtype] if tags == FLOATS else tags[0], packed_shape)
            for kind, (packed_shape, tags) in packed(shape, self.has).items()
        ]


def convert(
    source: str | Path,
    target: str | Path,
    *,
    bits: int | None = 4,
    group_size: int = 64,
    mode: str = "affine",
    dtype: mx.Dtype | str | None = None,
    overwrite: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write the checkpoint in folder `source` as an MLX checkpoint into folder `target`, and return that.

    bits: 2, 3, 4, 5, 6 or 8; None leaves the weights unquantized. group_size: 32, 64 or 128. mode: "affine", or
    "mxfp4", "mxfp8", "nvfp4", which fix bits and group_size. dtype: of what is not quantized; None keeps the source's.
    The router, shared_expert_gate, in_proj_a and in_proj_b get at least 8 bits; vision tensors and mtp.* are not
    quantized. FP8 is dequantized in float32 and packed from that; GPTQ's integers go over as they are, in their own
    groups, where `mode` is affine and `bits` theirs. overwrite: replace an existing `target`. on_progress: called with
    (bytes read, bytes in all).
    Raises CheckpointError for a source that cannot be read, weights that are NaN or infinite, an existing target, a
    quantization that MLX does not have and a full disk. `target` appears only when it is complete.
    """
    default = None if bits is None else default_spec(bits, group_size, mode)
    wanted = None if dtype is None else compute_dtype(dtype)
    source, target = Path(source).expanduser(), Path(target).expanduser()
    _check_target(source, target, overwrite)
    origin = open_source(source)
    shapes = text_tensors(origin.config)
    text = [_text_task(origin, name, shape, default, wanted) for name, shape in shapes.items()]
    vision, mtp = _beside(origin, wanted)
    _check_vision(origin, vision)
    shapes |= {task.name: task.parts["weight"].shape for task in vision + mtp}

    main = text + vision
    shards = plan_shards(task.specs(shapes[task.name]) for task in main)
    mtp_specs = [spec for task in mtp for spec in task.specs(shapes[task.name])]
    _check_space(target, sum(s.nbytes for specs in [*shards.values(), mtp_specs] for s in specs))
    progress = _Progress(sum(task.nbytes for task in main + mtp), on_progress)
    with complete_folder(target, overwrite=overwrite) as folder:
        for file, specs in shards.items():
            here = {spec.name for spec in specs}
            with SafetensorsWriter(folder / file, specs) as writer:
                for task in main:
                    if task.specs(shapes[task.name])[0].name in here:
                        _write(task, shapes[task.name], writer, progress)
        write_index(folder, shards)
        if mtp:
            (folder / _MTP_FILE).parent.mkdir()
            with SafetensorsWriter(folder / _MTP_FILE, mtp_specs) as writer:
                for task in mtp:
                    _write(task, shapes[task.name], writer, progress)
        _copy_files(source, folder)
        # Last, because a folder without it is no checkpoint to anybody.
        write_json(folder / "config.json", _config(origin, text, shapes, default, wanted, bool(vision)))
    return target


def _text_task(
    origin: Source, name: str, shape: Shape, default: QuantSpec | None, wanted: mx.Dtype | None
) -> _Task:
    module = name.removesuffix(".weight")
    had = origin.specs.get(module)
    kinds = ("weight", "scales", "biases") if had else ("weight",)
    parts = {kind: origin.parts[f"{module}.{kind}"] for kind in kinds if f"{module}.{kind}" in origin.parts}
    parts = parts or {"weight": origin.parts[name]}  # A_log and dt_bias end in no ".weight"
    has = module_spec(module, shape, default) if default and is_linear(name, shape) else None
    if had and default and isinstance(origin.foreign, Gptq):
        meant = has or default
        if (had.bits, had.mode) == (meant.bits, meant.mode):
            has = had  # other groups would not make it better, only other
    if had is None:
        own = _DTYPES[parts["weight"].dtype]
    else:  # the mx modes' scales say nothing of the dtype that the weight once had
        own = _DTYPES.get(parts["scales"].dtype, mx.bfloat16)
    kept = name.endswith(KEPT_FLOAT32) and own == mx.float32
    return _Task(name, parts, had, has, own if kept or wanted is None else wanted)


def _beside(origin: Source, wanted: mx.Dtype | None) -> tuple[list[_Task], list[_Task]]:
    """Vision and MTP tensors, which go over unquantized; MTP may lie in the shards or in mtp/weights.safetensors."""
    entries = {name: origin.files.entries[name] for name in origin.beside()}
    mtp = {n: e for n, e in entries.items() if n.startswith("mtp.")}
    vision = _beside_tasks(origin, {n: e for n, e in entries.items() if n not in mtp}, origin.layout, wanted)
    layout = origin.layout
    path = origin.folder / _MTP_FILE
    if path.exists():
        if mtp:
            raise CheckpointError(f"{origin.folder} has MTP tensors in its shards and in {_MTP_FILE}: keep one of them")
        found = files.open_file(path)
        stray = [name for name in found.entries if not name.startswith("mtp.")]
        if stray:
            raise CheckpointError(f"{path} holds {stray[0]}, which is no MTP tensor: download or convert it again")
        mtp = found.entries
        # Its own marker says how it is written; the name added says nothing, but find_layout() wants a text model.
        layout = find_layout([*mtp, "model.norm.weight"], found.formats.values(), str(path))
    return vision, _beside_tasks(origin, mtp, layout, wanted)


def _beside_tasks(
    origin: Source, entries: dict[str, files.Entry], layout: Layout, wanted: mx.Dtype | None
) -> list[_Task]:
    experts = origin.config.text.moe.num_experts if origin.config.text.moe else 0
    tasks = []
    plain = [name for name in entries if not name.endswith(fp8.SUFFIX)]
    for ours in dict.fromkeys(name for published in plain for name in layout.ours(published)):
        part: AnyPart | str = make_part(ours, entries, layout, experts)
        if isinstance(part, str):
            raise CheckpointError(f"{origin.folder}: {part} is missing beside its neighbours: download the files again")
        mixed = next((entry for entry in part.entries if entry.dtype != part.dtype), None)
        if mixed:
            raise CheckpointError(f"{mixed} has dtype {mixed.dtype}, its neighbours {part.dtype}: download it again")
        if part.dtype == fp8.CODES and isinstance(origin.foreign, Fp8):
            scaled = fp8.with_scales(part, entries, origin.foreign)
            if isinstance(scaled, str):
                raise CheckpointError(f"{origin.folder}: {scaled}. Download the files again")
            part = scaled
        if part.dtype not in _DTYPES:
            raise CheckpointError(
                f"{part.entries[0]} has dtype {part.dtype}: vision and MTP tensors that are quantized cannot be "
                "converted yet. Take the unquantized checkpoint as the source"
            )
        tasks.append(_Task(ours, {"weight": part}, None, None, wanted or _DTYPES[part.dtype]))
    used = {entry.name for task in tasks for part in task.parts.values() for entry in part.entries}
    over = next((entry for name, entry in entries.items() if name not in used), None)
    if over:
        raise CheckpointError(f"{over} is left over beside the text model: download the files again")
    return tasks


def _write(task: _Task, shape: Shape, writer: SafetensorsWriter, progress: _Progress) -> None:
    names = [spec.name for spec in task.specs(shape)]
    for pieces in _pieces(task, progress):
        for name in names:
            kind = name.rpartition(".")[2] if task.has else "weight"
            writer.append(name, pieces[kind])


def _pieces(task: _Task, progress: _Progress) -> Iterator[dict[str, mx.array]]:
    """The target's values of some rows after the other: {"weight": ..} and where quantized "scales" and "biases"."""
    rows = task.parts["weight"].rows
    wide = 4 if isinstance(task.parts["weight"], Fp8Part) else 1  # a byte in the file, float32 on its way
    step = max(1, _PIECE_BYTES * rows // max(1, task.nbytes * wide))
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        raw = {kind: part.fetch(start, stop) for kind, part in task.parts.items()}
        found = {kind: task.parts[kind].finish(raw.pop(kind), None) for kind in task.parts}
        for kind, array in found.items():
            _check_finite(task.parts[kind], array)
        if not task.carried:
            weight = unpack(found, task.had) if task.had else found["weight"]
            # What was dequantized is packed from float32: rounding it first would be a second loss.
            if task.has and not task.had and not isinstance(task.parts["weight"], Fp8Part):
                weight = weight.astype(task.dtype)
            found = pack(weight, task.has) if task.has else {"weight": weight}
        yield {k: a.astype(task.dtype) if TAGS[a.dtype] in FLOATS else a for k, a in found.items()}
        progress.add(sum(part.nbytes * stop // rows - part.nbytes * start // rows for part in task.parts.values()))


def _check_finite(part: AnyPart, array: mx.array) -> None:
    if TAGS[array.dtype] in FLOATS and not mx.all(mx.isfinite(array)).item():
        raise CheckpointError(
            f"{part.entries[0]} holds NaN or infinite values: this checkpoint is damaged, download or train it again"
        )


class _Progress:
    """Counts bytes for a callback."""

    def __init__(self, total: int, report: Callable[[int, int], None] | None):
        self.done, self.total, self.report = 0, total, report
        self.add(0)

    def add(self, count: int) -> None:
        self.done += count
        if self.report:
            self.report(self.done, self.total)


def _config(
    origin: Source,
    text: list[_Task],
    shapes: dict[str, Shape],
    default: QuantSpec | None,
    dtype: mx.Dtype | None,
    vision: bool,
) -> dict[str, Any]:
    """The source's config.json, with what the conversion changed."""
    config = copy.deepcopy(origin.config.raw)
    inner = config.get("text_config") or config
    for section in (config, inner):
        section.pop("quantization", None)
        section.pop("quantization_config", None)
        if dtype is not None:
            for key in ("dtype", "torch_dtype"):
                if key in section:
                    section[key] = str(dtype).removeprefix("mlx.core.")
    # mlx-lm reads this in text_config only.
    inner["tie_word_embeddings"] = origin.config.text.tie_word_embeddings
    if not vision:
        config.pop("vision_config", None)
    if default is not None:
        quantization: dict[str, Any] = _as_json(default)
        for task in text:
            if is_linear(task.name, shapes[task.name]) and task.has != default:
                path = TARGET.source(task.name).names[0].removesuffix(".weight")
                quantization[path] = _as_json(task.has) if task.has else False
        config["quantization"] = quantization
        config["quantization_config"] = copy.deepcopy(quantization)
    return config


def _as_json(spec: QuantSpec) -> dict[str, Any]:
    return {"group_size": spec.group_size, "bits": spec.bits, "mode": spec.mode}


def _copy_files(source: Path, folder: Path) -> None:
    """Tokenizer, template, generation and preprocessor files: LM Studio loads offline."""
    for pattern in _COPIED:
        for path in sorted(source.glob(pattern)):
            if path.is_file() and path.name != "config.json" and not path.name.endswith(".index.json"):
                shutil.copyfile(path, folder / path.name)


def _check_target(source: Path, target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if target.resolve() == source.resolve() or target.resolve() in source.resolve().parents:
        raise CheckpointError(f"{target} is the source or holds it: choose another folder for the conversion")
    if not overwrite:
        raise CheckpointError(f"{target} exists already: choose another folder, or ask to overwrite it")
    if not target.is_dir() or (any(target.iterdir()) and not (target / "config.json").exists()):
        raise CheckpointError(f"{target} is no checkpoint and is not overwritten: choose another folder")


def _check_vision(origin: Source, vision: list[_Task]) -> None:
    if vision and origin.config.vision is None:
        raise CheckpointError(
            f"{origin.folder} holds vision tensors, but config.json has no vision_config: restore the published one"
        )


def _check_space(target: Path, needed: int) -> None:
    parent = next(p for p in (target.parent, *target.parent.parents) if p.exists())
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise CheckpointError(
            f"{parent} has {free / 1e9:.1f} GB free and the conversion needs {needed / 1e9:.1f} GB: free some space, "
            "choose another disk or fewer bits"
        )
