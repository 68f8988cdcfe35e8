"""The bank whose experts are on the disk, and in memory as far as they fit: the same sums as resident.py.

Bit for bit on a CPU, for few rows, and after `be_exact`: on a GPU MLX chooses a sorted product by its stack's size.
Knows what a layer needs next and in which order things happen. Who is in which slot is residency.py's business, the
bytes are reader.py's, and when slots may be overwritten is pool.py's.

Few rows (decoding): one evaluation shows the expert ids, and with them a guess at the next layer's; the missing are
read into slots while the shared expert computes; then one product in the router's order, while the guessed are read.
Many rows (a prompt): every expert that is asked for is needed once, whatever fits. Those in memory compute first, the
others come through staging in groups, one being read while the other computes. The end of a prompt leaves the experts
that it asked for last in the slots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import mlx.core as mx
import numpy as np

from ..config import QuantSpec
from ..kernels.weights import Projections
from .layout import LayerLayout
from .pool import ExpertPool
from .reader import Read
from .residency import Residency
from .resident import ByExpert, weighted_sum
from .slots import Slots

POLICY = "slru"  # it kept at least as much as LRU on every trace of benchmarks/replay.py, and costs the same

Guess = Callable[[mx.array], mx.array]


class StreamedExperts:
    """The routed experts of one layer, of which `slots` are in memory at a time.

    No nn.Module: it has no parameters, and what tools do to a module's arrays must not happen to slots.
    """

    def __init__(
        self, pool: ExpertPool, layout: LayerLayout, specs: Mapping[str, QuantSpec], slots: int, dtype: mx.Dtype
    ):
        """specs: "gate_proj" .. -> its quantization, where it has one. dtype: of floats in memory."""
        self.residency, self.layer = Residency(layout.num_experts, slots, POLICY), layout.layer
        self._pool, self._layout, self._specs, self._dtype = pool, layout, specs, dtype
        self._slots = Slots(layout, specs, slots, dtype)
        self._ahead: dict[int, Read] = {}  # prefetches that have not been asked for or looked at yet
        self._reads: list[Read] = []  # under way for this turn
        self._next: StreamedExperts | None = None
        self._guess: Guess | None = None
        self._table: tuple[int, mx.array] | None = None  # slots by expert, as of so many changes

    def be_exact(self) -> None:
        """From now on the slots' sums are those of all experts for any number of rows, on every device."""
        self._slots.experts.be_exact()

    def follow(self, bank: StreamedExperts, guess: Guess) -> None:
        """bank: of the next layer. guess(x [N, H]) -> the ids [N, K] that its router probably asks for after this x."""
        self._next, self._guess = bank, guess

    def __call__(
        self, x: mx.array, expert_ids: mx.array, weights: mx.array, beside: Sequence[mx.array] = ()
    ) -> mx.array:
        """x [N, H], expert_ids [N, K] int, weights [N, K] -> sum over K of weight * expert(x), [N, H].

        beside: arrays that can be computed while experts are read. Raises ExpertReadError if the disk fails.
        """
        if self._pool.hoped is not None:
            return weighted_sum(self._slots.experts.pairs(x, self._hope(expert_ids)), weights)
        if not self._slots.experts.few(expert_ids):
            self._pool.settled(expert_ids, x)
            return weighted_sum(self._many(x, np.array(expert_ids), beside), weights)
        guessed = self._decided(x, expert_ids)
        y = self._few(
            np.array(expert_ids), guessed, beside, lambda rows, slots: self._slots.experts.pairs(x[rows], slots)
        )
        return weighted_sum(y, weights)

    def projections(self) -> Projections | None:
        """The slots as kernels read them; None if they do not know the form of one."""
        return self._slots.experts.projections()

    def mixed(self, x: mx.array, expert_ids: mx.array, weights: mx.array, shared: Projections) -> mx.array:
        """What ResidentExperts.mixed computes, by the same kernels; raises as __call__ does."""
        compute = self._slots.experts.mixed
        if self._pool.hoped is not None:
            return compute(x, self._hope(expert_ids), weights, shared)
        guessed = self._decided(x, expert_ids)
        return self._few(
            np.array(expert_ids), guessed, (), lambda rows, slots: compute(x[rows], slots, weights[rows], shared)
        )

    def release(self) -> None:
        """Nothing waits to compute with what was demanded any more."""
        self.residency.release()

    def forget(self) -> None:
        """After an error or interrupt, when all reads have ended: count no slot, their content is in doubt."""
        self._reads, self._ahead = [], {}
        self.residency.clear()

    def drop_ahead(self) -> None:
        """Reads ahead that nobody asked for are not worth waiting for."""
        ahead = [(expert, read) for expert, read in self._ahead.items()]
        self._stop([read for _, read in ahead])
        for expert, read in ahead:
            self._looked_at(expert, read)
        self._ahead = {}

    def warm(self, experts: Sequence[int]) -> int:
        """Read experts, the most valuable first, into free slots; in a turn. -> how many."""
        self._pool.touch(self)
        self._reads = [self._submit(expert, slot) for expert, slot in self.residency.fill(experts)]
        count = len(self._reads)
        for read in self._reads:
            read.wait()
        self._reads = []
        return count

    # Few rows, in a window of layers

    def _hope(self, expert_ids: mx.array) -> mx.array:
        """The slots of these experts, as far as they have one; nothing is evaluated."""
        if self._table is None or self._table[0] != self.residency.changes:
            slots = np.zeros(self.residency.num_experts, np.uint32)
            at_hand = self.residency.at_hand()
            slots[list(at_hand.keys())] = list(at_hand.values())
            self._table = self.residency.changes, mx.array(slots)
        self._pool.hoped.append((self, expert_ids))
        return mx.take(self._table[1], expert_ids)

    def had(self, expert_ids: mx.array) -> bool:
        """Whether all that was hoped for was there; then it counts as asked for, else nothing is changed."""
        rows = expert_ids.tolist()
        wanted = rows[0] if len(rows) == 1 else list(dict.fromkeys(chain.from_iterable(rows)))
        self._pool.touch(self)
        there = self.residency.asked(wanted)
        if not self._ahead:
            self._pool.sure(self)
        if there:
            self._pool.chances.looked(self.layer, False)
        return there

    # Few rows

    def _decided(self, x: mx.array, expert_ids: mx.array) -> mx.array | None:
        """Evaluate the ids, and with them the guess at the next layer's, which is returned."""
        guessed = self._guess(x) if self._guess is not None and self._pool.guess else None
        self._pool.settled(*(a for a in (expert_ids, guessed) if a is not None))
        return guessed

    def _few(
        self,
        ids: np.ndarray,
        guessed: mx.array | None,
        beside: Sequence[mx.array],
        compute: Callable[[slice, mx.array], mx.array],
    ) -> mx.array:
        """compute(rows, slots [R, K]): of some rows, whose experts are in these slots."""
        parts = []
        for rows in self._that_fit(ids):
            if parts:  # the rows before are done with their slots only when they are computed
                self._pool.settled()
            wanted = list(dict.fromkeys(ids[rows].flatten().tolist()))
            slot_of = self._hold(wanted, guessed, beside)
            slots = mx.array([[slot_of[e] for e in row] for row in ids[rows].tolist()], mx.uint32)
            parts.append(compute(rows, slots))
            self._pool.queue(self, parts[-1])
            guessed, beside = None, ()
        return parts[0] if len(parts) == 1 else mx.concatenate(parts)

    def _that_fit(self, ids: np.ndarray) -> Iterator[slice]:
        """Cut rows so that the experts of each piece fit into the slots together."""
        start, together = 0, set()
        for row, experts in enumerate(ids.tolist()):
            together |= set(experts)
            if len(together) > self.residency.slots:
                yield slice(start, row)
                start, together = row, set(experts)
        yield slice(start, len(ids))

    def _hold(self, wanted: list[int], guessed: mx.array | None, beside: Sequence[mx.array]) -> dict[int, int]:
        """Have experts in memory; -> the slot of each."""
        self._pool.touch(self)
        guessed_before, waited_before = self.residency.prefetch_hits, self._pool.wait_seconds
        mine = set(wanted)
        for expert, read in list(self._ahead.items()):
            if expert in mine:
                read.promote()
            elif read.done or read.cancel():
                self._looked_at(expert, self._ahead.pop(expert))
        placed = self.residency.demand(wanted)
        if placed is None:  # reads that were guessed wrong are under way, and hold slots that are needed
            wrong = [expert for expert in self._ahead if expert not in mine]
            self._stop([self._ahead[expert] for expert in wrong])
            for expert in wrong:
                self._looked_at(expert, self._ahead.pop(expert))
            placed = self.residency.demand(wanted)
        slots, loads = placed
        self._reads += [self._submit(expert, slot, helped=True) for expert, slot in loads]
        coming = {expert: self._ahead.pop(expert) for expert in wanted if expert in self._ahead}
        self._pool.chances.looked(self.layer, bool(loads or coming))
        self._reads += coming.values()
        self._pool.wait(self._reads, beside, helped=True)
        self._reads = []
        for expert in coming:
            self.residency.landed(expert)
        guessing = self._pool.guessing
        guessing.came_true(self.residency.prefetch_hits - guessed_before)
        if loads and not coming:
            guessing.waited(self._pool.wait_seconds - waited_before, len(loads))
        if guessed is not None:  # only now: they would take their share of the disk from what is waited for
            self._next._prepare(guessed)
        return dict(zip(wanted, slots, strict=True))

    def _prepare(self, guessed: mx.array) -> None:
        """Read ahead what this layer will probably ask for."""
        self._pool.touch(self)
        likely = list(dict.fromkeys(np.array(guessed).flatten().tolist()))
        loads = self.residency.prefetch(likely, self.residency.slots)
        for expert, slot in loads:
            self._ahead[expert] = self._submit(expert, slot, urgent=False)
        self._pool.guessing.made(len(loads))

    def _looked_at(self, expert: int, read: Read) -> None:
        """A prefetch has ended, one way or another."""
        if read.good:
            self.residency.landed(expert)
        else:
            self.residency.drop(expert)
            self._pool.guessing.made(-1)

    # Many rows

    def _many(self, x: mx.array, ids: np.ndarray, beside: Sequence[mx.array]) -> mx.array:
        """-> each row of x through each of its experts, [N, K, H]."""
        self._pool.touch(self)
        self.drop_ahead()
        if beside:
            mx.async_eval(*beside)
        found = ByExpert(ids)
        passes = self._passes(found)
        reading: list[list[Read]] = []
        done = []
        for number, each in enumerate(passes):
            # While this one computes, the next is read; a slot is written to when the pass that had it is done.
            while len(reading) < min(number + 2, len(passes)) and passes[len(reading)].after <= number:
                reading.append(self._read_pass(passes[len(reading)]))
            self._pool.wait(reading[number])
            experts, slots = zip(*each.members, strict=True)
            done.append(each.slots.experts.runs(x[found.rows(experts)], slots, found.counts(experts)))
            mx.eval(done[-1])
        self._reads = []
        order = [expert for each in passes for expert, _ in each.members]
        y = mx.concatenate(done)[found.places(order)].reshape(*ids.shape, -1)
        mx.eval(y)
        return y

    def _passes(self, found: ByExpert) -> list[_Pass]:
        """Which experts are computed together: those in memory, those that pass through, those that come to stay."""
        slot_of = self.residency.slot_of
        held = sorted(((e, slot_of[e]) for e in found.experts if e in slot_of), key=_slot)
        passes = [_Pass(self._slots, held, read=False, after=0)] if held else []
        first_to_stay = len(passes)  # the slots of those that leave are free when the held ones are done
        recent = [expert for _, expert in sorted(zip(found.last, found.experts, strict=True), reverse=True)]
        staying = self.residency.fill(recent) if self._pool.more else self.residency.admit(recent)
        group = self._pool.plan.group
        known = {expert for expert, _ in (*held, *staying)}
        passing = [expert for expert in found.experts if expert not in known]
        if passing:
            staging = self._pool.staging(
                (self._layout.tensors, tuple(self._specs.items())),
                lambda: self._stage(min(group, self.residency.num_experts)),
            )
            for number, start in enumerate(range(0, len(passing), group)):
                members = [(expert, slot) for slot, expert in enumerate(passing[start : start + group])]
                passes.append(_Pass(staging[number % 2], members, read=True, after=max(len(passes) - 1, 0)))
        staying.sort(key=_slot)
        for start in range(0, len(staying), group):
            after = max(len(passes) - 1, first_to_stay)
            passes.append(_Pass(self._slots, staying[start : start + group], read=True, after=after))
        return passes

    def _stage(self, size: int) -> Slots:
        """Slots for experts that pass through."""
        made = Slots(self._layout, self._specs, size, self._dtype)
        if self._slots.experts.exact:
            made.experts.be_exact()
        return made

    def _read_pass(self, each: _Pass) -> list[Read]:
        if not each.read:
            return []
        reads = [self._submit(expert, slot, each.slots) for expert, slot in each.members]
        self._reads += reads
        self._pool.swept += len(reads)
        return reads

    # Reads

    def _submit(
        self, expert: int, slot: int, slots: Slots | None = None, *, urgent: bool = True, helped: bool = False
    ) -> Read:
        targets = (slots or self._slots).targets(slot)
        return self._pool.reader.submit(self._layout.layer, expert, targets, urgent=urgent, helped=helped)

    def _stop(self, reads: Sequence[Read]) -> None:
        for read in reads:
            read.cancel()
        self._pool.reader.settle(reads)


@dataclass(frozen=True)
class _Pass:
    """Experts of a prompt that are computed together: members (expert, slot), by slot.

    read: they have to be read first, which may begin when `after` passes are done.
    """

    slots: Slots
    members: list[tuple[int, int]]
    read: bool
    after: int


def _slot(member: tuple[int, int]) -> int:
    return member[1]
