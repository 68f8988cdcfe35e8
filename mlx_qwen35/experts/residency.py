"""Which of one layer's experts are in memory, and in which slot.

Knows the order in which they were asked for, and who may not be moved. Knows no arrays, no files, no threads and no
router: it says what has to be read where, and is told what became of it.

    an expert is    absent ── prefetch ──▶ in flight ── landed ──▶ waiting ── demand ──▶ pinned ── release ──▶ idle
                    absent ── demand (a load: to be read now) ─────────────────────────▶ pinned
                    idle ── demand ──▶ pinned           waiting or idle ── its slot is needed ──▶ absent
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import chain, islice

# An expert, and the slot that its weights have to be read into.
Load = tuple[int, int]

# How much of the pool belongs to experts that were asked for more than once, by policy. Without any, this is LRU.
PROTECTED = {"lru": 0.0, "slru": 0.8}


class Residency:
    """The slots of one layer. Every call takes time for the experts it names, whatever the number of slots.

    `slot_of`: the slot of every expert that has one, those still in flight included; not to be written to.
    Counted: `hits` and `misses`, experts demanded that had a slot or had none (misses are the loads of `demand`);
    `prefetched`, the loads of `prefetch`, and `prefetch_hits`, those of them that were then demanded (hits, too);
    `evictions`, experts that lost their slot to another. `changes` goes up whenever `at_hand` may have another answer.

    A call that is interrupted (Ctrl-C) may leave it inconsistent: `clear` mends that, once no read is under way.
    """

    def __init__(self, num_experts: int, slots: int, policy: str = "lru"):
        """slots: at most num_experts. policy: "lru", or "slru" (segmented: two demands make an expert harder to evict).

        Raises ValueError for other numbers and policies.
        """
        if not 1 <= slots <= num_experts:
            raise ValueError(f"{slots} slots for {num_experts} experts: it takes one at least, no more than experts")
        if policy not in PROTECTED:
            raise ValueError(f"unknown policy {policy!r}: choose from {', '.join(PROTECTED)}")
        self.num_experts, self.slots, self.policy = num_experts, slots, policy
        self.hits = self.misses = self.prefetched = self.prefetch_hits = self.evictions = 0
        self.changes = 0
        self.clear()

    def clear(self) -> None:
        """Forget everything but the counters: no expert is held, nothing is pinned, every slot is free."""
        self.changes += 1
        self.slot_of: dict[int, int] = {}
        self._free = list(reversed(range(self.slots)))
        self._in_flight: dict[int, bool] = {}  # has it been demanded meanwhile?
        self._waiting: OrderedDict[int, None] = OrderedDict()  # prefetched and never demanded, the oldest first
        self._pinned: dict[int, bool] = {}  # was it idle before, that is, asked for already?
        self._idle = _Recency(int(self.slots * PROTECTED[self.policy]))

    def holds(self, expert: int) -> bool:
        return expert in self.slot_of

    def at_hand(self) -> dict[int, int]:
        """The slot of every expert that has one and is not in flight."""
        return {expert: slot for expert, slot in self.slot_of.items() if expert not in self._in_flight}

    def asked(self, experts: Sequence[int]) -> bool:
        """`demand` and `release` of experts, each named once, that all are at hand. False, and nothing is changed,
        where one is not, or something is pinned."""
        if self._pinned or not self.slot_of.keys() >= set(experts):
            return False
        if self._in_flight and not self._in_flight.keys().isdisjoint(experts):
            return False
        again = []
        for expert in experts:
            unasked = expert in self._waiting
            self._remove_movable(expert)
            self.prefetch_hits += unasked
            again.append(not unasked)
        for expert, before in zip(experts, again, strict=True):
            self._idle.add(expert, before)
        self.hits += len(again)
        return True

    def demand(self, experts: Sequence[int]) -> tuple[list[int], list[Load]] | None:
        """Pin experts, each named once, until `release`. -> their slots in the order given; what has to be read first.

        None, and nothing is changed, if they do not fit before prefetches in flight have landed or been dropped. An
        expert in flight is not a load: wait for its read. Raises ValueError if they cannot fit at all beside those that
        an earlier demand pinned.
        """
        self._check(experts)
        if len(self._pinned.keys() | experts) > self.slots:
            raise ValueError(
                f"{len(experts)} experts cannot be held at once: there are {self.slots} slots, "
                f"{len(self._pinned)} of them pinned"
            )
        absent = [expert for expert in experts if expert not in self.slot_of]
        movable = sum(expert in self._waiting or expert in self._idle for expert in experts)
        if len(absent) > self._room() - movable:
            return None
        for expert in experts:
            if expert in self.slot_of:
                self._pin(expert)
        loads = self._place(absent)
        self._pinned.update(dict.fromkeys(absent, False))
        self.hits += len(experts) - len(absent)
        self.misses += len(absent)
        return [self.slot_of[expert] for expert in experts], loads

    def release(self) -> None:
        """Unpin what was demanded: its loads have been read, and whatever computes with it is done."""
        for expert, again in self._pinned.items():
            if expert not in self._in_flight:
                self._idle.add(expert, again)
        self._pinned = {}

    def prefetch(self, experts: Sequence[int], most: int | None = None) -> list[Load]:
        """Make room for experts, the likeliest first, that will probably be demanded. -> what to read, at most `most`.

        Left out are those that have a slot, and those for whom there is no room: what is pinned, in flight or named
        here stays where it is. A load is in flight until `landed` or `drop`; from then on, until it is demanded, it is
        among the first to be evicted.
        """
        self._check(experts)
        absent = [expert for expert in experts if expert not in self.slot_of]
        movable = sum(expert in self._waiting or expert in self._idle for expert in experts)
        room = self._room() - movable
        loads = self._place(absent[: room if most is None else min(room, most)], spared=frozenset(experts))
        self._in_flight.update((expert, False) for expert, _ in loads)
        self.prefetched += len(loads)
        return loads

    def landed(self, expert: int) -> None:
        """The read of a prefetched expert is done. One that is not in flight is left as it is."""
        demanded = self._in_flight.pop(expert, None)
        self.changes += 1
        if demanded is None or expert in self._pinned:
            return
        if demanded:
            self._idle.add(expert, again=False)
        else:
            self._waiting[expert] = None

    def drop(self, expert: int) -> None:
        """Free an expert's slot, whatever its state: what is in there is not good. No read may go on writing to it."""
        slot = self.slot_of.pop(expert, None)
        if slot is None:
            return
        self.changes += 1
        self._in_flight.pop(expert, None)
        self._pinned.pop(expert, None)
        self._remove_movable(expert)
        self._free.append(slot)

    def hot(self) -> list[int]:
        """Experts that are held and have been demanded (or filled in, or admitted), the last to be evicted first."""
        return [*reversed(self._pinned), *reversed([*self._idle])]

    def fill(self, experts: Sequence[int]) -> list[Load]:
        """Put experts, the most valuable first, into free slots, as the next to be evicted. -> what to read.

        They are not pinned: read them before anything else is asked of this layer.
        """
        self._check(experts)
        loads = self._place([expert for expert in experts if expert not in self.slot_of][: len(self._free)])
        for expert, _ in loads:
            self._idle.add_first(expert)
        return loads

    def admit(self, experts: Sequence[int]) -> list[Load]:
        """Hold the most important experts, the most important first; as many as fit. -> what to read.

        What is held already keeps its slot, whatever is needed goes to the others, and the most important are the last
        to be evicted. Neither hits nor misses. Not pinned: read them before anything else is asked of this layer.
        """
        self._check(experts)
        fixed = self._pinned.keys() | self._in_flight
        chosen = [expert for expert in experts if expert not in fixed][: self.slots - len(fixed)]
        held = {expert for expert in chosen if self._remove_movable(expert)}
        loads = self._place([expert for expert in chosen if expert not in held])
        for expert in reversed(chosen):
            self._idle.add(expert, again=expert in held)
        return loads

    def _check(self, experts: Sequence[int]) -> None:
        if len(set(experts)) != len(experts):
            raise ValueError(f"an expert is named twice: {list(experts)}")
        if experts and not (0 <= min(experts) and max(experts) < self.num_experts):
            raise ValueError(f"there are experts 0 to {self.num_experts - 1}, asked for are {list(experts)}")

    def _room(self) -> int:
        """How many slots are free or can be freed."""
        return len(self._free) + len(self._waiting) + len(self._idle)

    def _pin(self, expert: int) -> None:
        """An expert that has a slot is demanded."""
        unasked = expert in self._waiting or self._in_flight.get(expert) is False
        if expert in self._in_flight:
            self._in_flight[expert] = True
        self._remove_movable(expert)
        self._pinned.pop(expert, None)  # so that it becomes the newest
        self._pinned[expert] = not unasked
        self.prefetch_hits += unasked

    def _place(self, absent: Sequence[int], spared: frozenset[int] = frozenset()) -> list[Load]:
        """Give a slot to each: free ones, then those of prefetches never demanded, then those of idle experts."""
        missing = len(absent) - len(self._free)
        if missing > 0:
            in_order = (expert for expert in chain(self._waiting, self._idle) if expert not in spared)
            for victim in [*islice(in_order, missing)]:
                self._remove_movable(victim)
                self._free.append(self.slot_of.pop(victim))
                self.evictions += 1
        loads = [(expert, self._free.pop()) for expert in absent]
        self.changes += 1
        self.slot_of.update(loads)
        return loads

    def _remove_movable(self, expert: int) -> bool:
        if expert in self._waiting:
            del self._waiting[expert]
            return True
        return self._idle.remove(expert)


