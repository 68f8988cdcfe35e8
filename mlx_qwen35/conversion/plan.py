"""What a conversion writes: which tensors in which form, in which files, and the config.json that says so.

Knows our tensors, those beside the text model, and what the written folder must look like (docs/CHECKPOINTS.md). Reads
headers only and writes nothing.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import mlx.core as mx

from mlx_qwen35.checkpoint import files
from mlx_qwen35.checkpoint.beside import KEYS, MTP_FILE
from mlx_qwen35.checkpoint.files import Entry
from mlx_qwen35.checkpoint.forms import hadamard
from mlx_qwen35.checkpoint.inventory import KEPT_FLOAT32, Shape, is_linear, mtp_tensors, text_tensors, vision_tensors
from mlx_qwen35.checkpoint.mtp import MtpTensors, find_mtp
from mlx_qwen35.checkpoint.names import MLX, TARGET
from mlx_qwen35.checkpoint.part import AnyPart
from mlx_qwen35.checkpoint.source import Source
from mlx_qwen35.config import HADAMARD, QuantSpec
from mlx_qwen35.conversion.task import Task, Update
from mlx_qwen35.conversion.write import TensorSpec, plan_shards
from mlx_qwen35.errors import CheckpointError

_DTYPES = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}
_SECTIONS = ("quantization", "quantization_config")

Assignment = Mapping[str, QuantSpec | None]


@dataclass(frozen=True)
class Plan:
    """A conversion. main: the tasks of the shards, text model and vision tower; mtp: those of mtp/weights.safetensors.

    default: the quantization that was asked for; None: nothing is quantized. dtype: of what is not, where one was asked
    for.
    """

    origin: Source
    default: QuantSpec | None
    dtype: mx.Dtype | None
    text: tuple[Task, ...]
    vision: tuple[Task, ...]
    mtp: tuple[Task, ...]

    @property
    def main(self) -> tuple[Task, ...]:
        return self.text + self.vision

    @property
    def tasks(self) -> tuple[Task, ...]:
        return self.main + self.mtp

    @cached_property
    def shards(self) -> dict[str, list[TensorSpec]]:
        """File name -> its tensors."""
        return plan_shards(list(task.specs().values()) for task in self.main)

    @cached_property
    def files(self) -> dict[str, list[TensorSpec]]:
        """The same, with the MTP file."""
        beside = [spec for task in self.mtp for spec in task.specs().values()]
        return self.shards | ({str(MTP_FILE): beside} if beside else {})

    @property
    def nbytes(self) -> int:
        """Of all tensors in the target."""
        return sum(spec.nbytes for specs in self.files.values() for spec in specs)

    def config(self) -> dict[str, Any]:
        """The source's config.json, with what the conversion changes."""
        config = copy.deepcopy(self.origin.config.raw)
        inner = config.get("text_config") or config
        for section in (config, inner):
            for key in (*_SECTIONS, *KEYS):
                section.pop(key, None)
            if self.dtype is not None:
                for key in ("dtype", "torch_dtype"):
                    if key in section:
                        section[key] = str(self.dtype).removeprefix("mlx.core.")
        if config.get("model_type") == HADAMARD:
            config["model_type"] = self.origin.config.model_type
            for key in hadamard.KEYS:
                config.pop(key, None)
        # mlx-lm reads this in text_config only.
        inner["tie_word_embeddings"] = self.origin.config.text.tie_word_embeddings
        if not self.vision:
            config.pop("vision_config", None)
        if self.default is not None:
            first = self._first()
            quantization: dict[str, Any] = _as_json(first)
            for task in self.main:
                # Of the tower nobody expects anything else than that it is not quantized.
                deviates = task.has or (is_linear(task.name, task.shape) and not task.name.startswith("vision."))
                if deviates and task.has != first:
                    path = TARGET.source(task.name).names[0].removesuffix(".weight")
                    quantization[path] = _as_json(task.has) if task.has else False
            config["quantization"] = quantization
            config["quantization_config"] = copy.deepcopy(quantization)
        return config

    def _first(self) -> QuantSpec:
        """The quantization that config.json names before those of single modules, and shows to people."""
        found = Counter(task.has for task in self.text if task.has)
        return self.default if self.default in found or not found else found.most_common(1)[0][0]

    def is_done_already(self) -> bool:
        """Whether the source has every tensor under its name, in its form and where it belongs."""
        origin = self.origin
        if origin.layout.kind != MLX or not all(task.carried for task in self.tasks):
            return False
        there = _forms(origin.files.entries.values())
        if (origin.folder / MTP_FILE).exists():
            there |= _forms(files.open_file(origin.folder / MTP_FILE).entries.values())
        plain = [
            {key: value for key, value in config.items() if key not in (*_SECTIONS, "text_config")}
            for config in (origin.config.raw, self.config())
        ]
        return plain[0] == plain[1] and there == _forms(spec for specs in self.files.values() for spec in specs)


