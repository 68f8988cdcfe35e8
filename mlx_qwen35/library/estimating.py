"""What fits: from a name to a Plan, without reading a weight.

Knows where geometry and quantization are found (a folder's headers, or config.json on the Hub) and how much memory this
machine has. The arithmetic is footprint.py's.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx

from mlx_qwen35.checkpoint import gptq
from mlx_qwen35.checkpoint.inventory import is_linear, text_tensors, vision_tensors
from mlx_qwen35.checkpoint.load import compute_dtype
from mlx_qwen35.checkpoint.names import TARGET
from mlx_qwen35.checkpoint.part import DTYPES
from mlx_qwen35.checkpoint.quantize import default_spec
from mlx_qwen35.checkpoint.recipes import assign, role
from mlx_qwen35.checkpoint.source import spec_of
from mlx_qwen35.config import ModelConfig
from mlx_qwen35.errors import CheckpointError
from mlx_qwen35.library import hub
from mlx_qwen35.library.finding import look_up
from mlx_qwen35.library.footprint import Specs, WeightBytes, cache_bytes, tensor_bytes, weight_bytes, working_bytes
from mlx_qwen35.library.plan import Plan, cache_at, parse_size
from mlx_qwen35.library.stored import Stored
from mlx_qwen35.library.survey import Survey, parameters, survey

CONVERTED_BITS = 4
USEFUL_CONTEXT = 4096  # what does not even hold this many tokens does not fit


def estimate(
    ref: str | Path | None = None,
    memory: int | str | None = None,
    context_length: int | None = None,
    *,
    bits: int | None = None,
    dtype: mx.Dtype | str | None = None,
) -> Plan:
    """What a model takes in memory and how long a context fits, with all of its weights resident.

    ref: a name or a folder, as `find` understands it; of a name on the Hub only config.json is fetched, and of an
    incomplete download it has to do. memory: bytes, or a text such as "24GB"; None: what MLX recommends on this Mac, or
    the memory that is free. context_length: tokens to plan for; None: as many as fit. bits: as a conversion to so many
    bits would have it. dtype: as in `load`.
    Exact for weights and cache; what a prompt takes while it is read is modelled (footprint.py), without pictures.
    Raises CheckpointError where `find` does, ValueError for a memory or context_length that makes no sense.
    """
    size, source = available_memory() if memory is None else (parse_size(memory), "given")
    compute = compute_dtype(dtype)
    name, config, found = _described(ref)
    if context_length is not None and not 1 <= context_length <= config.text.max_position_embeddings:
        raise ValueError(
            f"context_length is {context_length}; this model has 1 to {config.text.max_position_embeddings} tokens"
        )

    def plan(specs: Specs, words: str, loading: int, converted: Plan | None = None) -> Plan:
        mtp = found.mtp_bytes if found else 0
        weights = weight_bytes(config, specs, compute.size, mtp)
        return _plan(
            config, compute, specs, weights, loading, size, context_length,
            name=name, quantization=words, memory_source=source, converted=converted,
        )  # fmt: skip

    made = assign(None, text_tensors(config), default_spec(bits or CONVERTED_BITS, 64, "affine"), config)
    small = plan(made, f"converted to {bits or CONVERTED_BITS}-bit", _largest(config, made, compute.size))
    if bits is not None:
        return small
    if found is not None and found.source is not None:
        specs: Specs = found.source.specs
        loading, words = _loading(found, compute), found.quantization
    else:
        specs = _told_specs(config)
        loading = _largest(config, specs, compute.size)
        words = Survey(Path(name), config, None, None).quantization
        words = words if words != "?" else "not quantized"
    return plan(specs, words, loading, small if config.quantization is None else None)


def available_memory() -> tuple[int, str]:
    """(bytes, where they were found): what MLX recommends on a Mac, a GPU's memory, or the memory that is free."""
    if mx.metal.is_available():
        return int(mx.device_info()["max_recommended_working_set_size"]), "MLX's recommended working set on this Mac"
    if mx.default_device().type == mx.gpu:
        info = mx.device_info()
        found = next((int(info[key]) for key in ("memory_size", "total_memory") if info.get(key)), 0)
        if found:
            return found, "the memory of this GPU"
    return _free_memory(), "free on this machine"


