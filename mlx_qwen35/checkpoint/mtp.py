"""The MTP layer of a checkpoint: in its shards, in a file beside them, or in a drafter of mlx-vlm.

Knows where its tensors lie, how they are named and packed there, and makes an MTPHead of them. A drafter is a folder of
its own (model_type qwen3_5_mtp) whose names lack "mtp." and whose config.json has a quantization of its own.

Writers disagree about the head's norms: some copy them zero-centred, as they were trained, into a checkpoint whose
other norms are scales. Their values decide where they tell, whoever wrote them; else what is known of the writer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_qwen35.checkpoint import beside, files, norms
from mlx_qwen35.checkpoint.beside import MTP_FILE
from mlx_qwen35.checkpoint.files import Entry, TensorFiles
from mlx_qwen35.checkpoint.forms.face import Form, Published
from mlx_qwen35.checkpoint.inventory import Shape, is_linear, mtp_tensors
from mlx_qwen35.checkpoint.load import Progress, check_experts, compute_dtype, read_config, read_weights, specs_of
from mlx_qwen35.checkpoint.names import HF, MLX, MTP_PREFIXES, Layout, head_layout, is_centred, is_mtp, weight_of
from mlx_qwen35.checkpoint.packing import Told, check_version
from mlx_qwen35.checkpoint.part import FLOATS, AnyPart, make_part
from mlx_qwen35.checkpoint.quantize import packed
from mlx_qwen35.checkpoint.source import Source, open_source
from mlx_qwen35.config import ModelConfig, QuantSpec
from mlx_qwen35.config.fields import Fields
from mlx_qwen35.config.quantization import read_section
from mlx_qwen35.errors import CheckpointError
from mlx_qwen35.model.mtp import MTPHead

DRAFTER = "qwen3_5_mtp"  # the model_type of mlx-vlm's drafters
_LAYER = re.compile(r"mtp\.layers\.(\d+)\.")
_PACKED = re.compile(r"\.(scales|biases)$")
_EXTRA = "model_extra_tensors.safetensors"
# How the norms are written, by the file that they lie in, where its writers agree.
_WRITTEN = {"optiq/mtp.safetensors": HF}
# Where a config.json says it, and the words for zero-centred.
_ENCODINGS = ("mtplx_mtp_norm_encoding", "mtp_norm_encoding")
_OWN_ENCODINGS = ("norm_encoding", "norm_weight_encoding")
_CENTRED = ("delta", "delta_plus_one", "mlx_delta")


@dataclass(frozen=True)
class Norms:
    """How a head's norms are written: "hf", zero-centred, or "mlx", scales.

    rule: by their writer; seen: by their values; None: not known.
    """

    rule: str | None
    seen: str | None

    @property
    def chosen(self) -> str:
        return self.seen or self.rule or MLX

    @property
    def sure(self) -> bool:
        """Whether writer and values say the same."""
        return self.rule is not None and self.rule == self.seen


@dataclass(frozen=True)
class MtpTensors:
    """Where the tensors lie, under the names mtp.*.

    config: of their model; told: how modules are quantized; form: as in Source; paths: the files they lie in.
    """

    folder: Path
    entries: dict[str, Entry]
    layout: Layout
    config: ModelConfig
    told: Told
    norms: Norms
    form: Form | None = None

    @property
    def paths(self) -> list[Path]:
        return sorted({entry.file for entry in self.entries.values()})

    @property
    def layers(self) -> int:
        """How many decoder layers it has; a damaged number must not grow a list that no file could hold."""
        numbers = (int(at[1]) for name in self.entries if (at := _LAYER.match(name)))
        return min(1 + max(numbers, default=0), len(self.entries))

    @property
    def experts(self) -> int:
        return self.config.text.moe.num_experts if self.config.text.moe else 0

    @property
    def weights(self) -> list[str]:
        """Our names of what is there, each quantized module as one."""
        endings = self.form.endings if self.form else ()
        plain = (_PACKED.sub(".weight", weight_of(name, endings)) for name in self.entries)
        return list(dict.fromkeys(ours for name in plain for ours in self.layout.ours(name)))

    def part(self, ours: str) -> AnyPart | str:
        """How one of our tensors is made, or what is wrong with it, in words."""
        part = make_part(ours, self.entries, self.layout, self.experts)
        if isinstance(part, str):
            return f"{part} is missing beside its neighbours"
        mixed = next((entry for entry in part.entries if entry.dtype != part.dtype), None)
        if mixed:
            return f"{mixed} has dtype {mixed.dtype}, its neighbours {part.dtype}"
        return part

    def module(self, name: str, shape: Shape | None) -> tuple[QuantSpec | None, dict[str, AnyPart]] | str:
        """(how a weight is quantized, None: not; what makes it, by our names), or what is wrong with it, in words.

        shape: of the unquantized weight; None where the model has none of that name.
        """
        stem = name.removesuffix(".weight")
        if self.form is not None:
            published = Published(self.entries, self.layout, self.experts)
            if shape is None:
                return f"{name} has no part of its own"
            made = self.form.make(name, shape, published)
            if made is not None:
                return made[0] if isinstance(made, list) else (made.spec, dict(made.parts))
        path = self.layout.source(name, 1).names[0].removesuffix(".weight")
        weight, scales = (self.entries.get(f"{path}.{kind}") for kind in ("weight", "scales"))
        kinds, spec = ("weight",), None
        if weight and scales:
            try:
                width = shape[-1] if shape else scales.shape[-1] * self.told.spec(stem).group_size
                spec = self.told.packed_as(stem, path, width, weight, scales)
            except (ValueError, AttributeError, IndexError) as problem:
                return str(problem) if isinstance(problem, ValueError) else f"{scales} belongs to no module"
            kinds = ("weight", "scales", "biases") if spec.mode == "affine" else ("weight", "scales")
        found: dict[str, AnyPart] = {}
        for ours in [name] if spec is None else [f"{stem}.{kind}" for kind in kinds]:
            part = self.part(ours)
            if isinstance(part, str):
                return part
            found[ours] = part
        return spec, found


def find_mtp(origin: Source) -> MtpTensors:
    """Those of a checkpoint; no entries where it has none. Raises CheckpointError if they are in two places."""
    shards, place = _place(origin)
    if place is None:
        rule = HF if origin.layout.values == HF else None
        return _head(origin.folder, shards, origin.config, _told(origin.config), rule, origin.form)
    path = origin.folder / place
    if _is_drafter_inside(origin, path):
        return _open_drafter(path.parent)
    found = files.open_file(path)
    rule = _WRITTEN.get(place) or _marked(found, path == origin.folder / MTP_FILE)
    if place == _EXTRA:
        found = replace(found, entries={n: e for n, e in found.entries.items() if n.startswith(MTP_PREFIXES)})
        rule = origin.layout.values
    form = origin.form if place == _EXTRA else None
    return _head(origin.folder, found.entries, origin.config, _told(origin.config), rule, form, str(path))


def mtp_bytes(origin: Source) -> int:
    """Of the MTP layer of a checkpoint, by headers alone; 0: it has none."""
    try:
        shards, place = _place(origin)
    except CheckpointError:  # it is there twice, which is no matter until it is asked for
        return sum(entry.nbytes for name, entry in origin.files.entries.items() if origin.layout.is_mtp(name))
    entries = shards if place is None else files.read_header(origin.folder / place)[0]
    return sum(entry.nbytes for entry in entries.values())


def _place(origin: Source) -> tuple[dict[str, Entry], str | None]:
    """The MTP tensors in the shards, and the file beside them that goes before those, if one does."""
    raw = origin.config.raw
    shards = {name: entry for name, entry in origin.files.entries.items() if origin.layout.is_mtp(name)}
    places = beside.mtp_files(raw, beside.Folder(origin.folder))
    places = [name for name in places if origin.folder / name not in {entry.file for entry in shards.values()}]
    if shards and places and places != [beside.named_mtp_file(raw)]:  # which is the writer's own word
        raise CheckpointError(f"{origin.folder} has MTP tensors in its shards and in {places[0]}: keep one of them")
    return shards, next(iter(places), None)


def _is_drafter_inside(origin: Source, path: Path) -> bool:
    return path.parent != origin.folder and is_drafter(path.parent)


@dataclass(frozen=True)
class OpenedHead:
    """A head in a folder, held against the config of its model; no weight of it is read but its norms.

    parts: our tensors, under the names mtp.*; specs: how its modules are quantized, by the same names.
    """

    folder: Path
    config: ModelConfig
    found: MtpTensors
    parts: dict[str, AnyPart]
    specs: dict[str, QuantSpec]

    @property
    def norms(self) -> Norms:
        return self.found.norms

    def load(self, dtype: mx.Dtype | str | None = None, on_progress: Progress | None = None) -> MTPHead:
        """The head; arguments and errors as in `load_mtp`."""
        compute = compute_dtype(dtype)
        check_experts(self.parts.values(), self.folder, compute)
        head = MTPHead(self.config.text, self.found.layers)
        if self.specs:
            named = {path.removeprefix("mtp."): spec for path, spec in self.specs.items()}
            nn.quantize(head, class_predicate=specs_of(named))
        head.load_weights(_read(list(self.parts.values()), compute, on_progress))
        head.eval()
        return head

    def read_norms(self, values: str, dtype: mx.Dtype | str | None = None) -> list[tuple[str, mx.array]]:
        """Its norms alone, as if they were written as "hf", zero-centred, or as "mlx", scales."""
        norms = [replace(part, shifted=values == HF) for name, part in self.parts.items() if is_centred(name)]
        return _read(norms, compute_dtype(dtype), None)


def mtp_specs(folder: str | Path, config: ModelConfig) -> tuple[int, dict[str, QuantSpec]]:
    """(layers of the head that `load_mtp` would load, how its modules are quantized); errors as there."""
    opened = open_head(folder, config)
    return opened.found.layers, opened.specs


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
    return open_head(folder, config).load(dtype, on_progress)


def _read(parts: list[AnyPart], compute: mx.Dtype, on_progress: Progress | None) -> list[tuple[str, mx.array]]:
    weights: list[tuple[str, mx.array]] = []
    try:
        read_weights(parts, compute, on_progress, weights)
    except BaseException:
        weights.clear()
        mx.clear_cache()
        raise
    return [(name.removeprefix("mtp."), weight) for name, weight in weights]


def open_head(folder: str | Path, config: ModelConfig) -> OpenedHead:
    """The head in a folder, held against its model's config; errors as in `load_mtp`."""
    folder = Path(folder)
    drafter = is_drafter(folder)
    own = None if drafter else read_config(folder)
    found = _open_drafter(folder) if drafter else find_mtp(open_source(folder, own))
    if not found.entries:
        named = own and beside.named_mtp_file(own.raw)
        if named:
            raise CheckpointError(
                f"{folder} has no MTP layer: its config.json names {named}, which is not there. Download that file, or "
                "load it without one"
            )
        raise CheckpointError(
            f"{folder} has no MTP layer (mtp.* tensors, in the shards or in {', '.join(beside.MTP_FILES[:4])}): load "
            "it without one, or take a conversion that keeps it"
        )
    found = replace(found, config=config)
    parts, specs, problems = _plan(found)
    if problems:
        shown = "".join(f"\n  {problem}" for problem in problems[:6])
        raise CheckpointError(f"{folder}: this MTP layer does not belong to this model:{shown}\nDownload it again")
    check_version(specs.values(), str(folder))
    return OpenedHead(folder, config, found, parts, specs)