def make_plan(
    origin: Source,
    assignment: Assignment | None,
    default: QuantSpec | None,
    dtype: mx.Dtype | None,
    search: bool = False,
    updates: Mapping[str, Update] | None = None,
) -> Plan:
    """The conversion of a source. assignment: module -> how it is quantized, for the linear modules of the text model;
    None leaves all of them unquantized. search: for their scales, as quantize.pack() does. updates: what an adapter
    changes, by tensor. Raises CheckpointError for tensors beside the text model that do not fit."""
    shapes = text_tensors(origin.config)
    text = [_text_task(origin, name, shape, assignment, dtype, search) for name, shape in shapes.items()]
    text = [replace(task, update=(updates or {}).get(task.name)) for task in text]
    tower = vision_tensors(origin.config)
    vision = [_vision_task(origin, name, shape, default, dtype) for name, shape in tower.items()]
    beside = origin.beside()
    if not vision and not all(map(origin.layout.is_mtp, beside)):
        raise CheckpointError(
            f"{origin.folder} holds vision tensors, but config.json has no vision_config: restore the published one"
        )
    return Plan(origin, default, dtype, tuple(text), tuple(vision), tuple(_mtp_tasks(find_mtp(origin), dtype)))


def _text_task(
    origin: Source,
    name: str,
    shape: Shape,
    assignment: Assignment | None,
    wanted: mx.Dtype | None,
    search: bool,
) -> Task:
    module = name.removesuffix(".weight")
    had, parts = _parts_of(origin, name, shape)
    has = assignment[module] if assignment is not None and is_linear(name, shape) else None
    own = _own_dtype(parts, had)
    kept = name.endswith(KEPT_FLOAT32) and own == mx.float32
    return Task(name, parts, shape, had, has, own if kept or wanted is None else wanted, search)


def _vision_task(
    origin: Source, name: str, shape: Shape, default: QuantSpec | None, wanted: mx.Dtype | None
) -> Task:
    """The tower stays as it is; only a conversion that leaves nothing quantized dequantizes it too."""
    had, parts = _parts_of(origin, name, shape)
    return Task(name, parts, shape, had, had if default else None, wanted or _own_dtype(parts, had))


def _parts_of(origin: Source, name: str, shape: Shape) -> tuple[QuantSpec | None, dict[str, AnyPart]]:
    """How one of our tensors is quantized in the source, and what holds it there."""
    if name.endswith(".weight"):
        return origin.held(name.removesuffix(".weight"), shape)
    return None, {"weight": origin.parts[name]}


def _own_dtype(parts: Mapping[str, AnyPart], had: QuantSpec | None) -> mx.Dtype:
    if had is None:
        return _DTYPES[parts["weight"].dtype]
    return _DTYPES.get(parts["scales"].dtype, mx.bfloat16)  # the mx modes' scales do not say what the weight once had


def _mtp_tasks(found: MtpTensors, wanted: mx.Dtype | None) -> Iterable[Task]:
    """They go over unquantized: one layer, and nobody would know how it is quantized."""
    shapes = mtp_tensors(found.config, found.layers)
    used: set[str] = set()
    for name in found.weights:
        made = found.module(name, shapes.get(name))
        if isinstance(made, str):
            raise CheckpointError(f"{found.folder}: {made}. Download the files again")
        spec, parts = made
        used |= {entry.name for part in parts.values() for entry in part.entries}
        if spec is not None:
            group = {ours.rpartition(".")[2]: part for ours, part in parts.items()}
            yield Task(name, group, _unpacked_shape(group, spec), spec, None, wanted or _own_dtype(group, spec))
            continue
        part = parts[name]
        if part.dtype not in _DTYPES:
            raise CheckpointError(
                f"{part.entries[0]} has dtype {part.dtype}, and its scales are missing: download the files again"
            )
        yield Task(name, {"weight": part}, part.shape, None, None, wanted or _DTYPES[part.dtype])
    unused = found.form.unused if found.form else ()
    over = next((e for name, e in found.entries.items() if name not in used and not name.endswith(unused)), None)
    if over:
        raise CheckpointError(f"{over} is left over beside the text model: download the files again")


def _unpacked_shape(parts: Mapping[str, AnyPart], spec: QuantSpec) -> Shape:
    """What a quantized tensor had been, if its shapes agree with how it is said to be quantized."""
    weight, scales = parts["weight"], parts["scales"]
    width = scales.shape[-1] * spec.group_size
    if weight.dtype != "U32" or weight.shape != (*scales.shape[:-1], width * spec.bits // 32):
        raise CheckpointError(
            f"{weight.entries[0]} is quantized, and config.json's quantization does not say so, or says it otherwise: "
            "restore the config.json that came with it, or take the unquantized checkpoint"
        )
    return (*scales.shape[:-1], width)


def _forms(tensors: Iterable[Entry | TensorSpec]) -> set[tuple[str, str, Shape]]:
    return {(tensor.name, tensor.dtype, tuple(tensor.shape)) for tensor in tensors}


def _as_json(spec: QuantSpec) -> dict[str, Any]:
    return {"group_size": spec.group_size, "bits": spec.bits, "mode": spec.mode}
