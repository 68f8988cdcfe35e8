"""A checkpoint folder as a source of our tensors: checked whole, then read one tensor at a time.

Knows which published tensors make which of ours, and holds them against config.json. Knows no Model and writes nothing.
open_source() reads headers, and no weight where they are clear; every complaint about what they say comes from there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlx_qwen35.checkpoint import files
from mlx_qwen35.checkpoint.beside import with_tower
from mlx_qwen35.checkpoint.files import Entry, TensorFiles
from mlx_qwen35.checkpoint.forms import fp8, gptq, modelopt
from mlx_qwen35.checkpoint.forms.fp8 import Fp8, Fp8Part
from mlx_qwen35.checkpoint.forms.gptq import Gptq, GptqPart
from mlx_qwen35.checkpoint.inventory import Shape, is_linear, text_tensors, vision_tensors
from mlx_qwen35.checkpoint.names import HF, MLX, MTP_PREFIXES, TOWERS, Layout, find_layout
from mlx_qwen35.checkpoint.norms import check_norms
from mlx_qwen35.checkpoint.packing import Told, check_version
from mlx_qwen35.checkpoint.packing import spec_of as spec_of
from mlx_qwen35.checkpoint.part import FLOATS, Part, make_part
from mlx_qwen35.checkpoint.quantize import packed
from mlx_qwen35.config import ModelConfig, QuantSpec
from mlx_qwen35.errors import CheckpointError

AnyPart = Part | Fp8Part | GptqPart

# Endings that only tensors of other tools' quantizations have, and whose.
_FOREIGN = {
    ".weight_scale_inv": "FP8", "_proj_scale_inv": "FP8", ".weight_scale": "FP8", ".input_scale": "FP8",
    ".qweight": "GPTQ or AWQ", ".qzeros": "GPTQ or AWQ", ".g_idx": "GPTQ", ".weight_packed": "compressed-tensors",
    ".absmax": "bitsandbytes", ".global_scale": "nvfp4 with tensor scales", ".weight_scale_2": "NVIDIA ModelOpt",
}  # fmt: skip
_TODAY = (
    "This package reads BF16, FP16 and FP32 checkpoints, FP8 with scales of 128 x 128 blocks, symmetric GPTQ and "
    "AutoRound, and MLX (affine, mxfp4, mxfp8, nvfp4): take the unquantized checkpoint of the same model, or an MLX "
    "conversion of it"
)


@dataclass(frozen=True)
class Source:
    """A checked checkpoint. parts: all of our tensors; specs: module -> its quantization in MLX's terms, where it has
    one. foreign: how another tool quantized it: FP8 parts are plain floats to whoever reads them, GPTQ's are affine.

    config.vision is None where the files hold no vision tower, as mlx-lm writes them whatever config.json says.
    """

    folder: Path
    config: ModelConfig
    files: TensorFiles
    layout: Layout
    parts: dict[str, AnyPart]
    specs: dict[str, QuantSpec]
    foreign: Fp8 | Gptq | None

    def check_norms(self) -> None:
        """Raises CheckpointError where norms are not as the layout has them; to be called before weights are read."""
        check_norms(self.layout, self.files)

    def beside(self) -> list[str]:
        """The published names of what is in the files besides the text model: vision and MTP tensors."""
        return [name for name in self.files.entries if self.layout.is_known(name)]


def open_source(folder: str | Path, config: ModelConfig | None = None) -> Source:
    """Check config.json and every header against each other; raises CheckpointError and reads no weight.

    The exceptions are some norms, where it is not clear who wrote the values, and a head beside tied embeddings, which
    must be the embeddings again: those two are compared.
    """
    folder = Path(folder)
    config = config or ModelConfig.from_folder(folder)
    foreign = _foreign(folder, config)
    found = with_tower(files.open_folder(folder), config.raw)
    layout = _layout(found)
    if not any(name.startswith(layout.vision) for name in found.entries):
        config = replace(config, vision=None)
    if foreign and (layout.kind == MLX or layout.packed):
        raise CheckpointError(
            f"{folder / 'config.json'} says quant_method {config.source_quantization['quant_method']!r}, but the files "
            "have MLX's layout: restore the config.json that came with them, or convert the original again"
        )
    modelopt.check(folder, config, found)
    parts, specs, problems = _plan(config, found, layout, foreign)
    used = {entry.name for part in parts.values() for entry in part.entries}
    head = _redundant_head(config, found, layout)
    over = [n for n in found.entries if n not in used and n not in head and not _may_lie_beside(n, config, layout)]
    problems += [_left_over(found.entries[name], config, layout, foreign) for name in over]
    if problems:
        shown = "".join(f"\n  {problem}" for problem in problems[:6])
        if len(problems) > 6:
            shown += f"\n  ... and {len(problems) - 6} more"
        raise CheckpointError(
            f"{folder}: weights and config.json do not belong together (layout: {layout.label}):{shown}\n"
            "Download the checkpoint again; if it was converted, convert the original again"
        )
    _check_head(config, found, layout, head)
    if layout.doubt:
        check_norms(layout, found)
    check_version(specs.values(), str(folder))
    return Source(folder, config, found, layout, parts, specs, foreign)


def _layout(found: TensorFiles) -> Layout:
    """Markers count of those files only that hold something of the text model: a tower may be another writer's."""
    main = [entry for name, entry in found.entries.items() if not name.startswith((*TOWERS, *MTP_PREFIXES))]
    holding = {file.relative_to(found.folder).as_posix() for file in {entry.file for entry in main}}
    formats = [found.formats[name] for name in found.formats if name in holding]
    convolutions = {entry.shape for entry in main if entry.name.endswith("linear_attn.conv1d.weight")}
    return find_layout(found.entries, formats, str(found.folder), convolutions)