def drafter_config(raw: Mapping[str, Any], where: str) -> ModelConfig:
    """What a drafter's config.json says of the text model that it belongs to, and how the head itself is quantized."""
    text = raw.get("text_config")
    if not isinstance(text, dict):
        raise CheckpointError(f"{where} has no text_config: split the drafter off again")
    kind = "qwen3_5_moe_text" if text.get("num_experts") else "qwen3_5_text"
    kept = {key: raw[key] for key in ("quantization", "quantization_config") if key in raw}
    return ModelConfig.from_dict({**text, **kept, "model_type": kind}, where=where)


def _open_drafter(folder: Path) -> MtpTensors:
    path = folder / "config.json"
    config = drafter_config(json.loads(path.read_bytes()), str(path))
    found = files.open_folder(folder)
    return _head(folder, found.entries, config, Told(config.quantization, "mtp."), _marked(found, True), None)


def _head(
    folder: Path,
    entries: Mapping[str, Entry],
    config: ModelConfig,
    told: Told,
    rule: str | None,
    form: Form | None,
    where: str | None = None,
) -> MtpTensors:
    """The tensors under the names mtp.*, whatever stands before those in the files."""
    endings = form.endings if form else ()
    prefix = next((p for p in MTP_PREFIXES if any(name.startswith(p) for name in entries)), "")
    stray = [name for name in entries if not name.startswith(prefix) or not (prefix or is_mtp(f"mtp.{name}", endings))]
    if stray:
        raise CheckpointError(f"{where} holds {stray[0]}, which is no MTP tensor: download or convert it again")
    renamed = {f"mtp.{name.removeprefix(prefix)}": entry for name, entry in entries.items()}
    renamed = {name: replace(entry, name=name) for name, entry in renamed.items()}
    known = Norms(_encoding(config.raw) or rule, norms.written(e for n, e in renamed.items() if is_centred(n)))
    layout = head_layout(renamed, known.chosen, where or str(folder), endings)
    return MtpTensors(folder, renamed, layout, config, told, known, form)


