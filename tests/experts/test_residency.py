"""Residency against a naive model: who is held, what is read where, who goes first; bytes are never mixed up."""

import itertools
import random

import hypothesis
import hypothesis.strategies as st
import pytest
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mlx_qwen35.experts.residency import Residency
from tests.soak import examples

EXPERTS = 9
subset = st.lists(st.integers(0, EXPERTS - 1), unique=True, max_size=EXPERTS)


class AgainstNaive(RuleBasedStateMachine):
    """LRU beside a model that sorts everything anew. `memory`: what a reader would have written into each slot."""

    @initialize(slots=st.integers(1, EXPERTS))
    def start(self, slots):
        self.real = Residency(EXPERTS, slots)
        self.slots = slots
        self.clock = itertools.count(1)
        self.used = {}  # expert -> (was it ever demanded, when); a smaller one is evicted earlier
        self.flying, self.pinned = set(), set()
        self.memory = {}
        self.counts = dict.fromkeys(("hits", "misses", "prefetched", "prefetch_hits", "evictions"), 0)

    def movable(self, spared=()):
        order = [e for e in self.used if e not in self.flying and e not in self.pinned and e not in spared]
        return sorted(order, key=self.used.get)

    def make_room(self, count, spared=()):
        victims = self.movable(spared)[: max(0, len(self.used) + count - self.slots)]
        for victim in victims:
            del self.used[victim]
        self.counts["evictions"] += len(victims)

    def read(self, loads):
        for expert, slot in loads:
            self.memory[slot] = expert

    @rule(experts=subset)
    def demand(self, experts):
        before = dict(self.real.slot_of)
        absent = [e for e in experts if e not in self.used]
        if len(self.pinned | set(experts)) > self.slots:
            with pytest.raises(ValueError, match="cannot be held at once"):
                self.real.demand(experts)
            assert self.real.slot_of == before
            return
        if len(self.used) + len(absent) - len(self.movable(experts)) > self.slots:
            assert self.flying
            assert self.real.demand(experts) is None
            assert self.real.slot_of == before
            return
        self.make_room(len(absent), experts)
        self.counts["hits"] += len(experts) - len(absent)
        self.counts["misses"] += len(absent)
        for e in experts:
            self.counts["prefetch_hits"] += self.used.get(e, (True,))[0] is False
        # Those that had a slot were used before those that get one now.
        for e in [*(e for e in experts if e in self.used), *absent]:
            self.used[e] = (True, next(self.clock))
        self.pinned |= set(experts)

        slots, loads = self.real.demand(experts)
        assert [e for e, _ in loads] == absent
        self.read(loads)
        for expert, slot in zip(experts, slots, strict=True):
            assert expert in self.flying or self.memory[slot] == expert

    @rule()
    def release(self):
        for e in sorted(self.pinned, key=self.used.get):
            if e not in self.flying:
                self.used[e] = (True, next(self.clock))
        self.pinned.clear()
        self.real.release()

    @rule(experts=subset)
    def asked(self, experts):
        there = not self.pinned and all(e in self.used and e not in self.flying for e in experts)
        if there:
            self.counts["hits"] += len(experts)
            self.counts["prefetch_hits"] += sum(self.used[e][0] is False for e in experts)
            for e in experts:
                self.used[e] = (True, next(self.clock))
        assert self.real.asked(experts) == there

    @rule(experts=subset, most=st.none() | st.integers(0, 4))
    def prefetch(self, experts, most):
        room = self.slots - len(self.used) + len(self.movable(experts))
        absent = [e for e in experts if e not in self.used][: room if most is None else min(room, most)]
        self.make_room(len(absent), experts)
        loads = self.real.prefetch(experts, most)
        assert [e for e, _ in loads] == absent
        for expert, slot in loads:
            self.used[expert] = (False, next(self.clock))
            self.flying.add(expert)
            self.memory[slot] = "half read"
        self.counts["prefetched"] += len(absent)

    @precondition(lambda self: self.flying)
    @rule(data=st.data())
    def landed(self, data):
        expert = data.draw(st.sampled_from(sorted(self.flying)))
        self.memory[self.real.slot_of[expert]] = expert
        self.flying.remove(expert)
        if expert not in self.pinned:
            self.used[expert] = (self.used[expert][0], next(self.clock))
        self.real.landed(expert)

    @rule(expert=st.integers(0, EXPERTS - 1))
    def drop(self, expert):
        self.memory.pop(self.real.slot_of.get(expert), None)
        self.real.drop(expert)
        self.used.pop(expert, None)
        self.flying.discard(expert)
        self.pinned.discard(expert)

    @rule(experts=subset)
    def fill(self, experts):
        filled = [e for e in experts if e not in self.used][: self.slots - len(self.used)]
        loads = self.real.fill(experts)
        assert [e for e, _ in loads] == filled
        self.read(loads)
        for e in filled:
            self.used[e] = (True, -next(self.clock))

    @rule(experts=subset)
    def admit(self, experts):
        fixed = self.flying | self.pinned
        chosen = [e for e in experts if e not in fixed][: self.slots - len(fixed)]
        absent = [e for e in chosen if e not in self.used]
        self.make_room(len(absent), chosen)
        loads = self.real.admit(experts)
        assert [e for e, _ in loads] == absent
        self.read(loads)
        for e in reversed(chosen):
            self.used[e] = (True, next(self.clock))

    @rule()
    def clear(self):
        self.real.clear()
        self.used, self.flying, self.pinned, self.memory = {}, set(), set(), {}

    @invariant()
    def agree(self):
        slots = self.real.slot_of
        assert set(slots) == set(self.used)
        assert len(set(slots.values())) == len(slots) and set(slots.values()) <= set(range(self.slots))
        assert all(self.memory[slot] == e for e, slot in slots.items() if e not in self.flying)
        assert {name: getattr(self.real, name) for name in self.counts} == self.counts
        assert all(self.real.holds(e) == (e in self.used) for e in range(EXPERTS))
        last_first = sorted((e for e in self.movable() if self.used[e][0]), key=self.used.get, reverse=True)
        assert [e for e in self.real.hot() if e not in self.pinned] == last_first