class _Recency:
    """Experts in the order in which they are to be evicted; iterating begins with the next.

    Two segments: one that is asked for again goes to the second, which holds `protected` at most and gives its oldest
    back to the newest end of the first. With protected = 0 there is one order, that of the last use.
    """

    def __init__(self, protected: int):
        self._protected_size = protected
        self._probation: OrderedDict[int, None] = OrderedDict()
        self._protected: OrderedDict[int, None] = OrderedDict()

    def __contains__(self, expert: int) -> bool:
        return expert in self._probation or expert in self._protected

    def __len__(self) -> int:
        return len(self._probation) + len(self._protected)

    def __iter__(self) -> Iterator[int]:
        return chain(self._probation, self._protected)

    def add(self, expert: int, again: bool) -> None:
        if not again:
            self._probation[expert] = None
            return
        self._protected[expert] = None
        if len(self._protected) > self._protected_size:
            oldest, _ = self._protected.popitem(last=False)
            self._probation[oldest] = None

    def add_first(self, expert: int) -> None:
        self._probation[expert] = None
        self._probation.move_to_end(expert, last=False)

    def remove(self, expert: int) -> bool:
        """Whether it was there."""
        for segment in (self._probation, self._protected):
            if expert in segment:
                del segment[expert]
                return True
        return False
