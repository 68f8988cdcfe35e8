"""Courses of requests on a made-up machine in virtual time: the scheduler decides, and what it says is held against
what may be asked of it in every turn. Knows no model."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from mlx_qwen35.engine.scheduler import Load, Scheduler, Turn
from mlx_qwen35.errors import BudgetError, BusyError


@dataclass(frozen=True)
class Machine:
    """Seconds: a call at all, a prompt's token, a row of a step; noise: of itself; hiccup: chance of one ten times."""

    call: float = 0.02
    token: float = 0.001
    row: float = 0.002
    noise: float = 0.1
    hiccup: float = 0.0

    def piece(self, tokens: int, chance: random.Random) -> float:
        return (self.call + tokens * self.token) * self._luck(chance)

    def step(self, rows: int, chance: random.Random) -> float:
        return (self.call + rows * self.row) * self._luck(chance)

    def _luck(self, chance: random.Random) -> float:
        return chance.uniform(1 - self.noise, 1 + self.noise) * (10 if chance.random() < self.hiccup else 1)


@dataclass
class Ask:
    """A request as the world has it: what it will answer, when it gives up, and what of its prompt is known."""

    key: int
    at: float
    load: Load
    answer: int
    cancel: float = float("inf")
    known: int = 0
    behind: int | None = None
    given: int = 0  # tokens of the answer so far
    computed: int = 0  # tokens of the prompt so far
    row: bool = False  # it has a cache
    done: bool = False  # it decodes
    put_back: int = 0
    ended: str = ""
    times: list[float] = field(default_factory=list)  # of its tokens

    @property
    def need(self) -> int:
        return self.load.prompt_tokens + (self.given if self.put_back else 0)

    @property
    def cached(self) -> int:
        return self.load.prompt_tokens + self.given if self.done else self.computed


