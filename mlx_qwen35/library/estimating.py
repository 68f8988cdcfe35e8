"""What fits: from a name to a Plan, without reading a weight.

Knows where geometry and quantization are found (a folder's headers, or config.json on the Hub). What follows from them
is holding.py's, the arithmetic footprint.py's.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mlx.core as mx

from mlx_qwen35.checkpoint import gptq
from mlx_qwen35.checkpoint.context import with_context
from mlx_qwen35.checkpoint.inventory import is_linear, text_tensors, vision_tensors
from mlx_qwen35.checkpoint.load import check_kv_form, compute_dtype
from mlx_qwen35.checkpoint.names import TARGET
from mlx_qwen35.checkpoint.quantize import default_spec
from mlx_qwen35.checkpoint.recipes import assign, role
from mlx_qwen35.checkpoint.source import Source, spec_of
from mlx_qwen35.checkpoint.stream import streamed_layouts
from mlx_qwen35.config import ModelConfig
from mlx_qwen35.errors import CheckpointError
from mlx_qwen35.experts.budget import least
from mlx_qwen35.kv import KVFormat
from mlx_qwen35.library import hub
from mlx_qwen35.library.finding import look_up
from mlx_qwen35.library.footprint import Specs, cache_bytes, tensor_bytes, weight_bytes
from mlx_qwen35.library.holding import USEFUL_CONTEXT, Demand, longest_resident, of_source, process_bytes, streamed
from mlx_qwen35.library.memory import memory_size
from mlx_qwen35.library.plan import Plan, Streaming
from mlx_qwen35.library.speed import device_speed, disk_speed, expected
from mlx_qwen35.library.stored import Stored
from mlx_qwen35.library.survey import Survey, parameters, survey

CONVERTED_BITS = 4


def estimate(
    ref: str | Path | None = None,
    memory: int | str | None = None,
    context_length: int | None = None,
    *,
    bits: int | None = None,
    yarn: bool = False,
    kv_bits: int | None = None,
    kv_group_size: int = 64,
    quantized_kv_start: int = 0,
    dtype: mx.Dtype | str | None = None,
    probe: bool = False,
) -> Plan:
    """What a model takes in memory and how long a context fits; with which experts streamed, if not all of it does.

    ref: a name or a folder, as `find` understands it; of a name on the Hub only config.json is fetched, and of an
    incomplete download it has to do. memory: bytes, or a text such as "24GB" or "60%"; None: what MLX recommends on
    this Mac, or the memory that is free. context_length: tokens to plan for; None: as many as fit, and 32,768 or fewer
    where experts are streamed. bits: as a conversion to so many bits would have it. probe: where experts would be
    streamed from files that are here, read from them for a second, compute for half of one, and model how fast answers
    will come. The others as in `load`.
    Exact for weights and cache; what a prompt takes while it is read is modelled (footprint.py), without pictures.
    Raises CheckpointError where `find` does, ValueError for a memory or context_length that makes no sense.
    """
    size, source = memory_size(memory)
    compute = compute_dtype(dtype)
    name, config, found = _described(ref)
    read = with_context(config, context_length, yarn=yarn, where=name)
    config = read if (context_length or 0) > config.text.max_position_embeddings else config
    form = None if kv_bits is None else KVFormat(kv_bits, kv_group_size, quantized_kv_start)
    check_kv_form(form, config)

    def plan(demand: Demand, words: str, converted: Plan | None = None) -> Plan:
        demand = replace(demand, config=config, kv_form=form)
        mtp = found.mtp_bytes if found else 0
        return _plan(
            demand, mtp, size, context_length,
            name=name, quantization=words, memory_source=source, converted=converted, dtype=_name(compute),
        )  # fmt: skip

    made = assign(None, text_tensors(config), default_spec(bits or CONVERTED_BITS, 64, "affine"), config)
    folder = found.folder if found else None
    small = plan(_told_demand(config, made, compute, folder), f"converted to {bits or CONVERTED_BITS}-bit")
    if bits is not None:
        return small
    if found is not None and found.source is not None:
        demand, words = of_source(found.source, compute), found.quantization
    else:
        demand = _told_demand(config, _told_specs(config), compute, folder)
        words = Survey(Path(name), config, None, None).quantization
        words = words if words != "?" else "not quantized"
    whole = plan(demand, words, small if config.quantization is None else None)
    if probe and whole.streaming is not None and found is not None and found.source is not None:
        whole = replace(whole, streaming=_with_speed(whole, found.source))
    return whole


def _with_speed(plan: Plan, source: Source) -> Streaming:
    """The plan's streaming, with the speed to be expected of it."""
    streaming = plan.streaming
    if streaming.plan is None:
        return streaming
    layouts = streamed_layouts(source, streaming.plan)
    disk, deep = disk_speed(layouts, streaming.experts_per_token)
    head = plan.weights.embedding // (1 if source.config.text.tie_word_embeddings else 2)
    speed = expected(
        share=streaming.share, layers=len(layouts),
        token_bytes=streaming.token_bytes, chunk_bytes=streaming.chunk_bytes,
        active_bytes=plan.weights.trunk + head + streaming.token_bytes,
        disk=disk, disk_deep=deep, device=device_speed(),
    )  # fmt: skip
    return replace(streaming, expected=speed)


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


def _plan(demand: Demand, mtp: int, memory: int, context_length: int | None, **words: object) -> Plan:
    per_token, constant = cache_bytes(demand.config, demand.itemsize, demand.kv_form)
    longest = longest_resident(demand, memory, context_length)
    tokens = context_length or longest or min(USEFUL_CONTEXT, demand.most)
    streaming = None
    if demand.config.text.moe and (not longest or longest < (context_length or 0)):
        streaming = _streaming(demand, memory, context_length)
    return Plan(
        parameters=parameters(demand.config),
        weights=weight_bytes(demand.config, demand.specs, demand.itemsize, mtp),
        loading=max(demand.loading, demand.loading_layer),
        process=demand.reserve,
        snapshots=demand.snapshots,
        cache_per_token=per_token,
        cache_constant=constant,
        context_length=tokens,
        working=demand.working(tokens),
        longest_context=longest,
        most_context=demand.most,
        memory=memory,
        streaming=streaming,
        **words,
    )


def _streaming(demand: Demand, memory: int, context_length: int | None) -> Streaming:
    tokens, plan = streamed(demand, memory, context_length)
    needs = demand.streamed(tokens)
    needed = sum(least(needs).values())
    return Streaming(tokens, needs.num_experts, needs.experts_per_token, needs.experts, needed, plan)


def _told_demand(config: ModelConfig, specs: Specs, compute: mx.Dtype, folder: Path | None) -> Demand:
    """The demand of a checkpoint of which no weights are here: two of the largest tensor, as memory has it, at once."""
    loading, loading_layer = 0, 0
    for name, shape in (text_tensors(config) | vision_tensors(config)).items():
        taken = 2 * tensor_bytes(name, shape, specs.get(name.removesuffix(".weight")), compute.size)
        if ".mlp.experts." in name:
            loading_layer = max(loading_layer, taken)
        else:
            loading = max(loading, taken)
    gpu = mx.default_device().type == mx.gpu
    return Demand(config, specs, compute.size, loading, loading_layer, process_bytes(folder), gpu)


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")