def read_parts(parts: Iterable[AnyPart]) -> Iterator[tuple[AnyPart, Any]]:
    """Fetch parts in order, each while the one before is worked on: at most two are in memory at a time."""
    with ThreadPoolExecutor(1) as reader:
        waiting = None
        for part in parts:
            coming = part, reader.submit(part.fetch)
            if waiting:
                yield waiting[0], waiting[1].result()
            waiting = coming
        if waiting:
            yield waiting[0], waiting[1].result()


def _plan(
    config: ModelConfig, found: TensorFiles, layout: Layout, foreign: Fp8 | Gptq | None
) -> tuple[dict[str, AnyPart], dict[str, QuantSpec], list[str]]:
    parts: dict[str, AnyPart] = {}
    specs: dict[str, QuantSpec] = {}
    problems: list[str] = []
    entries = found.entries
    told = Told(config.quantization)
    experts = config.text.moe.num_experts if config.text.moe else 0
    for name, shape in (text_tensors(config) | vision_tensors(config)).items():
        linear = is_linear(name, shape)
        module = name.removesuffix(".weight")
        if isinstance(foreign, Gptq) and linear and not name.startswith("vision."):
            stems = gptq.stems(name, entries, layout, experts)
            if stems:
                made = gptq.make_parts(name, shape, stems, entries, foreign)
                if isinstance(made, list):
                    problems += made
                else:
                    parts |= made
                    specs[module] = made[name].gptq.spec
                continue
        wanted = {name: (shape, (*FLOATS, fp8.CODES) if isinstance(foreign, Fp8) and linear else FLOATS)}
        path = layout.source(name, 1).names[0].removesuffix(".weight")
        if linear and layout.packed and f"{path}.scales" in entries and f"{path}.weight" in entries:
            try:
                spec = told.packed_as(module, path, shape[-1], entries[f"{path}.weight"], entries[f"{path}.scales"])
            except ValueError as problem:
                problems.append(str(problem))
                continue
            specs[module] = spec
            if shape[-1] % spec.group_size:
                problems.append(
                    f"{path} has rows of {shape[-1]}, which groups of {spec.group_size} (config.json) do not divide"
                )
                continue
            wanted = {f"{module}.{kind}": rest for kind, rest in packed(shape, spec).items()}
        for ours, (ours_shape, dtypes) in wanted.items():
            part: AnyPart | str = make_part(ours, entries, layout, experts)
            if isinstance(part, str):
                problems.append(_missing(part, ours, ours_shape, dtypes, layout))
                continue
            problem = _misfit(part, ours_shape, dtypes, specs.get(module))
            if not problem and part.dtype == fp8.CODES:
                scaled = fp8.with_scales(part, entries, foreign)
                if isinstance(scaled, str):
                    problem = scaled
                else:
                    part = scaled
            if problem:
                problems.append(problem)
            parts[ours] = part
    return parts, specs, problems


def _missing(name: str, ours: str, shape: Shape, dtypes: tuple[str, ...], layout: Layout) -> str:
    hint = ""
    if ours == "lm_head.weight":
        hint = "; if the model uses its embeddings as the head, set tie_word_embeddings to true in config.json"
    if ".experts." in ours and layout.kind == HF and name.endswith(".weight"):
        hint = "; experts of other numbers are there, see num_experts"
    return f"{name} is in none of the files (expected {'/'.join(dtypes)} {_published(ours, shape, layout)}){hint}"


def _published(ours: str, shape: Shape, layout: Layout) -> list[int]:
    """Our shape as the published tensor would have it."""
    origin = layout.source(ours, 1)
    axes = layout.axes(ours)
    if axes:
        shape = tuple(shape[axes.index(axis)] for axis in range(len(axes)))
    if origin.half is not None:
        shape = (shape[0], 2 * shape[1], *shape[2:])
    return list(shape[1:] if origin.stacked else shape)


