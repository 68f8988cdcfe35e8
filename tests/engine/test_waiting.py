"""Nobody waits for nobody: whatever course requests take, a turn computes, or somebody comes or goes.

The loop, its scheduler and the store are the real ones; the model computes nothing, and the clock is made up. The guard
of the loop, which lets somebody go on after some turns that computed nothing, is off.
"""

import random
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from unittest.mock import patch

import pytest

from mlx_qwen35 import checks
from mlx_qwen35.engine import loop as loops
from mlx_qwen35.engine import request as requests
from mlx_qwen35.engine import scheduler as schedulers
from mlx_qwen35.engine.loop import Loop
from mlx_qwen35.engine.request import Request
from mlx_qwen35.engine.row import Phase, Row
from mlx_qwen35.engine.scheduler import Scheduler
from mlx_qwen35.errors import BudgetError
from mlx_qwen35.sampling import Sampling
from mlx_qwen35.session import Session
from mlx_qwen35.session.store import Store
from tests.engine.stills import PER_ROW, PER_TOKEN, Alone, Broken, Clock, Still
from tests.talkers import Endless

MOST_STILL = 4  # turns in a row: one that was chosen may find that it has to wait for another, once for each of few
HEADS = [[(7 * at + head) % 90 for at in range(700)] for head in range(2)]


class Told(Exception):
    """What a caller's own function raises."""


@dataclass
class Open:
    """A request that has not ended."""

    row: Row
    session: int | None
    cancelled: bool = False


class Course:
    """Requests that come, are cancelled, expire, fail and are put back, as chance has it."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        draw = self.chance.choice
        chunk, rows = draw((16, 64, 200)), draw((None, 0.3, 0.6, 1.0, 3.0))
        most_bytes = None if rows is None else int(PER_ROW * (1 + rows) + PER_TOKEN * 400 * rows)
        scheduler = Scheduler(
            most_rows=draw((1, 2, 3, 8)),
            cache_bytes=most_bytes,
            bytes_per_token=PER_TOKEN,
            bytes_per_row=draw((PER_ROW, 100)),  # the smaller is too little: what rows hold beyond it counts, too
            chunk=chunk,
            least=4,
            pause=draw((0.0, 0.1, 0.5, 2.0)),
            together_chunk=draw((0, chunk, chunk)),
            rows_first=draw((False, False, True)),
        )
        model = Still(chunk, draw((0.0, 0.0, 0.03)), seed)
        self.store = Store(model, most_bytes=1 << 26 if most_bytes is None else most_bytes)
        self.loop = Loop(model, store=self.store, scheduler=scheduler, clock=Clock(seed))
        self.sessions, self.busy = [Session(model) for _ in range(2)], set()
        self.open: list[Open] = []
        self.still, self.coming = 0, self.chance.randrange(4, 24)
        self.counts: Counter[str] = Counter()

    def play(self) -> None:
        turns = 0
        while self.coming or self.open:
            while self.coming and len(self.open) < 12 and self.chance.random() < 0.4:
                self.coming -= 1
                self.submit()
            for each in self.open:
                each.cancelled |= self.chance.random() < 0.003
            if self.open:
                self.turn()
            turns += 1
            assert turns < 20_000, "it does not end"
        loop = self.loop
        assert not loop.rows and not loop.scheduler.waiting and not loop.scheduler.admitted
        assert self.store.pinned_bytes == 0 and not any(session.in_use for session in self.sessions)
        for session in self.sessions:
            assert len(session.tokens) == session.cache.offset

    def submit(self) -> None:
        draw = self.chance.choice
        free = [number for number in range(2) if number not in self.busy]
        session = draw(free) if free and self.chance.random() < 0.3 else None
        made = Open(None, session)
        seed, own = self.chance.randrange(90), draw((1, 5, 9, 20, 90, 250))
        prompt = [*draw(HEADS)[: draw((0, 50, 100, 300, 700))], *((seed + 3 * at) % 90 for at in range(own))]
        options = {
            "sampling": Sampling(),
            "max_tokens": draw((0, 1, 5, 20, 40)),
            "priority": draw((0, 1)),
            "deadline": draw((None, None, None, 0.01, 20.0)),
            "cancel": lambda: made.cancelled,
            "on_progress": fails_at(draw((None, None, None, 1, 2, 3))),
            "session": None if session is None else self.sessions[session],
        }
        request = requests.read(self.loop._model, Endless(), prompt, options)
        request.alone = draw((False, False, True))
        try:
            made.row = self.loop.add(request)
        except BudgetError:
            return
        if session is not None:
            self.busy.add(session)
        self.open.append(made)

    def turn(self) -> None:
        before, phases = self.computed(), [each.row.phase for each in self.open]
        self.loop.turn()
        self.counts["turns"] += 1
        self.counts["waiting for a prefix"] += len(self.loop._blocked)
        self.counts["read together"] = len(self.loop._model.together)
        back = [each for each, was in zip(self.open, phases, strict=True) if was is not Phase.WAITING]
        self.counts["put back"] += sum(each.row.phase is Phase.WAITING for each in back)
        ended = [each for each in self.open if self.has_ended(each.row)]
        for each in ended:
            self.open.remove(each)
            self.busy.discard(each.session)
        self.still = 0 if ended or self.computed() != before else self.still + 1
        assert self.still <= MOST_STILL, [(each.row.key, each.row.phase) for each in self.open]

    def computed(self) -> tuple[int, int]:
        return self.loop.computed_tokens, sum(row.made for row in self.loop.rows.values())

    def has_ended(self, row: Row) -> bool:
        try:
            while row.ready:
                if row.take().finish_reason:
                    self.loop.leave(row)
                    return True
        except (Told, Broken):
            self.loop.leave(row)
            return True
        return False


def fails_at(call: int | None) -> Callable[[int, int], None]:
    calls = []

    def on_progress(done: int, total: int) -> None:
        calls.append(done)
        if call is not None and len(calls) >= call:
            raise Told

    return on_progress


@pytest.fixture(autouse=True)
def unguarded():
    """And rows that reserve a few tokens at a time, so that they are put back."""
    with ExitStack() as stack:
        for owner, name, value in (
            (checks, "model_and_processor", lambda *args, **options: None),
            (loops, "_PATIENCE", 1 << 60),
            (loops, "Drafted", Alone),
            (schedulers, "STRETCH", 6),
            (schedulers, "_MARGIN", 2),
            (Request, "steady", property(lambda request: getattr(request, "alone", False))),
        ):
            stack.enter_context(patch.object(owner, name, value))
        yield


def test_somebody_goes_on_in_any_course():
    counts = Counter()
    for seed in range(80):
        course = Course(seed)
        try:
            course.play()
        except AssertionError as error:
            raise AssertionError(f"course {seed}") from error
        counts += course.counts
    met = ("put back", "waiting for a prefix", "read together")
    assert min(counts[name] for name in met) > 20, counts
