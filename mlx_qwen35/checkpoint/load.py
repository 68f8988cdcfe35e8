"""From a checkpoint folder to a Model.

Knows the order of things: check everything, build the model, then read one tensor after the other into it. The model
is never in memory twice: a tensor's file bytes are dropped as soon as it is cast.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_qwen35.cache.kv import GROUP_SIZES, KVFormat
from mlx_qwen35.checkpoint import contents
from mlx_qwen35.checkpoint.context import with_context
from mlx_qwen35.checkpoint.gguf.form import GgufForm
from mlx_qwen35.checkpoint.inventory import FACTORS, KEPT_FLOAT32, PATCH_EMBEDDING, SIGNS
from mlx_qwen35.checkpoint.part import FLOATS, AnyPart
from mlx_qwen35.checkpoint.share import Share
from mlx_qwen35.checkpoint.source import Source, open_source, read_parts
from mlx_qwen35.config import ModelConfig, QuantSpec
from mlx_qwen35.errors import ArgumentError, CheckpointError, Qwen35Warning
from mlx_qwen35.experts.budget import StreamPlan
from mlx_qwen35.model import Model

_DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}

Progress = Callable[[int, int], None]


def load_model(
    folder: str | Path,
    *,
    dtype: mx.Dtype | str | None = None,
    context_length: int | None = None,
    yarn: bool = False,
    kv_form: KVFormat | None = None,
    stream: StreamPlan | None = None,
    hot_lists: Path | None = None,
    share: Share | None = None,
    on_progress: Progress | None = None,
) -> Model:
    """The model of a checkpoint folder; needs no tokenizer.

    dtype: to compute in; None is float32 on the CPU and bfloat16 on a GPU. Quantized weights stay as they are, but
    FP8, which MLX does not compute with: it is dequantized in float32 and cast.
    context_length, yarn: as `with_context` takes them. kv_form: how caches keep keys and values; None: as they are.
    stream: how experts are read from the disk as they are asked for; None: all weights are in memory. hot_lists: the
    folder where is kept which experts were in memory at last, so that they are read again at once; None: nothing is.
    share: what of it is read and built, None: all; `stream` is then of the share's layers and experts.
    on_progress: called with (bytes read, bytes in all).
    Raises CheckpointError, before any weight is read, if a file is missing or damaged or a tensor is missing, left
    over or of another shape or kind than config.json says. Values are looked at only where they decide what a number
    means: FP8 codes and scales that are NaN and GPTQ's zeros and order of columns are refused while they are read.
    """
    compute = compute_dtype(dtype)
    config = read_config(folder, context_length, yarn=yarn)
    check_kv_form(kv_form, config)
    source = open_source(folder, config)
    source.check_norms()
    if config.vision is not None and source.config.vision is None:
        warnings.warn(
            f"{source.folder}: its config.json describes a vision tower, and none of its files holds one: the model is "
            "read for text only. For pictures take a conversion that keeps the tower (mlx-vlm's, or this package's)",
            Qwen35Warning,
            stacklevel=2,
        )
    for note in source.form.notes if isinstance(source.form, GgufForm) else ():
        warnings.warn(note, Qwen35Warning, stacklevel=2)
    check_experts(source.parts.values(), source.folder, compute)
    if stream is not None:
        from mlx_qwen35.checkpoint.stream import stream_experts, streamed_layouts
    streamed = {} if stream is None else streamed_layouts(source, stream, share)
    model = Model(source.config) if share is None else share.model(source.config)
    pack_modules(model, source)
    elsewhere = tuple(f"layers.{number}.mlp.experts." for number in streamed)
    for number in streamed:
        model.layers[number].mlp.experts = nn.Identity()
    weights: list[tuple[str, mx.array]] = []
    try:
        parts = [part for part in source.parts.values() if not part.ours.startswith(elsewhere)]
        parts = parts if share is None else share.parts(parts)
        read_weights(parts, compute, on_progress, weights)
        model.load_weights(weights)
        weights.clear()
        share_signs(model)
        model.join()
        if stream is not None:
            stream_experts(model, source, stream, streamed, compute, hot_lists, prefetch=share is None)
    except BaseException:
        # Whoever keeps the error keeps this frame, and with it half a model.
        weights.clear()
        model.unload()
        raise
    model.kv_form = kv_form
    model.eval()
    return model


def pack_modules(model: Model, source: Source) -> None:
    """Make those of a model's modules quantized that are so in a source, with factors and signs where it has them."""
    if source.specs:
        nn.quantize(model, class_predicate=specs_of(source.specs))
    modules = dict(model.named_modules())
    for name, part in source.parts.items():
        module = name.rpartition(".")[0]
        if name.endswith((FACTORS, SIGNS)) and module not in modules:
            continue  # another rank's
        if name.endswith(FACTORS):
            modules[module].factors = mx.ones(part.shape)
        elif name.endswith(SIGNS):
            modules[module].signs, modules[module].block = mx.ones(part.shape), source.form.blocks[module]