class Replay:
    """Plays `asks` through a scheduler until all have ended, and checks each turn."""

    def __init__(self, scheduler: Scheduler, machine: Machine, asks: list[Ask], seed: int = 0, burst: int = 1) -> None:
        self.scheduler, self.machine, self.burst = scheduler, machine, burst
        self.chance = random.Random(seed)
        self.coming = sorted(asks, key=lambda ask: (ask.at, ask.key))
        self.here: dict[int, Ask] = {}
        self.now, self.turns, self.stored = 0.0, 0, 0
        self.pieces = self.steps = 0.0  # seconds: of pieces beside those who decode, of steps
        self.log: list[tuple[float, Turn]] = []
        self.order: list[int] = []  # as they were admitted

    def run(self, most_turns: int = 200_000) -> None:
        while self.coming or self.here:
            assert self.turns < most_turns, f"stuck: {list(self.here.values())[:3]}"
            self.turn()
        assert not self.scheduler.waiting and not self.scheduler.admitted and not self.scheduler.reserved_bytes

    def end(self, ask: Ask, how: str) -> None:
        ask.ended, ask.row = how, False
        self.scheduler.ended(ask.key)
        del self.here[ask.key]

    def turn(self) -> None:
        if not self.here:
            self.now = max(self.now, self.coming[0].at)
        self.arrive()
        for ask in [ask for ask in self.here.values() if ask.cancel <= self.now]:
            self.end(ask, "cancelled")
        if not self.here:
            return
        if self.scheduler.cache_bytes is not None:
            self.scheduler.held(0, self.stored)
        turn = self.scheduler.turn(self.now)
        self.turns += 1
        self.log.append((self.now, turn))
        did = self.follow(turn)
        assert did, "a turn in which nothing is done, though there are requests"

    def arrive(self) -> None:
        while self.coming and self.coming[0].at <= self.now:
            ask = self.coming.pop(0)
            try:
                self.scheduler.submit(ask.key, ask.load, self.now)
            except BusyError:
                assert self.scheduler.most_waiting is not None
                assert len(self.scheduler.waiting) >= self.scheduler.most_waiting
                ask.ended = "busy"
            except BudgetError:
                ask.ended = "too large"
            else:
                self.here[ask.key] = ask

    def follow(self, turn: Turn) -> bool:
        deadlines = {key: ask.load.deadline for key, ask in self.here.items()}
        late = {key for key, deadline in deadlines.items() if deadline is not None and deadline <= self.now}
        assert set(turn.expired) == late and len(turn.expired) == len(late)
        decoding = [ask for ask in self.here.values() if ask.row and ask.done and ask.key not in late]
        for key in turn.expired:
            self.end(self.here[key], "deadline")
        for key in turn.put_back:
            ask = self.here[key]
            assert ask.row
            self.stored += self.bytes(ask)
            ask.row, ask.done, ask.computed, ask.put_back = False, False, 0, ask.put_back + 1
            decoding = [other for other in decoding if other is not ask]
        for key in turn.admit:
            ask = self.here[key]
            assert not ask.row and key not in turn.put_back
            ask.row = True
            self.order.append(key)
            self.compute(ask, min(ask.known, ask.need - 1))
            if ask.behind is not None:
                self.scheduler.waits_for_prefix(key, ask.behind)
        rows = [ask for ask in self.here.values() if ask.row]
        assert {ask.key for ask in rows} == set(self.scheduler.admitted)
        assert len(rows) <= self.scheduler.most_rows
        self.check_bytes(turn, rows)
        if turn.prefill:
            self.prefill(turn, decoding)
        self.step(turn, decoding)
        return bool(turn.expired or turn.put_back or turn.admit or turn.prefill or turn.decode or turn.solo is not None)

    def bytes(self, ask: Ask) -> int:
        return self.scheduler.bytes_per_row + self.scheduler.bytes_per_token * ask.cached

    def check_bytes(self, turn: Turn, rows: list[Ask]) -> None:
        budget = self.scheduler.cache_bytes
        if budget is None:
            assert not turn.free and not turn.put_back and turn.store_bytes is None
            return
        assert 0 <= turn.free <= self.stored or turn.put_back
        self.stored = max(0, min(self.stored - turn.free, turn.store_bytes))
        assert self.scheduler.reserved_bytes + self.stored <= budget or (len(rows) == 1 and not self.stored)
        for ask in rows:
            assert ask.cached <= self.scheduler._rows[ask.key].reserved

    def compute(self, ask: Ask, tokens: int) -> None:
        ask.computed = tokens
        self.scheduler.covered(ask.key, tokens)

    def prefill(self, turn: Turn, decoding: list[Ask]) -> None:
        asks = [self.here[key] for key, _ in turn.prefill]
        assert len({ask.key for ask in asks}) == len(asks)
        assert len(asks) == 1 or not any(ask.load.apart for ask in asks)
        most = self.scheduler.chunk if len(asks) == 1 else self.scheduler.together_chunk
        assert sum(tokens for _, tokens in turn.prefill) <= min(most, self.scheduler.chunk)
        lengths = []
        for ask, (key, tokens) in zip(asks, turn.prefill, strict=True):
            assert ask.row and not ask.done and key not in turn.admit
            assert 1 <= tokens <= ask.need - ask.computed
            lengths.append(self.chance.choice((tokens, tokens, max(1, tokens - 3))))  # a piece may end at a boundary
        seconds = self.machine.piece(sum(lengths), self.chance)
        self.now += seconds
        if decoding:
            self.pieces += seconds
        self.scheduler.measured_prefill(sum(lengths), seconds)
        for ask, tokens in zip(asks, lengths, strict=True):
            self.compute(ask, ask.computed + tokens)
            if ask.computed == ask.need:
                ask.done = True
                self.give(ask)

    def step(self, turn: Turn, decoding: list[Ask]) -> None:
        assert not (turn.decode and turn.solo is not None)
        stepped = turn.decode or turn.solo is not None
        assert stepped == bool(decoding) or (self.scheduler.rows_first and turn.prefill and not stepped)
        going = [ask for ask in decoding if ask.key == turn.solo or (turn.decode and not ask.load.alone)]
        if not stepped:
            return
        assert going and (turn.decode or going[0].load.alone)
        seconds = self.machine.step(len(going), self.chance)
        self.now += seconds
        self.steps += seconds
        self.scheduler.measured_decode(len(going), seconds)
        for ask in going:
            self.give(ask)

    def give(self, ask: Ask) -> None:
        ask.given = min(ask.answer, ask.given + self.chance.randint(1, self.burst))
        ask.times.append(self.now)
        self.scheduler.generated(ask.key, ask.given)
        if ask.given == ask.answer:
            self.stored += self.bytes(ask)
            self.end(ask, "whole")
