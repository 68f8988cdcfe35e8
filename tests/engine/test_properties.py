"""Whatever course requests take, each answer is the one it is alone, and nothing is held at the end.

Courses of submit, join, cancel, deadline, eviction, errors in one row, sessions, pictures, drafts and forms, on the
demo and on a random model.
"""

import asyncio
import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from mlx_qwen35 import Engine, Session, generate_batch, load
from mlx_qwen35.engine import scheduler
from mlx_qwen35.engine.room import bytes_of_rows
from mlx_qwen35.engine.scheduler import Scheduler, Turn
from mlx_qwen35.errors import BudgetError, BusyError, PromptError, SessionError
from mlx_qwen35.experts.linear import _rows
from mlx_qwen35.kernels.rms_norm import _numbers
from mlx_qwen35.model import model
from mlx_qwen35.session import store
from tests.engine.courses import (
    FORMS,
    PROMPTS,
    UNREADABLE,
    Alone,
    Ask,
    Boom,
    Said,
    check_whole_or_cut,
    collected,
    raises_at,
    tiny_seeing,
)
from tests.soak import examples

SIDES = ("random", "demo")
WAIT = 120.0  # seconds for one answer: more is stuck
SLOW = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]}


@pytest.fixture(scope="module")
def alones(tmp_path_factory) -> dict[str, Alone]:
    return {
        "random": Alone(*tiny_seeing(tmp_path_factory.mktemp("engine") / "tiny")),
        "demo": Alone(*load(mtp=True)),
    }


@dataclass(frozen=True)
class Event:
    """One request of a course. after: parts of the answers before it that are read before it is submitted. session: of
    two that the course has. cancel: after so many of its parts. fault: what goes wrong with it."""

    ask: Ask
    after: int = 0
    session: int | None = None
    cancel: int | None = None
    deadline: float | None = None
    priority: int = 0
    fault: str | None = None  # "progress", "picture", "dropped": nobody reads it


ASKS = st.builds(
    Ask,
    prompt=st.integers(0, len(PROMPTS) - 1),
    seed=st.sampled_from([None, None, 1, 2]),
    most=st.sampled_from([0, 1, 6, 12]),
    drafts=st.booleans(),
    form=st.sampled_from([0, 0, *range(len(FORMS))]),
    stop=st.sampled_from([(), (), ("4",)]),
    thinks=st.booleans(),
    n=st.sampled_from([1, 1, 1, 2]),
)
EVENTS = st.builds(
    Event,
    ask=ASKS,
    after=st.integers(0, 6),
    session=st.sampled_from([None, None, 0, 1]),
    cancel=st.sampled_from([None, None, None, 0, 3]),
    deadline=st.sampled_from([None, None, None, 1e-3, 0.05, 600.0]),
    priority=st.sampled_from([0, 0, 3]),
    fault=st.sampled_from([None, None, None, "progress", "picture", "dropped"]),
).map(lambda event: replace(event, ask=replace(event.ask, n=1)) if event.session is not None else event)
COURSES = st.lists(EVENTS, min_size=1, max_size=8)