def _free_memory() -> int:
    import os

    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _described(ref: str | Path | None) -> tuple[str, ModelConfig, Survey | None]:
    """The name, its geometry, and what its headers say where it is on this machine."""
    stored = look_up(ref)
    if not isinstance(stored, Stored):
        name = stored.name if stored.revision is None else f"{stored.name}@{stored.revision}"
        return name, hub.look(stored.name, stored.revision).config, None
    found = survey(stored.folder)
    if found.config is None or (found.source is None and not found.missing):
        raise CheckpointError(found.problem)
    return stored.name, found.source.config if found.source else found.config, found


def _told_specs(config: ModelConfig) -> Specs:
    """How config.json alone says that modules are quantized."""
    linear = {n: s for n, s in text_tensors(config).items() if is_linear(n, s)}
    if config.quantization is not None:
        told = {n.removesuffix(".weight"): spec_of(config, _path(n)) for n in linear}
        return {m: s for m, s in told.items() if s and linear[f"{m}.weight"][-1] % s.group_size == 0}
    section = config.source_quantization
    if section is not None and section.get("quant_method") == "gptq":
        spec = gptq.read_config(section, "config.json").spec
        # Which modules are packed only the files know; the official ones leave all but these as they were.
        return {m: spec for m in (n.removesuffix(".weight") for n in linear) if role(m) in ("experts", "mlp")}
    return {}


def _path(name: str) -> str:
    return TARGET.source(name).names[0].removesuffix(".weight")


def _plan(
    config: ModelConfig,
    compute: mx.Dtype,
    specs: Specs,
    weights: WeightBytes,
    loading: int,
    memory: int,
    context_length: int | None,
    **words: object,
) -> Plan:
    per_token, constant = cache_bytes(config, compute.size)
    most = config.text.max_position_embeddings
    gpu = mx.default_device().type == mx.gpu

    def needed(tokens: int) -> int:
        working = working_bytes(config, specs, tokens, compute.size, gpu=gpu)
        return weights.total + max(loading, cache_at(tokens, per_token, constant) + working)

    longest = _longest(needed, memory, most)
    if longest < min(USEFUL_CONTEXT, most, context_length or most):
        longest = 0
    tokens = context_length or longest or min(USEFUL_CONTEXT, most)
    return Plan(
        dtype=str(compute).removeprefix("mlx.core."),
        parameters=parameters(config),
        weights=weights,
        loading=loading,
        cache_per_token=per_token,
        cache_constant=constant,
        context_length=tokens,
        working=working_bytes(config, specs, tokens, compute.size, gpu=gpu),
        longest_context=longest,
        most_context=most,
        memory=memory,
        **words,
    )


def _longest(needed: Callable[[int], int], memory: int, most: int) -> int:
    """The most tokens whose need is within memory; 0 if not even one."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if needed(middle) <= memory else (low, middle - 1)
    return low


def _loading(found: Survey, compute: mx.Dtype) -> int:
    """Two tensors on their way as the file has them, and one more where they are cast."""
    parts = list(found.source.parts.values())
    cast = any(part.dtype not in ("U32", "U8") and DTYPES.get(part.dtype) != compute for part in parts)
    return max(part.nbytes for part in parts) * (3 if cast else 2)


def _largest(config: ModelConfig, specs: Specs, itemsize: int) -> int:
    """The same where no file is known: of the largest tensor as memory has it."""
    shapes = text_tensors(config) | vision_tensors(config)
    return 2 * max(tensor_bytes(n, s, specs.get(n.removesuffix(".weight")), itemsize) for n, s in shapes.items())
