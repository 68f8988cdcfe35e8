"""How a model is cut over ranks, what that takes of each, and how long a token then takes: a model, in numbers alone.

Knows sizes, memory and links. Knows no arrays, no files and no device; what is measured comes in as numbers.

    experts     trunk on every rank, each its range of the experts; one sum a layer
    pipeline    each rank some layers; one message a stage
    tensor      heads, dense MLP, experts' ranges and head cut; two sums a layer, and a small one for the head
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mlx_qwen35.errors import ArgumentError

KINDS = ("experts", "pipeline", "tensor")
LAUNCH = 0.1e-3  # seconds a layer that no rank shares: launches, synchronization, Python (assumed for a Mac)
_DRAWS = 400  # of a token's experts, to tell how many the busiest rank gets


@dataclass(frozen=True)
class Link:
    """What joins ranks: seconds that a small message takes, bytes a second of large ones. full: everybody reaches
    everybody at once; otherwise a sum goes around, and takes as many times longer as there are more than two ranks."""

    name: str
    latency: float
    bandwidth: float
    full: bool = False

    def sum_seconds(self, ranks: int, nbytes: int) -> float:
        """One sum over all ranks."""
        if ranks < 2:
            return 0.0
        rounds = 1 if self.full else ranks - 1
        return rounds * self.latency + 2 * (ranks - 1) / ranks * nbytes / self.bandwidth

    def send_seconds(self, nbytes: int) -> float:
        return self.latency + nbytes / self.bandwidth


# Published figures, not measured here: docs/DISTRIBUTED.md says whose.
LINKS = {
    "tb5": Link("Thunderbolt 5, RDMA (jaccl)", 25e-6, 6.7e9, full=True),
    "tb5-ring": Link("Thunderbolt, TCP (ring)", 300e-6, 3e9),
    "10gbe": Link("10 Gbit Ethernet (ring)", 500e-6, 1.1e9),
}


@dataclass(frozen=True)
class Sizes:
    """Of a model. layers: bytes of each layer without routed experts; experts: of one routed expert, by layer. table:
    bytes of the embeddings; head: of what makes logits (the table again where they are tied). beside: of what rank 0
    has alone (vision, MTP). hidden, itemsize: of what goes from layer to layer. cache: bytes of it, by layer.
    """

    layers: tuple[int, ...]
    experts: tuple[int, ...]
    num_experts: int
    experts_per_token: int
    table: int
    head: int
    tied: bool
    beside: int
    hidden: int
    itemsize: int
    cache: tuple[int, ...]
    indivisible: str | None = None  # why heads cannot be cut over so many ranks; None: they can

    @property
    def trunk(self) -> int:
        return sum(self.layers)


@dataclass(frozen=True)
class Host:
    """A rank's machine. memory: bytes for the model there. bandwidth: of its memory, bytes a second; disk: likewise, of
    experts that are read when they are asked for."""

    memory: int
    bandwidth: float = 400e9
    disk: float = 5e9


@dataclass(frozen=True)
class Plan:
    """kind: one of KINDS. shares: of each rank, (first, stop) of its experts, its layers, or, by tensor, of its experts
    where there are some and else of the ranks. bytes: of weights and cache on each rank. held: of each rank's experts,
    the part that is in memory. seconds: a token, modelled. why: in words."""

    kind: str
    shares: tuple[tuple[int, int], ...]
    nbytes: tuple[int, ...]
    held: tuple[float, ...]
    seconds: float
    why: str = ""

    @property
    def ranks(self) -> int:
        return len(self.shares)

    @property
    def fits(self) -> bool:
        return min(self.held) >= 1

    def __str__(self) -> str:
        what = {"experts": "experts", "pipeline": "layers", "tensor": "experts" if self.shares[-1][1] > self.ranks else
                "heads, part"}[self.kind]  # fmt: skip
        each = ", ".join(
            f"rank {rank}: {what} {first} to {stop - 1}, {size / 1e9:.1f} GB"
            + ("" if held >= 1 else f" ({held:.0%} of its experts in memory)")
            for rank, ((first, stop), size, held) in enumerate(
                zip(self.shares, self.nbytes, self.held, strict=True)
            )
        )
        return f"{self.kind}: {each}"


def shared_out(count: int, capacities: Sequence[float]) -> tuple[tuple[int, int], ...]:
    """(first, stop) of contiguous shares of `count` things: as equal as the capacities (in things) allow; where they do
    not hold all, in proportion to them. Every rank gets one at least."""
    ranks = len(capacities)
    if count < ranks:
        raise ArgumentError(f"{count} cannot be shared out among {ranks} ranks: take fewer ranks")
    if sum(int(c) for c in capacities) >= count:
        counts, left, open_ = [0] * ranks, count, list(range(ranks))
        while open_:
            even = left / len(open_)
            full = [rank for rank in open_ if int(capacities[rank]) < even]
            if not full:
                for number, rank in enumerate(open_):
                    counts[rank] = left // len(open_) + (number < left % len(open_))
                break
            for rank in full:
                counts[rank] = int(capacities[rank])
                left -= counts[rank]
                open_.remove(rank)
    else:
        total = sum(capacities) or ranks
        exact = [count * (c if sum(capacities) else 1) / total for c in capacities]
        counts = [int(share) for share in exact]
        for rank in sorted(range(ranks), key=lambda r: counts[r] - exact[r])[: count - sum(counts)]:
            counts[rank] += 1
    for rank in range(ranks):
        while not counts[rank]:
            most = counts.index(max(counts))
            counts[most] -= 1
            counts[rank] += 1
    ends = [sum(counts[: rank + 1]) for rank in range(ranks)]
    return tuple(zip([0, *ends[:-1]], ends, strict=True))


def busiest(shares: Sequence[tuple[int, int]], per_token: int) -> float:
    """How many of a token's experts the busiest rank has, on average, if all are as likely."""
    count, rng, total = shares[-1][1], random.Random(0), 0
    for _ in range(_DRAWS):
        drawn = rng.sample(range(count), min(per_token, count))
        total += max(sum(first <= expert < stop for expert in drawn) for first, stop in shares)
    return total / _DRAWS