AgainstNaive.TestCase.settings = hypothesis.settings(max_examples=examples(300), stateful_step_count=40)
TestAgainstNaive = AgainstNaive.TestCase


def ask(residency, *experts):
    """Demand and release at once -> the experts that had to be read."""
    _, loads = residency.demand(experts)
    residency.release()
    return [expert for expert, _ in loads]


@hypothesis.given(st.lists(st.integers(0, EXPERTS - 1), max_size=80), st.integers(2, EXPERTS))
def test_segmented_order(asked, slots):
    """One at a time, beside two lists, the oldest first."""
    residency, room = Residency(EXPERTS, slots, "slru"), int(slots * 0.8)
    probation, protected = [], []
    for expert in asked:
        missed = expert not in probation + protected
        assert ask(residency, expert) == [expert] * missed
        if missed and len(probation + protected) == slots:
            (probation or protected).pop(0)
        if missed:
            probation.append(expert)
        else:
            (probation if expert in probation else protected).remove(expert)
            protected.append(expert)
            if len(protected) > room:
                probation.append(protected.pop(0))
        assert residency.hot() == [*reversed(protected), *reversed(probation)]


@pytest.mark.parametrize("policy", ["lru", "slru"])
def test_asked_is_demand_and_release(policy):
    rng, both = random.Random(1), (Residency(12, 8, policy), Residency(12, 8, policy))
    for _ in range(300):
        experts = rng.sample(range(12), 4)
        for each in both:
            if rng.random() < 0.1 and each is both[0]:
                for other in both:
                    for expert, _ in other.prefetch(experts):
                        other.landed(expert)
        if not both[0].asked(experts):
            both[0].demand(experts)
            both[0].release()
        both[1].demand(experts)
        both[1].release()
        assert both[0].slot_of == both[1].slot_of and both[0].hot() == both[1].hot()
    for name in ("hits", "misses", "prefetched", "prefetch_hits", "evictions"):
        assert getattr(both[0], name) == getattr(both[1], name) > 0


def test_a_sweep_leaves_what_was_asked_for_twice():
    """What SLRU is for: many experts that are asked for once do not push out those that come again."""
    lost = {}
    for policy in ("lru", "slru"):
        residency = Residency(64, 10, policy)
        for expert in (0, 1, 2, 3) * 2:
            ask(residency, expert)
        for expert in range(10, 40):
            ask(residency, expert)
        lost[policy] = ask(residency, 0, 1, 2, 3)
    assert lost == {"lru": [0, 1, 2, 3], "slru": []}


