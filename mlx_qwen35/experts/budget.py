"""How a ceiling on memory is shared out when not all experts fit: slots, staging, and how much is computed at once.

Knows sums. Knows neither checkpoints nor devices nor arrays: what a model takes comes in as numbers, and what is done
with a plan is the bank's business.

First comes what has to be there: the trunk (all weights but routed experts), the process, the cache of the context, the
slots of one token, and a prompt in the smallest steps. Of the rest, a quarter at most makes a prompt's steps larger;
all that is left are slots, as many in one layer as in the next.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

LEAST_TOKENS = 16  # of a prompt, in a mixer or through all layers at once
MOST_TILE = 2048
MOST_CHUNK = 8192
LEAST_SPARE, MOST_SPARE = 16 << 20, 1 << 30  # bytes of MLX's buffer cache
MOST_GROUP_BYTES = 64 << 20  # the first group of a layer is waited for

# What larger steps may take, as parts of the rest. The chunk decides how often a prompt reads all experts.
_CHUNK_SHARE, _TILE_SHARE, _GROUP_SHARE, _SPARE_SHARE = 8, 20, 20, 40


@dataclass(frozen=True)
class Needs:
    """What a model takes, in bytes. experts: one expert in memory, a number for each layer that has them.

    trunk: all other weights. reserve: the process and its threads. cache: of the context. loading: what reading the
    trunk takes besides, for a moment; loading_layer: the same of a layer whose experts are loaded whole.
    mixing(tokens), feeding(tokens): what so many tokens take in a layer's mixer, and in its experts together with what
    lives as long as a chunk does; neither falls as tokens rise.
    """

    experts: tuple[int, ...]
    num_experts: int
    experts_per_token: int
    trunk: int
    reserve: int
    cache: int
    loading: int
    loading_layer: int
    mixing: Callable[[int], int]
    feeding: Callable[[int], int]


@dataclass(frozen=True)
class StreamPlan:
    """How a model whose experts do not all fit is held in memory.

    slots: experts that are in memory at once, a number for each layer; num_experts: that layer is resident.
    group: experts that a prompt reads at once; there are two groups, one being read while the other computes.
    chunk: tokens of a prompt that go through all layers together; tile: how many of them a mixer takes at once.
    cache_limit: bytes, for mx.set_cache_limit. memory: the ceiling in bytes, of the whole process.
    """

    slots: tuple[int, ...]
    group: int
    chunk: int
    tile: int
    cache_limit: int
    memory: int


def least(needs: Needs) -> dict[str, int]:
    """What the smallest pool takes, by name; the sum is the least memory that can be planned for."""
    prompt = needs.mixing(LEAST_TOKENS) + needs.feeding(LEAST_TOKENS) + 2 * max(needs.experts)
    parts = {
        "all weights but experts": needs.trunk,
        f"{needs.experts_per_token} experts a layer": needs.experts_per_token * sum(needs.experts),
        "the process and spare buffers": needs.reserve + LEAST_SPARE,
    }
    if needs.loading > needs.cache + prompt:
        return parts | {"reading weights": needs.loading}
    return parts | {"the cache": needs.cache, "a prompt": prompt}


def plan(memory: int, needs: Needs) -> StreamPlan:
    """Share `memory` bytes out; whether all experts would fit is to be asked before.

    Raises ValueError if memory is under what least() adds up to.
    """
    rest = memory - sum(least(needs).values())
    if rest < 0:
        raise ValueError(f"{memory} bytes are {-rest} under the least that can be planned for")
    most_expert = max(needs.experts)
    chunk = _most(needs.feeding, rest // _CHUNK_SHARE, LEAST_TOKENS, MOST_CHUNK)
    tile = _most(needs.mixing, rest // _TILE_SHARE, LEAST_TOKENS, min(MOST_TILE, chunk))
    most_group = max(1, min(needs.num_experts // 2, MOST_GROUP_BYTES // most_expert))
    group = _most(lambda count: 2 * count * most_expert, rest // _GROUP_SHARE, 1, most_group)
    cache_limit = min(LEAST_SPARE + rest // _SPARE_SHARE, MOST_SPARE)

    always = needs.trunk + needs.reserve + cache_limit
    running = needs.cache + needs.mixing(tile) + needs.feeding(chunk) + 2 * group * most_expert
    slots = _share_out(memory - always - max(needs.loading, running), needs.experts, needs.num_experts)
    held = sum(count * size for count, size in zip(slots, needs.experts, strict=True))
    if needs.num_experts in slots and always + held + needs.loading_layer > memory:
        slots = tuple(min(count, needs.num_experts - 1) for count in slots)
    return StreamPlan(slots, group, chunk, tile, cache_limit, memory)


def _most(size: Callable[[int], int], share: int, low: int, high: int) -> int:
    """The largest low * 2^n up to `high` that takes no more than its share beyond what `low` takes."""
    least_size, count = size(low), low
    while 2 * count <= high and size(2 * count) - least_size <= share:
        count *= 2
    return count


def _share_out(left: int, sizes: tuple[int, ...], num_experts: int) -> tuple[int, ...]:
    """The same number of slots in every layer, and from the first layer on one more where bytes are left over."""
    each = min(left // sum(sizes), num_experts)
    left -= each * sum(sizes)
    slots = []
    for size in sizes:
        more = each < num_experts and size <= left
        left -= size if more else 0
        slots.append(each + more)
    return tuple(slots)
