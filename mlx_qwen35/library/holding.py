"""How a model is held in the memory there is: all of it, or its experts streamed from the disk.

Knows what is needed at which context and what follows from it. The figures are footprint.py's, how they are shared out
is experts/budget.py's, and what there is memory.py's. Reads headers only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx

from mlx_qwen35.cache.kv import KVFormat
from mlx_qwen35.checkpoint.gguf.choosing import is_gguf
from mlx_qwen35.checkpoint.gguf.opened import open_model
from mlx_qwen35.checkpoint.load import check_kv_form, compute_dtype, read_config
from mlx_qwen35.checkpoint.part import DTYPES, AnyPart
from mlx_qwen35.checkpoint.source import Source, open_source
from mlx_qwen35.config import ModelConfig
from mlx_qwen35.errors import CheckpointError
from mlx_qwen35.experts.budget import Needs, StreamPlan, least
from mlx_qwen35.experts.budget import plan as share_out
from mlx_qwen35.library.footprint import (
    Specs,
    cache_at,
    cache_bytes,
    expert_bytes,
    feeding_bytes,
    mixing_bytes,
    weight_bytes,
    working_bytes,
)
from mlx_qwen35.library.memory import check_ceiling, check_weights, memory_size
from mlx_qwen35.library.plan import how_streamed, shown_size
from mlx_qwen35.machine.gpu import has_metal

STREAMED_CONTEXT = 32768  # tokens planned for where experts are streamed and no context is asked for
FEWEST_SNAPSHOTS = 4  # that a session keeps; session/marks.py's own
USEFUL_CONTEXT = 4096  # what does not even hold this many tokens does not fit
READERS = 8  # threads of the expert reader, each with a buffer for one expert
# A process that has loaded the demo and answered (Python, MLX, this package; Linux, CPU) has 62 MB beside its arrays,
# and 250 MB more with a tokenizer.json of 20 MB.
_PROCESS, _TOKENIZER_FACTOR = 100 << 20, 13


@dataclass(frozen=True)
class Held:
    """What is loaded, and how it is held.

    dtype: as it was given. context_length: the most tokens it may have, None: all. stream: None if all is resident.
    bounded: under a ceiling, which snapshots of sessions count against. yarn, kv_form: as in `load_model`.
    """

    folder: Path
    dtype: mx.Dtype | str | None
    context_length: int | None
    stream: StreamPlan | None
    bounded: bool = False
    yarn: bool = False
    kv_form: KVFormat | None = None

    def __str__(self) -> str:
        if self.stream is None:
            return "All weights are in memory."
        slots = self.stream.slots
        count = f"{min(slots)}" if min(slots) == max(slots) else f"{min(slots)} to {max(slots)}"
        return (
            f"{how_streamed(self.stream)}: {count} of a layer in memory at once, which with all else takes up "
            f"to {shown_size(self.stream.memory)}; up to {self.context_length:,} tokens of context, "
            f"{self.stream.chunk:,} of a prompt at a time."
        )


@dataclass(frozen=True)
class Demand:
    """What a model takes at any context, in bytes.

    itemsize: of the dtype computed in. loading: what reading all weights but experts takes besides, for a moment;
    loading_layer: what reading a layer's experts does. reserve: the process. beside: tokens -> what else is there.
    streamable: whether experts, where there are any, can be read as the files have them.
    """

    config: ModelConfig
    specs: Specs
    itemsize: int
    loading: int
    loading_layer: int
    reserve: int
    gpu: bool
    beside: Callable[[int], int] | None = None
    kv_form: KVFormat | None = None
    streamable: bool = True

    @property
    def most(self) -> int:
        """Tokens that the model can have."""
        return self.config.text.max_position_embeddings

    def cache(self, tokens: int) -> int:
        """With what else is there that long."""
        beside = self.beside(tokens) if self.beside else 0
        return cache_at(tokens, *cache_bytes(self.config, self.itemsize, self.kv_form)) + beside

    @property
    def snapshots(self) -> int:
        """Of states to go back to: the fewest that a session keeps, and that of the last step."""
        return (FEWEST_SNAPSHOTS + 1) * cache_bytes(self.config, self.itemsize)[1]

    def working(self, tokens: int) -> int:
        return working_bytes(self.config, self.specs, tokens, self.itemsize, gpu=self.gpu)

    def resident(self) -> Callable[[int], int]:
        """Tokens -> what is needed for them with all weights in memory."""
        fixed = self.reserve + self.snapshots + weight_bytes(self.config, self.specs, self.itemsize).total
        loading = max(self.loading, self.loading_layer)
        return lambda tokens: fixed + max(loading, self.cache(tokens) + self.working(tokens))

    @property
    def streams(self) -> bool:
        """Whether some experts may stay on the disk: there are any, in a form to be read, and a token takes not all."""
        moe = self.config.text.moe
        return moe is not None and self.streamable and moe.experts_per_token < moe.num_experts

    def streamed(self, tokens: int) -> Needs:
        """What is needed for them with experts streamed."""
        text, weights = self.config.text, weight_bytes(self.config, self.specs, self.itemsize)
        experts = expert_bytes(self.config, self.specs, self.itemsize)
        given = (tokens, self.itemsize)
        return Needs(
            experts=experts,
            num_experts=text.moe.num_experts,
            experts_per_token=text.moe.experts_per_token,
            trunk=weights.total - weights.experts,
            # What a thread reads into is as large as the file has it, which may be float32.
            reserve=self.reserve + self.snapshots + READERS * max(experts) * 4 // self.itemsize,
            cache=self.cache(tokens),
            loading=self.loading,
            loading_layer=self.loading_layer,
            mixing=lambda tile: mixing_bytes(self.config, self.specs, tile, *given, gpu=self.gpu),
            feeding=lambda chunk: feeding_bytes(self.config, self.specs, chunk, *given, gpu=self.gpu),
        )


def hold(
    folder: str | Path,
    memory: int | str | None = None,
    *,
    dtype: mx.Dtype | str | None = None,
    context_length: int | None = None,
    beside: Callable[[int], int] | None = None,
    yarn: bool = False,
    kv_form: KVFormat | None = None,
) -> Held:
    """Decide how the checkpoint in `folder` is held, before a weight is read.

    memory: a ceiling on the process, as memory_size() takes it. None: experts are streamed where not everything fits
    into what there is, and a dense model is loaded whatever there is.
    context_length: None is, under a ceiling, the longest that fits; where experts are streamed, 32,768 tokens, or what
    the model has, halved down to 4,096 as long as they do not fit. yarn, kv_form: as in `load_model`.
    beside: tokens of context -> bytes that are to be left for something else (drafting.py).
    On a Mac it warns where memory, or the weights of a model that is all in memory, are more than the GPU may keep.
    Raises ValueError for a memory or context_length that makes no sense, or more memory than a Mac has, and
    CheckpointError, with figures, where not even the smallest pool of experts fits, or a dense model does not fit under
    a ceiling.
    """
    folder, (size, where) = Path(folder), memory_size(memory)
    if memory is not None:
        check_ceiling(size)
    config = read_config(folder, context_length, yarn=yarn)
    check_kv_form(kv_form, config)
    stretched = yarn and config.text.rope.yarn is not None
    held = Held(folder, dtype, context_length, None, memory is not None, stretched, kv_form)
    if memory is None and config.text.moe is None and not has_metal():
        return held
    demand = of_source(open_source(folder, config), compute_dtype(dtype))
    demand = replace(demand, kv_form=kv_form, beside=beside)
    tokens, plan = decide(demand, size, context_length, where if memory is None else None, folder.name)
    if plan is not None:
        return replace(held, context_length=tokens, stream=plan, bounded=True)
    check_weights(folder.name, weight_bytes(config, demand.specs, demand.itemsize).total)
    return replace(held, context_length=tokens)


def decide(
    demand: Demand, size: int, context_length: int | None, found: str | None, name: str
) -> tuple[int | None, StreamPlan | None]:
    """(the most tokens, None for all that the model has; how experts are streamed, None if all weights are in memory).

    size: bytes there are. found: where they were found, in words; a dense model is then loaded whatever there is. None:
    they were given, as a ceiling. Raises CheckpointError, with figures, for what does not fit; name: of the model, for
    that.
    """
    bounded = found is None
    longest = longest_resident(demand, size, context_length)
    if (not bounded and demand.config.text.moe is None) or (longest and longest >= (context_length or 0)):
        return context_length if context_length or not bounded else longest, None
    tokens, plan = streamed(demand, size, context_length)
    if plan is not None:
        return tokens, plan
    why, more = f"with {tokens:,} tokens of context", ""
    if demand.streams:
        parts = least(demand.streamed(tokens))
        needed = sum(parts.values())
        figures = (f"{what} {shown_size(n)}" for what, n in sorted(parts.items(), key=lambda part: -part[1]))
        why = f"even with the fewest experts in memory and {tokens:,} tokens of context ({', '.join(figures)})"
    else:
        needed = demand.resident()(tokens)
        if not demand.streamable:
            more = ", whose experts can stay on the disk, which those of this form cannot"
    there = "given as memory" if bounded else f"of memory ({found})"
    raise CheckpointError(
        f"{name} does not fit into the {shown_size(size)} {there}: {shown_size(needed)} are needed {why}, "
        f"{shown_size(needed - size)} more. Give more memory or a smaller context_length, or take a conversion "
        f"to fewer bits{more}"
    )


def streamed(demand: Demand, size: int, context_length: int | None) -> tuple[int, StreamPlan | None]:
    """(tokens of context, how experts are streamed within `size` bytes: None if not at all, or if there are none)."""
    tokens = context_length or min(STREAMED_CONTEXT, demand.most)
    while True:
        needs = demand.streamed(tokens) if demand.streams else None
        if needs and sum(least(needs).values()) <= size:
            return tokens, _with_a_pool(share_out(size, needs), needs.num_experts)
        if context_length is not None or tokens <= USEFUL_CONTEXT:
            return tokens, None
        tokens = max(tokens // 2, USEFUL_CONTEXT)


def _with_a_pool(plan: StreamPlan, num_experts: int) -> StreamPlan:
    """The plan, with one expert left on the disk where all would fit: prompts go in a plan's steps only through a model
    that has a pool, and it is in larger ones that all does not fit."""
    if min(plan.slots) < num_experts:
        return plan
    return replace(plan, slots=(*plan.slots[:-1], num_experts - 1))


def longest_resident(demand: Demand, size: int, context_length: int | None = None) -> int:
    """The most tokens that fit into `size` bytes beside all weights; 0 if those are too few to be useful."""
    longest = _longest(demand.resident(), size, demand.most)
    return longest if longest >= min(USEFUL_CONTEXT, demand.most, context_length or demand.most) else 0


def of_source(source: Source, compute: mx.Dtype) -> Demand:
    """The demand of a checkpoint on this machine."""
    rest, experts = [], []
    for part in source.parts.values():
        (experts if ".mlp.experts." in part.ours else rest).append(part)
    return Demand(
        config=source.config,
        specs=source.specs,
        itemsize=compute.size,
        loading=_loading(rest, compute),
        loading_layer=_loading(experts, compute),
        reserve=process_bytes(source.folder),
        gpu=mx.default_device().type == mx.gpu,
        streamable=source.streamable,
    )


def process_bytes(folder: Path | None) -> int:
    """What the process takes beside its arrays, with the tokenizer in `folder`."""
    if folder and is_gguf(folder):
        return _PROCESS + _TOKENIZER_FACTOR * open_model(folder).tokenizer_bytes
    tokenizer = folder / "tokenizer.json" if folder else None
    return _PROCESS + (_TOKENIZER_FACTOR * tokenizer.stat().st_size if tokenizer and tokenizer.exists() else 0)


def _loading(parts: list[AnyPart], compute: mx.Dtype) -> int:
    """Two tensors on their way as the file has them, and one more where they are cast; of floats that are made of
    codes the pieces too, which are as large as what they become."""
    cast = any(part.dtype not in ("U32", "U8") and DTYPES.get(part.dtype) != compute for part in parts)
    plain = max((part.nbytes for part in parts), default=0) * (3 if cast else 2)
    made = (2 * part.nbytes + math.prod(part.shape) * compute.size for part in parts if part.computed)
    return max(plain, *made, 0)


def _longest(needed: Callable[[int], int], memory: int, most: int) -> int:
    """The most tokens whose need is within memory; 0 if not even one."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if needed(middle) <= memory else (low, middle - 1)
    return low