def experts_plan(sizes: Sizes, hosts: Sequence[Host], link: Link) -> Plan | None:
    """None where there are no experts, or a trunk does not fit."""
    ranks = len(hosts)
    if not sizes.num_experts or sizes.num_experts < ranks:
        return None
    each = sum(sizes.experts)
    fixed = [sizes.trunk + sum(sizes.cache) + sizes.table + (rank == 0) * _rank_0(sizes) for rank in range(ranks)]
    room = [max(host.memory - size, 0) / each for host, size in zip(hosts, fixed, strict=True)]
    if min(room) < 1:
        return None
    shares = shared_out(sizes.num_experts, room)
    held = tuple(min(1.0, r / (stop - first)) for r, (first, stop) in zip(room, shares, strict=True))
    nbytes = tuple(
        int(size + share * (stop - first) * each)
        for size, share, (first, stop) in zip(fixed, held, shares, strict=True)
    )
    active = busiest(shares, sizes.experts_per_token) * each
    seconds = len(sizes.layers) * (LAUNCH + link.sum_seconds(ranks, 4 * (sizes.hidden + 1)))
    seconds += (sizes.trunk + sizes.head + active) / min(host.bandwidth for host in hosts)
    # uniform routing: of a rank's part of a token's experts those that are not in memory come from its disk
    parts = zip(held, shares, hosts, strict=True)
    token = sizes.experts_per_token * each / sizes.num_experts
    seconds += max((1 - h) * (stop - first) * token / host.disk for h, (first, stop), host in parts)
    return Plan("experts", shares, nbytes, held, seconds)


def pipeline_plan(sizes: Sizes, hosts: Sequence[Host], link: Link) -> Plan | None:
    """None where there are fewer layers than ranks."""
    ranks, count = len(hosts), len(sizes.layers)
    if count < ranks:
        return None
    expert = [sizes.num_experts * size for size in sizes.experts or [0] * count]
    weight = [a + b + c for a, b, c in zip(sizes.layers, expert, sizes.cache, strict=True)]
    first = sizes.table + _rank_0(sizes)
    room = [max(host.memory - (rank == 0) * first, 0) for rank, host in enumerate(hosts)]
    shares = shared_out(count, [size * count / sum(weight) for size in room])
    nbytes, held = [], []
    for rank, (start, stop) in enumerate(shares):
        fixed = sum(sizes.layers[start:stop]) + sum(sizes.cache[start:stop]) + (rank == 0) * first
        own = sum(expert[start:stop])
        have = hosts[rank].memory - fixed
        held.append(min(1.0, max(have, 0) / own) if own else float(have >= 0))
        nbytes.append(int(fixed + own * held[-1]))
    active = [size + sizes.experts_per_token * e for size, e in zip(sizes.layers, sizes.experts or [0] * count,
                                                                      strict=True)]  # fmt: skip
    seconds = count * LAUNCH + ranks * link.send_seconds(sizes.hidden * sizes.itemsize)
    seconds += sizes.head / hosts[0].bandwidth
    for rank, (start, stop) in enumerate(shares):
        seconds += sum(active[start:stop]) / hosts[rank].bandwidth
        if sizes.num_experts:
            token = sizes.experts_per_token * sum(sizes.experts[start:stop])
            seconds += (1 - held[rank]) * token / hosts[rank].disk  # disks wait for each other
    return Plan("pipeline", shares, tuple(nbytes), tuple(held), seconds)