def share_signs(model: nn.Module) -> None:
    """Let maps that have the same signs have the same array, so that they can be joined; raises CheckpointError where a
    sign is none."""
    known: dict[bytes, mx.array] = {}
    for name, module in model.named_modules():
        signs = module.get("signs")
        if signs is None:
            continue
        values = np.array(signs)
        if not (np.abs(values) == 1).all():
            raise CheckpointError(f"{name}.signs holds other values than -1 and 1: download the checkpoint again")
        module.signs = known.setdefault(values.tobytes(), signs)


def specs_of(specs: Mapping[str, QuantSpec]) -> Callable[[str, nn.Module], dict[str, int | str] | bool]:
    """What nn.quantize asks: how the module at a path is quantized, False where it is not."""

    def spec_of(path: str, module: nn.Module) -> dict[str, int | str] | bool:
        spec = specs.get(path)
        return {"group_size": spec.group_size, "bits": spec.bits, "mode": spec.mode} if spec else False

    return spec_of


def read_weights(
    parts: Sequence[AnyPart], compute: mx.Dtype, on_progress: Progress | None, weights: list[tuple[str, mx.array]]
) -> None:
    """Append our names and arrays of parts to `weights`, in the order in which they lie in the files."""
    total, done = sum(part.nbytes for part in parts), 0
    if on_progress:
        on_progress(0, total)
    in_file_order = sorted(parts, key=lambda part: (part.entries[0].file, part.entries[0].offset))
    for part, raw in read_parts(in_file_order):
        weight = part.finish(raw, _dtype_of(part, compute))
        weights.append((part.ours, _as_matrix(weight) if part.ours == PATCH_EMBEDDING else weight))
        del weight, raw
        done += part.nbytes
        if on_progress:
            on_progress(done, total)


def compute_dtype(dtype: mx.Dtype | str | None) -> mx.Dtype:
    """The dtype meant by a `dtype` argument; raises ArgumentError if it is none to compute in."""
    if dtype is None:
        return mx.float32 if mx.default_device().type == mx.cpu else mx.bfloat16
    found = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if not isinstance(found, mx.Dtype) or found not in _DTYPES.values():
        raise ArgumentError(f"dtype is {dtype!r}; choose {', '.join(_DTYPES)}")
    return found


def _as_matrix(convolution: mx.array) -> mx.array:
    """[V, T, P, P, C] -> [V, C * T * P * P]: each kernel as a row, in the order in which patches come."""
    matrix = convolution.transpose(0, 4, 1, 2, 3).reshape(convolution.shape[0], -1)
    mx.eval(matrix)
    return matrix


def _dtype_of(part: AnyPart, compute: mx.Dtype) -> mx.Dtype | None:
    """What a tensor is cast to; None leaves packed weights, the scales of the mx modes and float32 decays alone."""
    if part.dtype not in FLOATS or (part.dtype == "F32" and part.ours.endswith(KEPT_FLOAT32)):
        return None
    return compute


def check_experts(parts: Iterable[AnyPart], folder: Path, compute: mx.Dtype) -> None:
    """Refuse what MLX's CPU backend would refuse in the middle of the first answer."""
    experts = (part for part in parts if "mlp.experts." in part.ours and part.ours.endswith(".weight"))
    plain = any(part.dtype in FLOATS for part in experts)
    if plain and compute != mx.float32 and mx.default_device().type == mx.cpu:
        raise CheckpointError(
            f"{folder} has unquantized experts, which MLX computes on the CPU in float32 only: "
            "leave dtype out, or give float32"
        )


def check_kv_form(form: KVFormat | None, config: ModelConfig) -> None:
    """Raises ArgumentError for a form that the heads of the model cannot have."""
    if form is not None and config.text.head_dim % form.group_size:
        raise ArgumentError(
            f"kv_group_size is {form.group_size}, which does not divide this model's head_dim {config.text.head_dim}: "
            f"take one of {', '.join(str(size) for size in GROUP_SIZES)} that does, or leave kv_bits out"
        )


def read_config(folder: str | Path, context_length: int | None = None, *, yarn: bool = False) -> ModelConfig:
    """The config of a checkpoint folder; context_length, yarn: as `with_context` takes them.

    Raises CheckpointError if config.json is missing, damaged or not supported, or allows fewer tokens.
    """
    config = contents.read_config(folder)
    return with_context(config, context_length, yarn=yarn, where=Path(folder) / "config.json")