class Course:
    """Plays events through an engine, and holds each answer against what it is alone. most: answers at once, that run
    and wait; None: any number."""

    def __init__(self, engine: Engine, alone: Alone, sessions: list[Session], most: int | None) -> None:
        self.engine, self.alone, self.sessions, self.most = engine, alone, sessions, most
        self.dropped = 0
        self.open: list[tuple[Event, Any, list]] = []  # what was submitted, its answer, its parts so far
        self.ended: list[tuple[Event, Said | None, type | None]] = []

    def play(self, events: list[Event]) -> None:
        for event in events:
            for turn in range(event.after):
                if self.open:
                    self.read(turn % len(self.open))
            self.submit(event)
        while self.open:
            self.read(0)

    def submit(self, event: Event) -> None:
        options = event.ask.options() | {"priority": event.priority, "deadline": event.deadline}
        if event.session is not None:
            options["session"] = self.sessions[event.session]
        if event.fault == "progress":
            options["on_progress"] = raises_at(1 + event.after % 2)
        prompt = UNREADABLE if event.fault == "picture" else PROMPTS[event.ask.prompt]
        try:
            answer = self.engine.submit(prompt, **options)
        except PromptError:
            assert event.fault == "picture"
            return
        except BusyError:
            possible = sum(other.ask.n for other, *_ in self.open) + self.dropped + event.ask.n
            assert self.most is not None and possible > self.most
            return
        except BudgetError as error:
            assert "bytes" in str(error) and any(letter.isdigit() for letter in str(error))
            return
        assert event.fault != "picture"
        if event.fault == "dropped":
            self.dropped += event.ask.n
            return
        self.open.append((event, answer, []))
        self.cancel_if_due(self.open[-1])

    def cancel_if_due(self, one: tuple[Event, Any, list]) -> None:
        event, answer, parts = one
        if event.cancel is not None and len(parts) >= event.cancel:
            answer.cancel()

    def read(self, at: int) -> None:
        event, answer, parts = self.open[at]
        try:
            part = next(answer, None)
        except (Boom, SessionError) as error:
            del self.open[at]
            self.check_error(event, error, parts)
            return
        if part is None:
            del self.open[at]
            self.check(event, answer, parts)
            return
        parts.append(part)
        self.cancel_if_due(self.open[at])

    def check_error(self, event: Event, error: Exception, parts: list) -> None:
        if isinstance(error, Boom):
            assert event.fault == "progress"
        else:  # the session answers for somebody else
            assert event.session is not None
        assert not any(part.finish_reason for part in parts)
        self.ended.append((event, None, type(error)))  # an error has what its functions held

    def check(self, event: Event, answer: Any, parts: list) -> None:
        cuts = ("cancelled",) if event.cancel is not None else ()
        cuts += ("deadline",) if event.deadline is not None else ()
        for index in range(event.ask.n):
            found = collected(parts, index)
            check_whole_or_cut(found, self.alone(event.ask, index), cuts)
            assert found.reason != "deadline" or event.deadline < 600
            self.ended.append((event, found, None))
        if event.fault == "progress":
            assert {part.finish_reason for part in parts} & {*cuts}, "on_progress raised, and nobody was told"
        results = answer.result(timeout=WAIT)
        for index, result in enumerate(results if event.ask.n > 1 else [results]):
            assert (tuple(result.tokens), result.text, result.finish_reason) == (
                *(found := collected(parts, index)).__dict__.values(),
            ), found


def held() -> int:
    for remembered in (_numbers, _rows):  # a few bytes for each number of rows that they meet, whoever is first
        remembered.cache_clear()
    gc.collect()
    mx.synchronize()
    gc.collect()
    return mx.get_active_memory()


def play(alone: Alone, events: list[Event], *, chunk: int = 2048, **options: Any) -> list:
    """A course from the beginning to the end; at the end no bytes are held that were not before."""
    for event in events:
        for index in range(event.ask.n):
            alone(event.ask, index)  # not while an engine has the model
    before = held()
    sessions = [Session(alone.model, alone.processor) for _ in range(2)]
    with patch.object(model, "PREFILL_CHUNK", chunk), Engine(alone.model, alone.processor, **options) as engine:
        waiting = options.get("most_waiting")
        course = Course(engine, alone, sessions, None if waiting is None else options["most_rows"] + waiting)
        course.play(events)
        ended = course.ended
    for session in sessions:
        with session.answering():  # none of them is left in use
            pass
    del engine, course, sessions, session
    assert held() - before <= 0
    return ended


@pytest.mark.parametrize("side", SIDES)
@settings(max_examples=examples(40, 5, least=8), phases=[Phase.generate], **SLOW)
@given(
    events=COURSES,
    most_rows=st.sampled_from([1, 2, 8]),
    most_waiting=st.sampled_from([None, None, 1]),
    fit=st.sampled_from([None, None, 4.0, 2.0, 1.0]),
    chunk=st.sampled_from([2048, 48]),
    disk=st.booleans(),
)
def test_each_answer_is_the_one_it_is_alone(alones, side, events, most_rows, most_waiting, fit, chunk, disk) -> None:
    """fit: rows of middling prompts for which there are bytes; with fewer, rows are put back and go on later. chunk:
    tokens of the longest piece of a prompt; with few, others come, wait and leave in the middle of one. disk: what is
    computed is written to a folder, and read by a thread when it was evicted."""
    alone = alones[side]
    options = {"most_rows": most_rows, "most_waiting": most_waiting, "cache_bytes": bytes_for(alone, fit)}
    with small_stretches(), TemporaryDirectory() as folder, patch.object(store, "AT_ONCE", 0):
        play(alone, events, chunk=chunk, **options, cache_dir=folder if disk else None)


