"""What of a model is on ranks, in numbers: what all are to have alike, what a plan has to know, what each then holds.

Knows sizes and memory. Reads headers only, and loads nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import mlx.core as mx

from mlx_qwen35.cache.kv import KVFormat
from mlx_qwen35.checkpoint.inventory import SIGNS, text_tensors
from mlx_qwen35.checkpoint.load import compute_dtype
from mlx_qwen35.checkpoint.source import Source
from mlx_qwen35.config import ModelConfig
from mlx_qwen35.errors import ArgumentError
from mlx_qwen35.experts.budget import StreamPlan
from mlx_qwen35.library.footprint import Specs, cache_at, cache_bytes, tensor_bytes, weight_bytes
from mlx_qwen35.library.holding import decide, of_source
from mlx_qwen35.parallel.cuts import indivisible
from mlx_qwen35.parallel.plan import KINDS, Plan, Sizes
from mlx_qwen35.parallel.share import geometry

CONTEXT = 32768  # tokens whose cache a plan is made for, where no context is asked for


@dataclass(frozen=True)
class Options:
    """What all ranks are to have alike. kv: bits, group size and start, or None. plan: None is to be chosen."""

    dtype: str
    context_length: int | None
    yarn: bool
    kv: tuple[int, int, int] | None
    exact: bool
    kernels: bool
    plan: str | None
    device: str

    @property
    def kv_form(self) -> KVFormat | None:
        return None if self.kv is None else KVFormat(*self.kv)


def options_of(
    *,
    dtype: mx.Dtype | str | None,
    context_length: int | None,
    yarn: bool,
    kv_form: KVFormat | None,
    exact: bool,
    kernels: bool,
    plan: str | None,
) -> Options:
    """As they are compared; raises ArgumentError for a dtype that is none."""
    kv = None if kv_form is None else (kv_form.bits, kv_form.group_size, kv_form.start)
    name, device = str(compute_dtype(dtype)).removeprefix("mlx.core."), str(mx.default_device().type).split(".")[-1]
    return Options(name, context_length, yarn, kv, exact, kernels, plan, device)


def check_count(config: ModelConfig, ranks: int, kind: str | None) -> None:
    """Raises ArgumentError where so many ranks cannot have a model of this config, in the plan asked for or in any."""
    text, why = config.text, {}
    experts = text.moe.num_experts if text.moe else 0
    if experts < ranks:
        why["experts"] = f"it has {experts} experts"
    if text.num_hidden_layers < ranks:
        why["pipeline"] = f"it has {text.num_hidden_layers} layers"
    if problem := indivisible(config, {}, ranks):
        why["tensor"] = problem
    asked = KINDS if kind is None else (kind,)
    if all(each in why for each in asked):
        reasons = "; ".join(f"{each}: {why[each]}" for each in asked)
        raise ArgumentError(f"{ranks} ranks cannot have this model ({reasons}): take fewer, or another plan")


def sizes_of(
    config: ModelConfig, specs: Specs, itemsize: int, options: Options, ranks: int, source: Source | None = None
) -> Sizes:
    """What a plan has to know of a model. source: of its files, where they are here."""
    text = config.text
    layers, experts, table, head = [0] * text.num_hidden_layers, [0] * text.num_hidden_layers, 0, 0
    for name, shape in text_tensors(config).items():
        size = tensor_bytes(name, shape, specs.get(name.removesuffix(".weight")), itemsize)
        if name.startswith("embed_tokens."):
            table = size
        elif name.startswith("lm_head."):
            head = size
        elif name.startswith("layers."):
            number = int(name.split(".")[1])
            if ".mlp.experts." in name:
                experts[number] += size // shape[0]
            else:
                layers[number] += size
    tokens = min(options.context_length or CONTEXT, text.max_position_embeddings)
    cache = cache_at(tokens, *cache_bytes(config, itemsize, options.kv_form)) // text.num_hidden_layers
    turned = source is not None and any(name.endswith(SIGNS) for name in source.parts)
    real = {name: spec for name, spec in specs.items() if spec is not None}
    return Sizes(
        layers=tuple(layers),
        experts=tuple(experts) if text.moe else (),
        num_experts=text.moe.num_experts if text.moe else 0,
        experts_per_token=text.moe.experts_per_token if text.moe else 0,
        table=table,
        head=head or table,
        tied=text.tie_word_embeddings,
        beside=weight_bytes(config, specs, itemsize).vision,
        hidden=text.hidden_size,
        itemsize=itemsize,
        cache=(cache,) * text.num_hidden_layers,
        indivisible=indivisible(config, real, ranks, turned),
    )


def held(
    source: Source,
    options: Options,
    plan: Plan,
    rank: int,
    memory: int,
    bounded: bool,
    beside: Callable[[int], int] | None = None,
) -> tuple[int | None, StreamPlan | None]:
    """(tokens of context, how experts are streamed) of a rank, as holding.decide has it of a whole model.

    beside: what else is there. Raises CheckpointError where its share does not fit.
    """
    if plan.kind == "tensor":
        return options.context_length, None
    own = geometry(source.config, plan, rank)
    demand = of_source(source, compute_dtype(options.dtype))
    demand = replace(demand, config=own, kv_form=options.kv_form, beside=beside)
    found = None if bounded else "free for this rank"
    name = f"{source.folder.name}, {plan.kind} {plan.shares[rank][0]} to {plan.shares[rank][1] - 1} of rank {rank},"
    tokens, stream = decide(demand, memory, options.context_length, found, name)
    if stream is not None and plan.kind == "pipeline":
        first, stop = plan.shares[rank]
        count = source.config.text.moe.num_experts
        after = len(source.config.text.layer_types) - stop
        stream = replace(stream, slots=(count,) * first + stream.slots + (count,) * after)
    return tokens, stream
