"""Block drafters in a folder: as they are published, as mlx-vlm converts them, and as this package does.

Knows where their tensors lie, what those are called, and makes a BlockDraftModel of them. All is held against the
drafter's config.json, and that against the target's, before a weight is read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_qwen35.blocks.config import BlockConfig, is_block_drafter
from mlx_qwen35.blocks.drafter import BlockDraftModel
from mlx_qwen35.checkpoint import files
from mlx_qwen35.checkpoint.files import Entry
from mlx_qwen35.checkpoint.inventory import Shape
from mlx_qwen35.checkpoint.load import Progress, compute_dtype, read_weights, specs_of
from mlx_qwen35.checkpoint.packing import Told, check_version
from mlx_qwen35.checkpoint.part import FLOATS, Part
from mlx_qwen35.checkpoint.quantize import packed
from mlx_qwen35.config import ModelConfig, QuantSpec
from mlx_qwen35.errors import CheckpointError
from mlx_qwen35.text.files import read_json_object

_PREFIX = "model."
CODEBOOKS = tuple(f"candidate_selector.{name}_codebook" for name in ("predecessor", "successor"))
_KERNELS = ".base_kernel"
_TARGETS_OWN = "embed_tokens."  # some files have a copy of the target's embedding, which is in memory already
_LAYER_NORMS = "input_layernorm", "post_attention_layernorm"


@dataclass(frozen=True)
class OpenedBlocks:
    """A drafter in a folder, held against its config.json; no weight of it is read.

    parts: our tensors by our names; specs: how modules are quantized; shapes: of all weights, unquantized.
    """

    folder: Path
    raw: Mapping[str, Any]
    config: BlockConfig
    parts: dict[str, Part]
    specs: dict[str, QuantSpec]
    shapes: dict[str, Shape]

    def load(self, dtype: mx.Dtype | str | None = None, on_progress: Progress | None = None) -> BlockDraftModel:
        """The module; dtype, on_progress: as in `load_model`."""
        compute = compute_dtype(dtype)
        model = BlockDraftModel(self.config)
        if self.specs:
            nn.quantize(model, class_predicate=specs_of(self.specs))
        weights: list[tuple[str, mx.array]] = []
        try:
            read_weights(list(self.parts.values()), compute, on_progress, weights)
            model.load_weights(weights)
        except BaseException:
            weights.clear()
            mx.clear_cache()
            raise
        for layer in model.layers:
            layer.mlp.join()
        model.eval()
        return model


def is_blocks(folder: str | Path) -> bool:
    """Whether a folder is that of a block drafter, of a kind that is read or of another."""
    try:
        return is_block_drafter(json.loads((Path(folder) / "config.json").read_bytes()))
    except (OSError, ValueError, RecursionError):
        return False


def read_blocks_config(folder: str | Path) -> BlockConfig:
    """What config.json of a drafter says; raises CheckpointError."""
    return BlockConfig.from_dict(read_json_object(Path(folder) / "config.json"), str(Path(folder) / "config.json"))


def load_blocks(
    folder: str | Path,
    target: ModelConfig,
    *,
    dtype: mx.Dtype | str | None = None,
    on_progress: Progress | None = None,
) -> BlockDraftModel:
    """The drafter in a folder for a model of this config. Raises CheckpointError, before a weight is read, for one of
    another model or kind, and where a tensor is missing, left over, or not as config.json has it."""
    read_blocks_config(folder).check(target, str(folder))
    opened = open_blocks(folder)
    check_version(opened.specs.values(), str(folder))
    return opened.load(dtype, on_progress)


def open_blocks(folder: str | Path) -> OpenedBlocks:
    """The drafter in a folder, whatever it drafts for; raises CheckpointError as `load_blocks`."""
    folder = Path(folder)
    raw = read_json_object(folder / "config.json")
    config = BlockConfig.from_dict(raw, str(folder / "config.json"))
    entries = {_ours(name): entry for name, entry in files.open_folder(folder).entries.items()}
    entries = {name: entry for name, entry in entries.items() if not name.startswith(_TARGETS_OWN)}
    told, shapes = Told(config.quantization), blocks_tensors(config)
    parts: dict[str, Part] = {}
    specs: dict[str, QuantSpec] = {}
    problems: list[str] = []
    for name, shape in shapes.items():
        found = _made(name, shape, entries, told)
        if isinstance(found, str):
            problems.append(found)
            continue
        spec, made = found
        parts |= made
        if spec is not None:
            specs[name.removesuffix(".weight")] = spec
    used = {entry.name for part in parts.values() for entry in part.entries}
    if not problems:
        problems += [f"{entry} is left over" for entry in entries.values() if entry.name not in used]
    if problems:
        shown = "".join(f"\n  {problem}" for problem in problems[:6])
        raise CheckpointError(
            f"{folder}: these are not the weights of a {config.kind} drafter as config.json describes it:{shown}\n"
            "Download it again"
        )
    return OpenedBlocks(folder, raw, config, parts, specs, shapes)


def blocks_tensors(config: BlockConfig) -> dict[str, Shape]:
    """Every weight of a drafter, under our names."""
    hidden, inner, dim = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.heads * dim, config.kv_heads * dim
    shapes: dict[str, Shape] = {"fc.weight": (hidden, len(config.taps) * hidden)}
    shapes |= {f"{name}.weight": (hidden,) for name in ("hidden_norm", "norm")}
    layer: dict[str, Shape] = {f"{name}.weight": (hidden,) for name in _LAYER_NORMS}
    layer |= {f"self_attn.{name}_norm.weight": (dim,) for name in "qk"}
    layer |= {"self_attn.q_proj.weight": (queries, hidden), "self_attn.o_proj.weight": (hidden, queries)}
    layer |= {f"self_attn.{name}_proj.weight": (keys, hidden) for name in "kv"}
    layer |= {f"mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
    layer["mlp.down_proj.weight"] = (hidden, inner)
    if config.sinks:
        layer["self_attn.attention_sink_bias"] = (config.heads,)
    if config.convolution is not None:
        length, group = config.convolution
        for name in ("attention_conv", "mlp_conv"):
            layer[f"{name}{_KERNELS}"] = (2, length, hidden)
            layer[f"{name}.kernel_projection.weight"] = (2 * length * hidden // group, hidden)
    for number in range(config.layers):
        shapes |= {f"layers.{number}.{name}": shape for name, shape in layer.items()}
    if config.selector is not None:
        rank = config.selector[0]
        shapes |= {f"{name}.weight": (config.vocab_size, rank) for name in CODEBOOKS}
        shapes["candidate_selector.hidden_projection.weight"] = (rank, hidden)
    return shapes


def is_packable(name: str, shape: Shape) -> bool:
    """Whether MLX may have a weight quantized."""
    return name.endswith(".weight") and len(shape) == 2


def _ours(name: str) -> str:
    name = name.removeprefix(_PREFIX)
    return f"{name}.weight" if name in CODEBOOKS else name


def _made(
    name: str, shape: Shape, entries: Mapping[str, Entry], told: Told
) -> tuple[QuantSpec | None, dict[str, Part]] | str:
    """(how a weight is quantized, None: not; what makes it, by our names), or what is wrong with it, in words."""
    stem = name.removesuffix(".weight")
    weight, scales = entries.get(name), entries.get(f"{stem}.scales")
    if weight is None:
        return f"{name} is missing"
    spec = None
    if scales is not None and name != stem:
        try:
            spec = told.packed_as(stem, stem, shape[-1], weight, scales)
        except ValueError as problem:
            return str(problem)
        if not is_packable(name, shape) or shape[-1] % spec.group_size:
            return f"{name} is quantized, in groups that do not divide its rows"
    wanted = {"weight": (shape, FLOATS)} if spec is None else packed(shape, spec)
    parts: dict[str, Part] = {}
    for kind, (its_shape, dtypes) in wanted.items():
        ours = name if name == stem else f"{stem}.{kind}"
        entry = entries.get(ours)
        if entry is None:
            return f"{ours} is missing"
        if entry.shape != its_shape or entry.dtype not in dtypes:
            return f"{entry} is {entry.dtype} {list(entry.shape)}, not {list(its_shape)} as config.json has it"
        parts[ours] = Part(ours, (entry,), entry.shape)
    return spec, parts