def _told(config: ModelConfig) -> Told:
    """How the head beside a model is quantized: by MTPLX's own section, then by the model's."""
    main = Told(config.quantization)
    section = Fields(config.raw, "config.json").values.get("mtplx_mtp_quantization")
    if not isinstance(section, Mapping):
        return main
    try:
        return Told(read_section(Fields(section, "config.json", "mtplx_mtp_quantization.")), "mtp.", main)
    except CheckpointError:  # it has notes only: shapes tell the rest
        return main


def _encoding(raw: Mapping[str, Any]) -> str | None:
    """What config.json says of the norms: "hf" for zero-centred; None where it does not."""
    section = raw.get("mtplx_mtp_quantization")
    said = [raw.get(key) for key in _ENCODINGS]
    said += [section.get(key) for key in _OWN_ENCODINGS] if isinstance(section, Mapping) else []
    return HF if any(isinstance(word, str) and word.strip().lower() in _CENTRED for word in said) else None


def _marked(found: TensorFiles, own: bool) -> str | None:
    """By the file's marker, where its writers keep to that. own: it lies where this package and mlx-vlm put it."""
    marker = next(iter(found.formats.values()), None)
    return {"mlx": MLX if own else None, "pt": HF}.get(marker)


def _plan(found: MtpTensors) -> tuple[dict[str, AnyPart], dict[str, QuantSpec], list[str]]:
    parts: dict[str, AnyPart] = {}
    specs: dict[str, QuantSpec] = {}
    problems: list[str] = []
    for name, shape in mtp_tensors(found.config, found.layers).items():
        made = found.module(name, shape)
        if isinstance(made, str):
            problems.append(made)
            continue
        spec, group = made
        module = name.removesuffix(".weight")
        if spec is not None and (not is_linear(name, shape) or shape[-1] % spec.group_size):
            problems.append(f"{name} is quantized, in groups that do not divide its rows")
            continue
        wanted: dict[str, tuple[Shape, tuple[str, ...]]] = {name: (shape, FLOATS)}
        if spec is not None:
            specs[module] = spec
            wanted = {f"{module}.{kind}": rest for kind, rest in packed(shape, spec).items()}
        for ours, part in group.items():
            ours_shape, dtypes = wanted[ours]
            if part.shape != ours_shape or part.dtype not in dtypes:
                entry = part.entries[0]
                problems.append(f"{entry} is {entry.dtype} {list(entry.shape)}, not as config.json has it")
            else:
                parts[ours] = part
    used = {entry.name for part in parts.values() for entry in part.entries}
    if not problems:
        unused = found.form.unused if found.form else ()
        left = (e for name, e in found.entries.items() if name not in used and not name.endswith(unused))
        problems += [f"{entry} is left over" for entry in left]
    return parts, specs, problems