@pytest.mark.parametrize("side", ["random", pytest.param("demo", marks=pytest.mark.soak)])
def test_rows_that_are_put_back(alones, side) -> None:
    """Too few bytes for all that run: some give up their caches in the middle, and say what they say alone."""
    alone = alones[side]
    events = [
        Event(Ask(prompt=0, most=30, thinks=True, drafts=True)),
        Event(Ask(prompt=1, most=30, thinks=True), session=0),
        Event(Ask(prompt=2, most=30, thinks=True, seed=1)),
        Event(Ask(prompt=4, most=30, thinks=True, seed=2, drafts=True)),
        Event(Ask(prompt=5, most=30, form=3, seed=3), after=2),
        Event(Ask(prompt=0, most=30, form=2, thinks=True)),
        Event(Ask(prompt=3, most=30, n=2, seed=5)),
        Event(Ask(prompt=3, most=30, seed=4), cancel=20),
    ]
    with small_stretches() as put_back:
        for _ in range(5):  # the first may have ended before the third comes, where a machine is busy
            play(alone, events, most_rows=8, cache_bytes=bytes_for(alone, 3.0))
            if put_back:
                return
    raise AssertionError("no row was put back")


@contextmanager
def small_stretches() -> Iterator[list]:
    """Rows reserve a few tokens at a time inside; those that are put back come into the list."""
    put_back, turn = [], Scheduler.turn

    def noted(self: Scheduler, now: float) -> Turn:
        found = turn(self, now)
        put_back.extend(found.put_back)
        return found

    with patch.object(scheduler, "STRETCH", 6), patch.object(scheduler, "_MARGIN", 2):
        with patch.object(Scheduler, "turn", noted):
            yield put_back


def bytes_for(alone: Alone, rows: float | None) -> int | None:
    """Of so many rows with a prompt of the common kind and a few tokens of an answer."""
    if rows is None:
        return None
    per_token, per_row = bytes_of_rows(alone.model)
    lengths = [len(alone.processor.prompt(prompt, enable_thinking=True).tokens) for prompt in PROMPTS[:3]]
    return int(rows * (per_row + per_token * (sum(lengths) / 3 + 8)))


@pytest.mark.parametrize("side", SIDES)
def test_a_course_with_everything(alones, side, tmp_path) -> None:
    """One of each at once; a second engine goes on from what the first wrote to its folder."""
    sampled = Ask(prompt=2, seed=1, most=12, n=2)
    events = [
        Event(Ask(prompt=0, most=20), session=0),
        Event(Ask(prompt=6, most=12, drafts=True), after=3),
        Event(Ask(prompt=4, most=12, drafts=True, seed=2), after=1),
        Event(Ask(prompt=1, most=12, form=1), after=2, priority=5),
        Event(Ask(prompt=1, most=12), fault="progress", after=1),
        Event(Ask(prompt=1, most=12), fault="picture"),
        Event(Ask(prompt=3, most=12), fault="dropped"),
        Event(Ask(prompt=5, most=12, seed=1, form=2)),
        Event(Ask(prompt=3, most=24, form=3, drafts=True)),
        Event(sampled, after=4),
        Event(Ask(prompt=3, most=200), cancel=3),
        Event(Ask(prompt=3, most=200), deadline=1e-3),
        Event(Ask(prompt=2, most=12), session=1),
        Event(Ask(prompt=2, most=0)),
    ]
    for _ in range(2):
        ended = play(alones[side], events, most_rows=4, cache_dir=tmp_path / "computed")
        reasons = {found.reason for _, found, _ in ended if found}
        assert {"deadline", "length"} <= reasons
        assert sum(error is Boom for _, _, error in ended) == 1
        assert sum(event.ask == sampled for event, *_ in ended) == 2