def tensor_plan(sizes: Sizes, hosts: Sequence[Host], link: Link) -> Plan | None:
    """None where heads cannot be cut, or not everything fits."""
    ranks = len(hosts)
    if sizes.indivisible is not None:
        return None
    each = sum(sizes.experts)
    part = (sizes.trunk + sum(sizes.cache)) // ranks + sizes.table
    head = 0 if sizes.tied else sizes.head // ranks  # rank 0 has all of it
    fixed = [part + (head if rank else _rank_0(sizes)) for rank in range(ranks)]
    room = [host.memory - size for host, size in zip(hosts, fixed, strict=True)]
    if min(room) < 0 or (each and sum(int(size // each) for size in room) < sizes.num_experts):
        return None
    shares = shared_out(sizes.num_experts, [size / each for size in room]) if each else tuple(
        (rank, rank + 1) for rank in range(ranks)
    )  # fmt: skip
    nbytes = tuple(int(size + (stop - first) * each) for size, (first, stop) in zip(fixed, shares, strict=True))
    held = (1.0,) * ranks
    active = busiest(shares, sizes.experts_per_token) * each if sizes.num_experts else 0
    seconds = len(sizes.layers) * (LAUNCH + 2 * link.sum_seconds(ranks, 4 * sizes.hidden)) + link.sum_seconds(ranks, 0)
    seconds += (sizes.trunk / ranks + sizes.head / ranks + active) / min(host.bandwidth for host in hosts)
    return Plan("tensor", shares, nbytes, held, seconds)


def _rank_0(sizes: Sizes) -> int:
    """Bytes that rank 0 has beside the others."""
    return sizes.beside + (0 if sizes.tied else sizes.head)


_MAKERS = {"experts": experts_plan, "pipeline": pipeline_plan, "tensor": tensor_plan}


def plans(sizes: Sizes, hosts: Sequence[Host], link: Link) -> dict[str, Plan]:
    """All that can be made, by kind, whether or not they hold everything."""
    made = {kind: make(sizes, hosts, link) for kind, make in _MAKERS.items()}
    return {kind: plan for kind, plan in made.items() if plan is not None}


def choose(sizes: Sizes, hosts: Sequence[Host], link: Link, kind: str | None = None) -> Plan:
    """The plan with the shortest modelled token among those that hold what they need, and why; or the one asked for.

    Raises ArgumentError where `kind` is none, or cannot be made of this model, or nothing can.
    """
    if kind is not None and kind not in KINDS:
        raise ArgumentError(f"plan is {kind!r}; there are {', '.join(KINDS)}")
    found = plans(sizes, hosts, link)
    if kind is not None:
        if kind not in found:
            raise ArgumentError(f"the {kind} plan does not work here: {_why_not(sizes, hosts, kind)}")
        return _with_why(found[kind], found, sizes, hosts, link, "asked for")
    useful = [plan for plan in found.values() if plan.fits or (sizes.num_experts and min(plan.held) > 0)]
    if not useful:
        raise ArgumentError(
            f"the model does not fit on {len(hosts)} ranks: "
            + "; ".join(f"{kind}: {_why_not(sizes, hosts, kind)}" for kind in KINDS)
        )
    best = min(useful, key=lambda plan: plan.seconds)
    return _with_why(best, found, sizes, hosts, link, "the shortest modelled token")


def _with_why(
    plan: Plan, found: dict[str, Plan], sizes: Sizes, hosts: Sequence[Host], link: Link, reason: str
) -> Plan:
    each = (
        f"{kind} {1e3 * found[kind].seconds:.1f} ms" + ("" if found[kind].fits else " (not all in memory)")
        if kind in found
        else f"{kind}: {_why_not(sizes, hosts, kind)}"
        for kind in KINDS
    )
    words = f"{reason}; a token over {link.name}, {1e6 * link.latency:.0f} us a message, modelled: {', '.join(each)}"
    return Plan(plan.kind, plan.shares, plan.nbytes, plan.held, plan.seconds, words)


def _why_not(sizes: Sizes, hosts: Sequence[Host], kind: str) -> str:
    if kind == "experts":
        if not sizes.num_experts:
            return "the model has no experts"
        if sizes.num_experts < len(hosts):
            return f"{sizes.num_experts} experts are fewer than {len(hosts)} ranks"
        return f"the trunk of {(sizes.trunk + sizes.table) / 1e9:.1f} GB and one expert a layer fit not on every rank"
    if kind == "pipeline":
        few = len(sizes.layers) < len(hosts)
        return "fewer layers than ranks" if few else "some rank's layers do not fit"
    return sizes.indivisible or "some rank's part does not fit"


def undividable(ranks: int, counts: Iterable[tuple[str, int]], kv_heads: int) -> str | None:
    """Why these counts of heads and sizes cannot be cut over so many ranks, by name; None: they can.

    Keys and values with fewer heads than ranks are repeated, where ranks are a multiple of them.
    """
    odd = [f"{name} {count}" for name, count in counts if count % ranks]
    if kv_heads % ranks and ranks % kv_heads:
        odd.append(f"num_key_value_heads {kv_heads}")
    return f"{ranks} ranks do not divide {', '.join(odd)}" if odd else None
