"""What the streamed layers of a model share: a reader, the turns in which they compute, staging, and what is counted.

Knows when memory may be written to. Knows no router and no sums.

A turn is one pass of tokens through the layers. Only in one are slots read from and written to, one turn at a time,
whatever thread it is on; when it ends, nothing waits to compute with a slot any more. So a slot can be overwritten as
soon as what this turn has queued with it is evaluated: the bank of the next layer does that when it asks for its
expert ids, and the end of the turn does it for the last one.

A turn is  `with pool.one_at_a_time, pool.turn(more):`  in one line. Python never puts an interrupt (Ctrl-C) between
taking a plain lock in a `with` and being inside of it; what else an interrupt leaves behind, the next turn tidies up.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter, sleep
from typing import TYPE_CHECKING

import mlx.core as mx

from ..errors import ExpertReadError
from ..machine.gpu import has_metal, keep_wired, limit_cache
from .bank import Bank
from .budget import StreamPlan
from .chances import Chances
from .guessing import Guessing
from .hot_list import HotList
from .reader import Read, Reader

if TYPE_CHECKING:
    from .slots import Slots

_WARM_AT_ONCE = 16  # experts; who wants to compute waits for so many at most
_LET_OTHERS_IN = 0.001  # seconds: a lock that is taken again at once is nobody else's


@dataclass(frozen=True)
class ExpertStats:
    """What streaming did since loading, or between two of these: `later - earlier`.

    hits, misses: experts that decoding asked for and that were in memory, or were not. prefetched: read because the
    next layer would probably ask for them, prefetch_hits: and it did (hits too). swept: read for a prompt; warmed: read
    by the warm start. records: experts read in all; bytes_read: off the disk. seconds: the time that all this took;
    wait_seconds: in which it stood still for the disk; read_seconds: in which at least one read was under way. depth:
    reads under way at once, on average.
    """

    hits: int
    misses: int
    prefetched: int
    prefetch_hits: int
    swept: int
    warmed: int
    records: int
    bytes_read: int
    seconds: float
    wait_seconds: float
    read_seconds: float
    depth: float

    @property
    def hit_rate(self) -> float:
        """Of what decoding asked for; 1 where it asked for nothing."""
        asked = self.hits + self.misses
        return self.hits / asked if asked else 1.0

    @property
    def read_speed(self) -> float:
        """Bytes a second while anything was read."""
        return self.bytes_read / self.read_seconds if self.read_seconds > 0 else 0.0

    @property
    def wait_share(self) -> float:
        """Of the time, how much stood still for the disk."""
        return self.wait_seconds / self.seconds if self.seconds > 0 else 0.0

    def __str__(self) -> str:
        asked = f"{self.hit_rate:.1%} in memory, " if self.hits + self.misses else ""
        return (
            f"{asked}{self.bytes_read / 1e9:.2f} GB read at {self.read_speed / 1e9:.2f} GB/s, "
            f"{self.wait_share:.1%} waiting"
        )

    def __sub__(self, earlier: ExpertStats) -> ExpertStats:
        values = {name: getattr(self, name) - getattr(earlier, name) for name in self.__dataclass_fields__}
        busy = values["read_seconds"]
        work = self.depth * self.read_seconds - earlier.depth * earlier.read_seconds
        return ExpertStats(**values | {"depth": work / busy if busy > 0 else 0.0})


class ExpertPool:
    """The shared half of all streamed experts of a model; `banks` in the order of the layers."""

    def __init__(self, reader: Reader, plan: StreamPlan, *, prefetch: bool = True, hot_list: HotList | None = None):
        """hot_list: where close() writes what was in memory at last, and warm_up() reads it."""
        if mx.default_device().type == mx.gpu and not has_metal():
            raise NotImplementedError(
                "experts are streamed into memory that processor and GPU share, which only Apple's GPUs have here: "
                "give more memory, or compute on the CPU with mx.set_default_device(mx.cpu)"
            )
        self.reader, self.plan, self.prefetch = reader, plan, prefetch
        self.guessing = Guessing(shared_processor=mx.default_device().type == mx.cpu)
        self.guess = prefetch  # whether this turn reads ahead
        self.banks: list[Bank] = []
        self.chances = Chances()
        self.hoped: list[tuple[Bank, mx.array]] | None = None  # while a window is queued: banks and ids
        self.more = False  # further tokens of the same prompt follow this turn
        self.wait_seconds = 0.0
        self.swept = self.warmed = 0
        self.one_at_a_time = threading.Lock()
        self._opened = perf_counter()
        self._hot_list = hot_list
        self._warmer: threading.Thread | None = None
        self._warming = False
        self._queued: tuple[Bank, mx.array] | None = None
        self._unsure: set[Bank] = set()  # banks whose residency an interrupt would leave in doubt
        self._staging: tuple[object, list[Slots]] | None = None
        self._copied = 0, 0.0  # experts that were read until the last turn ended, and processor time for them
        # Without a limit MLX's spare buffers grow beyond any plan; wired memory is what macOS does not compress.
        limits = limit_cache(plan.cache_limit), keep_wired(plan.memory)
        self._limits = [weakref.finalize(self, let_go) for let_go in limits]  # also for who forgets to close
        for finalizer in self._limits:
            finalizer.atexit = False

    def turn(self, more: bool) -> _Turn:
        """To be entered with `one_at_a_time`: tokens pass through the layers. more: further ones of the same prompt
        follow."""
        return _Turn(self, more)

    def begin(self, more: bool) -> None:
        self.more, self.hoped = more, None
        self.guess = self.prefetch and self.guessing.pays()
        if threading.current_thread() is not self._warmer:
            self._warming = False  # what a prompt asks for is worth more
        if self._unsure or self._queued is not None:  # an interrupt came while the last turn was ended
            self.abandon()

    def finish(self) -> None:
        """The end of a turn in good order: reads ahead that no layer will ask for are not waited for in the next."""
        self.settled()
        self._staging = None
        read = self.reader.stats
        records, seconds = self._copied
        self.guessing.copied(read.processor_seconds - seconds, read.records - records)
        self._copied = read.records, read.processor_seconds
        for bank in list(self._unsure):
            bank.drop_ahead()
            self._unsure.discard(bank)

    def abandon(self) -> None:
        """After an error or interrupt: nothing is read or computed any more, and no slot counts whose content is in
        doubt."""
        self._queued = self._staging = None
        mx.synchronize()
        self.reader.abandon()  # those too that no bank knows of, because the interrupt came before it took note
        for bank in list(self._unsure):
            bank.forget()
            self._unsure.discard(bank)

    def touch(self, bank: Bank) -> None:
        """The residency of a bank is about to change."""
        self._unsure.add(bank)

    def queue(self, bank: Bank, y: mx.array) -> None:
        """y, not evaluated yet, reads slots of `bank`."""
        self._queued = bank, y

    def settled(self, *arrays: mx.array) -> None:
        """Evaluate arrays, with what is queued: after it the slots of that bank may be overwritten."""
        if self._queued is None:
            mx.eval(*arrays)
            return
        bank, y = self._queued
        mx.eval(y, *arrays)
        self._queued = None
        bank.release()
        self._unsure.discard(bank)

    def look(self, *arrays: mx.array) -> Bank | None:
        """The end of a window: evaluate arrays; -> the first bank that lacked an expert. What it and those behind it
        gave counts for nothing."""
        hoped, self.hoped = self.hoped or [], None
        self.settled(*arrays, *(ids for _, ids in hoped))
        for bank, ids in hoped:
            if not bank.had(ids):
                return bank
        return None

    def sure(self, bank: Bank) -> None:
        """The residency of a bank is in order again."""
        self._unsure.discard(bank)

    def wait(self, reads: Sequence[Read], meanwhile: Sequence[mx.array] = (), *, helped: bool = False) -> None:
        """Until reads are done; raises what the first failed with. meanwhile: arrays to compute in that time. helped:
        they were submitted so, and are read on this thread too."""
        if all(read.done for read in reads):
            self.reader.wait(reads)
            return
        if meanwhile:
            mx.async_eval(*meanwhile)
        start = perf_counter()
        try:
            if helped:
                self.reader.help()
            self.reader.wait(reads)
        finally:
            self.wait_seconds += perf_counter() - start

    def staging(self, kind: object, make: object) -> list[Slots]:
        """Two stacks of slots for the experts of a prompt; made anew where a layer's tensors are of another kind."""
        if self._staging is None or self._staging[0] != kind:
            self._staging = None
            self._staging = kind, [make(), make()]
        return self._staging[1]

    def stats(self) -> ExpertStats:
        """Counts since the model was loaded."""
        read = self.reader.stats
        each = [bank.residency for bank in self.banks]
        sums = {name: sum(getattr(r, name) for r in each) for name in ("hits", "misses", "prefetched", "prefetch_hits")}
        return ExpertStats(
            **sums,
            swept=self.swept,
            warmed=self.warmed,
            records=read.records,
            bytes_read=read.bytes_read,
            seconds=perf_counter() - self._opened,
            wait_seconds=self.wait_seconds,
            read_seconds=read.busy_seconds,
            depth=read.read_seconds / read.busy_seconds if read.busy_seconds else 0.0,
        )

    def warm_up(self) -> None:
        """Read what was in memory at last into slots, on a thread of its own, until somebody wants to compute."""
        found = {} if self._hot_list is None else self._hot_list.read(self._sizes())
        if found:
            self._warming = True
            self._warmer = threading.Thread(target=self._warm_up, args=(found,), name="expert-warmer", daemon=True)
            self._warmer.start()

    def close(self) -> None:
        """End the reader, put MLX's limits back, and write down what was in memory, if anything was asked for."""
        self._warming = False
        if self._hot_list is not None and self.banks:
            self._write_hot_list(self._hot_list)
        self._hot_list = None
        self.reader.close()
        if self._warmer is not None:
            self._warmer.join()
        self.banks.clear()
        for let_go in self._limits:
            let_go()

    def _warm_up(self, hot: dict[int, list[int]]) -> None:
        for bank in list(self.banks):
            experts = hot.get(bank.layer, [])[: bank.residency.slots]
            for start in range(0, len(experts), _WARM_AT_ONCE):
                try:
                    with self.one_at_a_time:
                        if not self._warming:
                            return
                        with self.turn(False):
                            self.warmed += bank.warm(experts[start : start + _WARM_AT_ONCE])
                except ExpertReadError:  # who asks for these experts will be told
                    return
                sleep(_LET_OTHERS_IN)

    def _write_hot_list(self, hot_list: HotList) -> None:
        """What is in memory, and behind it what was in the list and fits."""
        if not self.swept and not any(bank.residency.hits + bank.residency.misses for bank in self.banks):
            return
        known, layers = hot_list.read(self._sizes()), {}
        for bank in self.banks:
            now = [] if bank in self._unsure else bank.residency.hot()
            layers[bank.layer] = list(dict.fromkeys([*now, *known.get(bank.layer, [])]))[: bank.residency.slots]
        hot_list.write(layers)

    def _sizes(self) -> dict[int, int]:
        return {bank.layer: bank.residency.num_experts for bank in self.banks}


class _Turn:
    """Begins, and ends in one way or the other."""

    def __init__(self, pool: ExpertPool, more: bool):
        self._pool, self._more = pool, more

    def __enter__(self) -> None:
        self._pool.begin(self._more)

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        try:
            if kind is None:
                self._pool.finish()
        except BaseException:
            self._pool.abandon()
            raise
        if kind is not None:
            self._pool.abandon()