def _misfit(part: Part, shape: Shape, dtypes: tuple[str, ...], spec: QuantSpec | None) -> str | None:
    """What is wrong with the shape or dtype of a part's published tensors; None if nothing is."""
    first = part.entries[0]
    for entry in part.entries:
        if entry.dtype not in dtypes or entry.dtype != first.dtype:
            wanted = "/".join(dtypes) if entry.dtype not in dtypes else f"{first.dtype} as its neighbours"
            hint = ""
            if entry.dtype.startswith("F8") and fp8.CODES not in dtypes:
                hint = ": FP8 is read in linear maps only, and where config.json's quantization_config says so"
            return f"{entry} has dtype {entry.dtype}, expected {wanted}{hint}"
        if entry.shape != first.shape:
            return f"{entry} has shape {list(entry.shape)}, its neighbours have {list(first.shape)}"
    odd = part.half is not None and (len(first.shape) < 2 or first.shape[1] % 2)
    if part.shape == shape and not odd:
        return None
    if part.stacked and part.shape[0] != shape[0] and part.shape[1:] == shape[1:]:
        return f"{first} and its neighbours are {part.shape[0]} experts, config.json says {shape[0]}"
    expected = list(shape[1:] if part.stacked else shape)
    if part.half is not None:
        expected[1] *= 2
    if part.axes:
        expected = [shape[part.axes.index(axis)] for axis in range(len(shape))]
    how = f" ({spec.bits} bits, group_size {spec.group_size}, {spec.mode} by config.json)" if spec else ""
    return f"{first} has shape {list(first.shape)}, expected {expected}{how}"


def _may_lie_beside(name: str, config: ModelConfig, layout: Layout) -> bool:
    """Whether a tensor is one of a part that is not read: MTP, or a vision tower that config.json does not describe."""
    return layout.is_known(name) and (config.vision is None or not name.startswith(layout.vision))


def _left_over(entry: Entry, config: ModelConfig, layout: Layout, foreign: Fp8 | Gptq | None) -> str:
    tool = next((tool for ending, tool in _FOREIGN.items() if entry.name.endswith(ending)), None)
    if isinstance(foreign, Fp8) and entry.name.endswith(fp8.SUFFIX):
        return f"{entry} is left over: its weight is missing or not FP8"
    if isinstance(foreign, Gptq) and entry.name.endswith(tuple(f".{kind}" for kind in gptq.KINDS)):
        return f"{entry} is left over: GPTQ is read in linear maps of the text model only, and has no part of its own"
    if tool:
        return (
            f"{entry} is part of a quantization ({tool}) that config.json does not describe or that is not supported "
            f"yet. {_TODAY}"
        )
    named = layout.ours(entry.name)
    hint = "no part of this model has that name"
    if named and named[0].startswith("layers."):
        number, layers = named[0].split(".")[1], config.text.num_hidden_layers
        if number.isdigit() and int(number) >= layers:
            hint = f"config.json says num_hidden_layers {layers}"
        elif named[0].endswith((".scales", ".biases")):
            hint = "its module is not quantized: either scales are missing, or this is left over"
    elif named and named[0].startswith("vision.blocks.") and config.vision:
        hint = f"config.json's vision_config says depth {config.vision.depth}"
    return f"{entry} ({entry.dtype} {list(entry.shape)}) is left over: {hint}"


def _foreign(folder: Path, config: ModelConfig) -> Fp8 | Gptq | None:
    """How another tool quantized the checkpoint, by config.json; raises CheckpointError where that is not read."""
    section, where = config.source_quantization, str(folder / "config.json")
    if section is None:
        return None
    method = section.get("quant_method")
    algorithm = modelopt.algorithm(section)
    if algorithm:
        raise modelopt.refused(where, algorithm)
    if method == "fp8":
        return fp8.read_config(section, config.raw, where)
    if method in gptq.METHODS:
        return gptq.read_config(section, where)
    raise CheckpointError(f"{where}: quant_method is {method!r:.40}, which is not supported yet. {_TODAY}")


def _redundant_head(config: ModelConfig, found: TensorFiles, layout: Layout) -> dict[str, str]:
    """Head tensors in a checkpoint whose head is tied, with the embedding tensors that they should repeat."""
    if not config.text.tie_word_embeddings:
        return {}
    pairs = {f"{layout.head}{kind}": f"{layout.text}embed_tokens.{kind}" for kind in ("weight", "scales", "biases")}
    return {head: embedding for head, embedding in pairs.items() if head in found.entries}


def _check_head(config: ModelConfig, found: TensorFiles, layout: Layout, head: dict[str, str]) -> None:
    for name, embedding in head.items():
        a, b = found.entries[name], found.entries.get(embedding)
        if b is None or (a.dtype, a.shape) != (b.dtype, b.shape) or not _equal(a, b):
            raise CheckpointError(
                f"{found.folder}: config.json ties the head to the embeddings (tie_word_embeddings), but {a} is not "
                f"equal to {embedding}. Set tie_word_embeddings to false to use the head of the file, or remove it"
            )


def _equal(a: Entry, b: Entry) -> bool:
    step = max(1, (1 << 26) // max(1, math.prod(a.shape[1:])))
    rows = a.shape[0] if a.shape else 1
    return all(
        files.read(a, lo, min(lo + step, rows)).tobytes() == files.read(b, lo, min(lo + step, rows)).tobytes()
        for lo in range(0, rows, step)
    )
