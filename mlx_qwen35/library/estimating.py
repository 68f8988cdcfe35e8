"""What fits: from a name to a Plan, without reading a weight.

Knows where geometry and quantization are found (a folder's headers, or config.json on the Hub). What follows from them
is holding.py's, the arithmetic footprint.py's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlx.core as mx

from mlx_qwen35 import checks
from mlx_qwen35.cache.kv import KVFormat
from mlx_qwen35.checkpoint.context import with_context
from mlx_qwen35.checkpoint.inventory import text_tensors
from mlx_qwen35.checkpoint.load import check_kv_form, compute_dtype
from mlx_qwen35.checkpoint.quantize import default_spec
from mlx_qwen35.checkpoint.source import Source
from mlx_qwen35.checkpoint.stream import streamed_layouts
from mlx_qwen35.config import ModelConfig
from mlx_qwen35.conversion.recipes import assign
from mlx_qwen35.errors import ArgumentError, CheckpointError
from mlx_qwen35.experts.budget import least
from mlx_qwen35.library import hub
from mlx_qwen35.library.drafting import NO_ANSWERS, told_drafting
from mlx_qwen35.library.finding import look_up
from mlx_qwen35.library.footprint import cache_bytes, weight_bytes
from mlx_qwen35.library.holding import USEFUL_CONTEXT, Demand, longest_resident, of_source, streamed
from mlx_qwen35.library.macs import mac_memory
from mlx_qwen35.library.memory import memory_size
from mlx_qwen35.library.plan import Plan, Streaming
from mlx_qwen35.library.speed import device_speed, disk_speed, expected
from mlx_qwen35.library.stored import Stored
from mlx_qwen35.library.survey import Survey, parameters, survey
from mlx_qwen35.library.told import told_demand, told_head, told_specs

CONVERTED_BITS = 4

Beside = Callable[[int], int] | None


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
    mtp: bool = False,
    draft_model: str | Path | None = None,
    mac: int | str | None = None,
    probe: bool = False,
) -> Plan:
    """What a model takes in memory and how long a context fits; with which experts streamed, if not all of it does.

    ref: a name or a folder, as `find` understands it; of a name on the Hub only config.json, or the header of a GGUF,
    is fetched, and of an incomplete download it has to do. memory: bytes, or a text such as "24GB" or "60%"; None: what
    MLX recommends on this Mac, or the memory that is free. context_length: tokens to plan for; None: as many as fit,
    and 32,768 or fewer
    where experts are streamed. bits: as a conversion to so many bits would have it. mtp, draft_model: with what drafts
    tokens, the model's own MTP head or another model (a name, of which no weight is read either). mac: in place of
    memory, that of a Mac, such as "24GB", of which the system leaves a part to models, and whose GPU computes in
    bfloat16. probe: where experts would be
    streamed from files that are here, read from them for a second, compute for half of one, and model how fast answers
    will come. The others as in `load`.
    Exact for weights and cache; what a prompt takes while it is read is modelled (footprint.py), without pictures.
    Raises CheckpointError where `find` does, ValueError for a memory or context_length that makes no sense.
    """
    for flag, value in (("yarn", yarn), ("mtp", mtp), ("probe", probe)):
        checks.flag(flag, value)
    if mac is not None and memory is not None:
        raise ArgumentError("memory and mac both say how much there is: give one of them")
    if mtp and draft_model is not None:
        raise ArgumentError("mtp and draft_model: only one can draft; leave one out")
    size, source = memory_size(memory) if mac is None else mac_memory(mac)
    compute = compute_dtype(mx.bfloat16 if mac is not None and dtype is None else dtype)
    name, config, found, offer = described(ref)
    read = with_context(config, context_length, yarn=yarn, where=name)
    config = read if (context_length or 0) > config.text.max_position_embeddings else config
    form = None if kv_bits is None else KVFormat(kv_bits, kv_group_size, quantized_kv_start)
    check_kv_form(form, config)

    folder = found.folder if found else None
    whole_here = folder if found and found.source is not None else None
    drafts = told_drafting(config, mtp, draft_model, compute, where=name, folder=whole_here)
    as_converted = drafts  # which leaves the head unquantized
    if mtp and config.text.mtp_num_hidden_layers:
        as_converted = told_head(config, compute, name)

    def plan(demand: Demand, words: str, beside: Beside, converted: Plan | None = None) -> Plan:
        demand = replace(demand, config=config, kv_form=form, beside=beside)
        on_disk = found.mtp_bytes if found else 0
        return _plan(
            demand, on_disk, size, context_length,
            name=name, quantization=words, memory_source=source, converted=converted, dtype=_name(compute),
        )  # fmt: skip

    made = assign(None, text_tensors(config), default_spec(bits or CONVERTED_BITS, 64, "affine"), config)
    # Whatever form it has now, what convert writes streams.
    demand = replace(told_demand(config, made, compute, folder), streamable=True)
    small = plan(demand, f"converted to {bits or CONVERTED_BITS}-bit", as_converted)
    if bits is not None:
        return small
    if whole_here:
        demand, words = of_source(found.source, compute), found.quantization
    else:
        demand = told_demand(config, told_specs(config), compute, folder)
        words = Survey(Path(name), config, None, None).quantization
        words = words if words != "?" else "not quantized"
    whole = plan(demand, words, drafts, small if config.quantization is None else None)
    if probe and whole.streaming is not None and whole_here and offer is None:
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


def described(ref: str | Path | None) -> tuple[str, ModelConfig, Survey | None, hub.Offer | None]:
    """The name, its geometry, what its headers say where they are on this machine, and what the Hub offers otherwise;
    with that, the headers of a GGUF stay."""
    stored = look_up(ref)
    if not isinstance(stored, Stored):
        offer = hub.look(stored.name, stored.revision, stored.wanted)
        if offer.blocks is not None:
            raise CheckpointError(NO_ANSWERS.format(offer.name))
        return str(stored), offer.config, None if offer.gguf is None else survey(offer.gguf), offer
    found = survey(stored.folder)
    if found.config is None or (found.source is None and not found.missing):
        raise CheckpointError(found.problem)
    return stored.name, found.source.config if found.source else found.config, found, None


def _plan(demand: Demand, mtp: int, memory: int, context_length: int | None, **words: object) -> Plan:
    per_token, constant = cache_bytes(demand.config, demand.itemsize, demand.kv_form)
    longest = longest_resident(demand, memory, context_length)
    tokens = context_length or longest or min(USEFUL_CONTEXT, demand.most)
    streaming = None
    if demand.streams and (not longest or longest < (context_length or 0)):
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
        drafting=demand.beside(tokens) if demand.beside else 0,
        streamable=demand.config.text.moe is None or demand.streams,
        **words,
    )


def _streaming(demand: Demand, memory: int, context_length: int | None) -> Streaming:
    tokens, plan = streamed(demand, memory, context_length)
    needs = demand.streamed(tokens)
    needed = sum(least(needs).values())
    return Streaming(tokens, needs.num_experts, needs.experts_per_token, needs.experts, needed, plan)


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")