def test_a_session_in_use(alones) -> None:
    """Two requests with one session at once: the second is told, and the first goes on; afterwards it is free."""
    alone = alones["random"]
    ask = Ask(prompt=0, most=40)
    expected = alone(ask)
    session = Session(alone.model, alone.processor)
    with Engine(alone.model, alone.processor) as engine:
        first = engine.submit(PROMPTS[0], session=session, **ask.options())
        parts = [next(first)]
        with pytest.raises(SessionError):
            engine.submit(PROMPTS[1], session=session, **ask.options()).result(timeout=WAIT)
        assert collected([*parts, *first]) == expected
        again = engine.submit(PROMPTS[2], session=session, **ask.options()).result(timeout=WAIT)
        assert tuple(again.tokens) == alone(replace(ask, prompt=2)).tokens and again.cached_tokens > 0


def test_an_error_that_was_read_is_let_go(alones) -> None:
    """With the answer goes its error, which knows the functions that it came through, and so who read it."""
    alone = alones["random"]
    with Engine(alone.model, alone.processor) as engine:
        answer = engine.submit(PROMPTS[0], on_progress=raises_at(2), **Ask().options())
        try:
            list(answer)
        except Boom:
            lost = weakref.ref(answer)
        del answer
        gc.collect()
        assert lost() is None


def test_from_coroutines(alones) -> None:
    alone = alones["random"]
    asks = [Ask(prompt=prompt, most=9, seed=seed) for prompt, seed in ((0, None), (1, 2), (4, None), (6, 1))]
    expected = [alone(ask) for ask in asks]

    async def one(engine: Engine, ask: Ask) -> Said:
        return collected([part async for part in engine.submit(PROMPTS[ask.prompt], **ask.options())])

    async def together(engine: Engine) -> list[Said]:
        return await asyncio.gather(*(one(engine, ask) for ask in asks))

    with Engine(alone.model, alone.processor, most_rows=3) as engine:
        assert asyncio.run(together(engine)) == expected


def test_closing_ends_what_runs(alones) -> None:
    alone = alones["demo"]
    ask = Ask(prompt=6, most=400)
    alone(replace(ask, most=1))  # what a model makes when it is first used stays
    before = held()
    engine = Engine(alone.model, alone.processor, most_rows=2)
    answers = [engine.submit(PROMPTS[ask.prompt], **ask.options()) for _ in range(4)]
    next(answers[0])
    engine.close()
    reasons = [answer.result(timeout=WAIT).finish_reason for answer in answers]
    assert set(reasons[1:]) <= {"cancelled", "stop"} and "cancelled" in reasons
    del engine, answers
    assert held() - before <= 0


BATCHES = st.lists(st.integers(0, len(PROMPTS) - 1), min_size=1, max_size=6)


@pytest.mark.parametrize("side", SIDES)
@settings(max_examples=examples(20, 4, least=5), phases=[Phase.generate], **SLOW)
@given(prompts=BATCHES, ask=ASKS, most_rows=st.sampled_from([1, 2, 8]), cut=st.sampled_from([None, None, 3, 9]))
def test_generate_batch(alones, side, prompts, ask, most_rows, cut) -> None:
    """Any number of prompts with the same options; cancelled after `cut` looks at it."""
    alone, ask = alones[side], replace(ask, n=1, seed=None)
    expected = [alone(replace(ask, prompt=prompt)) for prompt in prompts]
    before, looks = held(), 0

    def cancel() -> bool:
        nonlocal looks
        looks += 1
        return cut is not None and looks > cut

    options = ask.options() | {"most_rows": most_rows, "cancel": cancel}
    found = generate_batch(alone.model, alone.processor, [PROMPTS[prompt] for prompt in prompts], **options)
    assert len(found) == len(prompts)
    for each, one in zip(found, expected, strict=True):
        check_whole_or_cut(
            Said(tuple(each.tokens), each.text, each.finish_reason), one, () if cut is None else ("cancelled",)
        )
    del found, each
    assert held() - before <= 0
