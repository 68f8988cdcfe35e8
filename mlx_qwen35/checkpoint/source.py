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
from mlx_qwen35.checkpoint.contents import Contents, open_contents
from mlx_qwen35.checkpoint.files import Entry, TensorFiles
from mlx_qwen35.checkpoint.fitting import misfit, missing
from mlx_qwen35.checkpoint.forms.face import Form, Published, named_dtype
from mlx_qwen35.checkpoint.forms.grids import global_scale
from mlx_qwen35.checkpoint.forms.table import READ_TODAY
from mlx_qwen35.checkpoint.forms.values import Values
from mlx_qwen35.checkpoint.inventory import FACTORS, SIGNS, Shape, is_linear, text_tensors, vision_tensors
from mlx_qwen35.checkpoint.names import Layout
from mlx_qwen35.checkpoint.norms import check_norms
from mlx_qwen35.checkpoint.packing import Told, check_version
from mlx_qwen35.checkpoint.packing import spec_of as spec_of
from mlx_qwen35.checkpoint.part import FLOATS, AnyPart, make_part
from mlx_qwen35.checkpoint.quantize import packed
from mlx_qwen35.config import ModelConfig, QuantSpec
from mlx_qwen35.errors import CheckpointError

# Endings that only tensors of other tools' quantizations have, and whose.
_FOREIGN = {
    ".weight_scale_inv": "FP8", "_proj_scale_inv": "FP8", ".weight_scale": "FP8", ".input_scale": "FP8",
    ".qweight": "GPTQ or AWQ", ".qzeros": "GPTQ or AWQ", ".g_idx": "GPTQ", ".weight_packed": "compressed-tensors",
    ".absmax": "bitsandbytes", ".global_scale": "nvfp4 with tensor scales", ".weight_scale_2": "NVIDIA ModelOpt",
}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """A checked checkpoint. parts: all of our tensors; specs: module -> its quantization in MLX's terms, where it has
    one. form: how another tool quantized it; its parts are floats, or packed as MLX packs, to whoever reads them.

    config.vision is None where the files hold no vision tower, as mlx-lm writes them whatever config.json says.
    """

    folder: Path
    config: ModelConfig
    files: TensorFiles
    layout: Layout
    parts: dict[str, AnyPart]
    specs: dict[str, QuantSpec]
    form: Form | None

    def carried(self, module: str) -> QuantSpec | None:
        """The quantization under which one of our modules can go over into another checkpoint as it is."""
        more = f"{module}{FACTORS}" in self.parts or f"{module}{SIGNS}" in self.parts
        return None if more else self.specs.get(module)

    def held(self, module: str, shape: Shape) -> tuple[QuantSpec | None, dict[str, AnyPart]]:
        """How one of our modules, of unquantized `shape`, can go over, and what holds it; None: as floats."""
        spec, carried = self.specs.get(module), self.carried(module)
        if spec is None:
            return None, {"weight": self.parts[f"{module}.weight"]}
        kinds = ("weight", "scales", "biases", FACTORS[1:])
        found = {kind: part for kind in kinds if (part := self.parts.get(f"{module}.{kind}"))}
        if carried is not None:
            return carried, found
        signs = self.parts.get(f"{module}{SIGNS}")
        block = self.form.blocks[module] if signs is not None else 0
        dtype = named_dtype(self.config.raw)
        return None, {"weight": Values(f"{module}.weight", found, spec, shape, dtype, signs, block)}

    @property
    def streamable(self) -> bool:
        """Whether experts, where there are any, can be read from where they lie."""
        return all(part.passing for part in self.parts.values() if ".mlp.experts." in part.ours)

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
    contents = open_contents(folder, config)
    folder, config, found, layout = contents.path, contents.config, contents.files, contents.layout
    if not any(name.startswith(layout.vision) for name in found.entries):
        config = replace(config, vision=None)
    parts, specs, problems = _plan(replace(contents, config=config))
    used = {entry.name for part in parts.values() for entry in part.entries}
    head = _redundant_head(config, found, layout)
    unused = contents.form.unused if contents.form else ()
    over = [n for n in found.entries if n not in used and n not in head and not n.endswith(unused)]
    over = [name for name in over if not _may_lie_beside(name, config, layout)]
    problems += [_left_over(found.entries[name], config, layout, contents.form) for name in over]
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
    return Source(folder, config, found, layout, parts, specs, contents.form)


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


def _plan(contents: Contents) -> tuple[dict[str, AnyPart], dict[str, QuantSpec], list[str]]:
    config, layout, entries = contents.config, contents.layout, contents.files.entries
    parts: dict[str, AnyPart] = {}
    specs: dict[str, QuantSpec] = {}
    problems: list[str] = []
    told = Told(config.quantization)
    published = Published(entries, layout, config.text.moe.num_experts if config.text.moe else 0)
    for name, shape in (text_tensors(config) | vision_tensors(config)).items():
        linear = is_linear(name, shape)
        module = name.removesuffix(".weight")
        made = contents.form.make(name, shape, published) if contents.form else None
        if isinstance(made, list):
            problems += made
            continue
        if made is not None:
            parts |= made.parts
            if made.spec is not None:
                specs[module] = made.spec
            continue
        wanted = {name: (shape, FLOATS)}
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
            beside = entries.get(f"{path}.global_scale") if spec.mode == "nvfp4" else None
            if beside is not None:
                scale = global_scale(module, shape, beside)
                if isinstance(scale, str):
                    problems.append(scale)
                    continue
                parts[scale.ours] = scale
        for ours, (ours_shape, dtypes) in wanted.items():
            part = make_part(ours, entries, layout, published.experts)
            if isinstance(part, str):
                problems.append(missing(part, ours, ours_shape, dtypes, layout))
                continue
            problem = misfit(part, ours_shape, dtypes, specs.get(module))
            if problem:
                problems.append(problem)
            parts[ours] = part
    return parts, specs, problems


def _may_lie_beside(name: str, config: ModelConfig, layout: Layout) -> bool:
    """Whether a tensor is one of a part that is not read: MTP, or a vision tower that config.json does not describe."""
    return layout.is_known(name) and (config.vision is None or not name.startswith(layout.vision))


def _left_over(entry: Entry, config: ModelConfig, layout: Layout, form: Form | None) -> str:
    tool = next((tool for ending, tool in _FOREIGN.items() if entry.name.endswith(ending)), None)
    reason = form.left_over(entry) if form else None
    if reason:
        return reason
    if tool:
        return (
            f"{entry} is part of a quantization ({tool}) that config.json does not describe or that is not supported "
            f"yet. {READ_TODAY}"
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