@pytest.mark.parametrize("policy", ["lru", "slru"])
@pytest.mark.parametrize("slots", [10, 11, 37, 64])
def test_a_full_pool_reads_each_expert_once(policy, slots):
    """With a slot for every expert each is read once; with fewer there are never more than `slots` held."""
    residency, generator = Residency(64, slots, policy), random.Random(0)
    asked = 0
    for _ in range(500):
        experts = generator.sample(range(64), 10)
        asked += len(experts)
        ask(residency, *experts)
        assert len(residency.slot_of) <= slots
    assert residency.hits + residency.misses == asked
    assert residency.misses - residency.evictions == len(residency.slot_of)
    assert (residency.misses == 64) == (slots == 64)


def test_slots_come_in_the_order_asked_and_stay():
    residency = Residency(16, 4)
    slots, loads = residency.demand([5, 3, 9])
    assert loads == [(5, slots[0]), (3, slots[1]), (9, slots[2])]
    residency.release()
    again, loads = residency.demand([9, 5])
    assert again == [slots[2], slots[0]] and loads == []


def test_a_prefetch_in_flight_is_waited_for_and_not_read_again():
    residency = Residency(16, 4)
    ((expert, slot),) = residency.prefetch([7])
    slots, loads = residency.demand([7, 2])
    assert (expert, slots[0]) == (7, slot) and [e for e, _ in loads] == [2]
    residency.landed(7)
    residency.release()
    assert (residency.hits, residency.misses, residency.prefetched, residency.prefetch_hits) == (1, 1, 1, 1)
    ask(residency, 7)
    assert residency.prefetch_hits == 1


def test_prefetch_spares_what_it_names_and_what_is_pinned():
    residency = Residency(16, 4)
    ask(residency, 0, 1, 2, 3)  # 0 would be the first to go
    residency.demand([3])
    assert [e for e, _ in residency.prefetch([8, 0, 9, 10])] == [8, 9]
    assert {*residency.slot_of} == {0, 3, 8, 9}
    assert residency.prefetch([11]) == [] or not residency.holds(0)


def test_a_wrong_prefetch_is_the_first_to_go():
    residency = Residency(16, 4)
    ask(residency, 0, 1, 2)
    residency.prefetch([8])
    residency.landed(8)
    assert ask(residency, 5) == [5]
    assert {*residency.slot_of} == {0, 1, 2, 5}


def test_what_was_dropped_is_read_again():
    residency = Residency(16, 4)
    residency.prefetch([8])
    residency.drop(8)  # cancelled, or its read failed
    residency.demand([3, 4])
    residency.drop(4)
    residency.release()
    residency.drop(12)  # never held: nothing happens
    assert ask(residency, 8, 3, 4) == [8, 4]


def test_admit_keeps_what_is_held_where_it_is():
    residency = Residency(16, 4)
    ask(residency, 0, 1, 2, 3)
    before = dict(residency.slot_of)
    loads = residency.admit([9, 2, 8, 1, 14, 15])
    assert [e for e, _ in loads] == [9, 8]
    assert {*residency.slot_of} == {9, 2, 8, 1} and residency.slot_of[2] == before[2]
    assert residency.hot() == [9, 2, 8, 1]
    assert residency.admit([2]) == [] and residency.holds(9)  # a short list leaves room for those before it


def test_fill_begins_with_the_most_valuable():
    residency = Residency(16, 4)
    ask(residency, 6)
    assert [e for e, _ in residency.fill([6, 3, 2, 1, 0])] == [3, 2, 1]
    assert residency.hot() == [6, 3, 2, 1]
    other = Residency(16, 4)
    other.fill(residency.hot())
    assert other.hot() == residency.hot()


@pytest.mark.parametrize("arguments", [(16, 0), (16, 17), (0, 0), (16, 4, "fifo")])
def test_refused_at_once(arguments):
    with pytest.raises(ValueError, match="slots for|unknown policy"):
        Residency(*arguments)


@pytest.mark.parametrize("call", ["demand", "prefetch", "fill", "admit"])
def test_refuses_what_is_no_set_of_experts(call):
    residency = Residency(16, 4)
    for experts in ([3, 3], [16], [-1]):
        with pytest.raises(ValueError, match="named twice|experts 0 to 15"):
            getattr(residency, call)(experts)
    assert residency.slot_of == {}
