"""A turn in which several things happen to one row at once."""

from contextlib import nullcontext
from dataclasses import replace

import mlx.core as mx
import pytest

from mlx_qwen35.cache import Cache
from mlx_qwen35.engine import loop as loops
from mlx_qwen35.engine import request as requests
from mlx_qwen35.engine.loop import Loop
from mlx_qwen35.engine.room import bytes_of_rows
from mlx_qwen35.engine.row import Phase, Row
from mlx_qwen35.engine.scheduler import Scheduler
from mlx_qwen35.errors import SessionError
from mlx_qwen35.generation import stream_generate
from mlx_qwen35.sampling import Sampling
from mlx_qwen35.session import Session
from mlx_qwen35.session.store import Store
from mlx_qwen35.vision.features import FeatureStore
from tests.talkers import PROMPT, Endless, random_model, recomputed

MODEL = random_model("dense")
LONG = [number * 7 % 90 for number in range(300)]


class Pushy(Scheduler):
    """Puts back whom it is told to, among them such as others would not."""

    push: tuple[int, ...] = ()

    def turn(self, now: float):
        for key in self.push:
            self._rows.pop(key).put_back()
        turn, self.push = replace(super().turn(now), put_back=self.push), ()
        return turn


def a_loop(**options) -> Loop:
    store = Store(MODEL, most_bytes=1 << 28)
    options = {"most_rows": 2, "cache_bytes": 1 << 28} | options
    return Loop(MODEL, store=store, scheduler=Pushy(**options))


def asked(prompt: list[int], cancelled=None, session: Session | None = None, **options) -> requests.Request:
    options = {"sampling": Sampling(), "max_tokens": 12, "cancel": cancelled} | options
    options |= {} if session is None else {"session": session}
    return requests.read(MODEL, Endless(), prompt, options)


def read(loop: Loop, row: Row, turns: int = 100) -> tuple[list[int], str]:
    tokens = []
    for _ in range(turns):
        loop.turn()
        while row.ready:
            part = row.take()
            tokens += [] if part.token is None else [part.token]
            if part.finish_reason:
                return tokens, part.finish_reason
    raise AssertionError("it did not end")


def test_cancelled_before_its_first_turn():
    loop = a_loop()
    rows = [loop.add(asked(PROMPT, lambda: True)) for _ in range(3)]
    loop.turn()
    assert [row.take().finish_reason for row in rows] == ["cancelled"] * 3
    assert not loop.rows and not loop.scheduler.admitted
    assert read(loop, loop.add(asked(PROMPT))) == (recomputed(MODEL, PROMPT, 12), "length")


@pytest.mark.parametrize("turns", [1, 2, 4])
def test_cancelled_when_it_is_put_back(turns):
    """Its own answer ends, and no other."""
    loop, cancelled = a_loop(), []
    going, row = loop.add(asked(PROMPT)), loop.add(asked([*PROMPT, 5], lambda: bool(cancelled)))
    tokens = []
    for _ in range(turns):
        loop.turn()
        tokens += [going.take().token for _ in going.pending.copy()]
        while row.ready:
            row.take()
    loop.scheduler.push = (row.key,)
    cancelled.append(True)
    more, reason = read(loop, going)
    assert (tokens + more, reason) == (recomputed(MODEL, PROMPT, 12), "length")
    assert row.take().finish_reason == "cancelled" and row.key not in loop.rows


def test_put_back_while_it_waits_for_a_prompt():
    loop = a_loop()
    going, row = loop.add(asked(LONG)), loop.add(asked([*LONG, 5]))
    loop.turn()
    assert row.cache is None and loop.scheduler.admitted == (going.key, row.key)
    loop.scheduler.push = (row.key,)
    assert read(loop, going)[1] == "length"
    assert read(loop, row) == (recomputed(MODEL, [*LONG, 5], 12), "length")


def test_a_session_that_waited_for_a_prefix_in_vain_is_as_it_was():
    loop, session, cancelled = a_loop(chunk=16), Session(MODEL), []
    before = [number * 5 % 90 for number in range(40)]
    read(loop, loop.add(asked(before, session=session)))
    kept = list(session.tokens)
    going, row = loop.add(asked(LONG)), loop.add(asked([*LONG, 5], lambda: bool(cancelled), session))
    loop.turn()
    loop.turn()
    assert row.phase is Phase.WAITING and going.phase is Phase.PROMPT
    cancelled.append(True)
    loop.turn()
    assert row.take().finish_reason == "cancelled"
    assert session.tokens == kept and not session.in_use
    read(loop, going)
    prompt = [*LONG[: len(kept)], 9]  # its cache has as many tokens, but others
    assert read(loop, loop.add(asked(prompt, session=session))) == (recomputed(MODEL, prompt, 12), "length")


def test_a_session_stays_its_rows_while_that_is_put_back():
    loop, session = a_loop(most_rows=3), Session(MODEL)
    going, row = loop.add(asked([*PROMPT, 9])), loop.add(asked(PROMPT, session=session))
    loop.turn()
    loop.turn()
    other = loop.add(asked([*PROMPT, 5], session=session, priority=9))  # which goes first
    loop.scheduler.push = (row.key,)
    loop.turn()
    tokens = [row.take().token for _ in row.pending.copy()]
    for each in (going, other):
        with pytest.raises(SessionError) if each is other else nullcontext():
            read(loop, each)
    more, reason = read(loop, row)
    assert (tokens + more, reason) == (recomputed(MODEL, PROMPT, 12), "length")
    assert session.tokens == [*PROMPT, *tokens, *more] and not session.in_use


@pytest.mark.parametrize("how", ["cancelled", "failed"])
def test_a_row_that_cannot_give_its_cache_back_ends_with_the_error(monkeypatch, how):
    """And nobody waits for what it had begun to compute."""
    loop, cancelled = a_loop(chunk=16), []

    def fails(done: int, total: int) -> None:
        if cancelled and how == "failed":
            raise ValueError("it failed before")

    row = loop.add(asked(LONG, lambda: bool(cancelled) and how == "cancelled", on_progress=fails))
    other = loop.add(asked([*LONG, 5]))
    loop.turn()
    loop.turn()
    assert (row.phase, other.phase) == (Phase.PROMPT, Phase.WAITING)
    cancelled.append(True)
    detach, cache = Cache.detach, row.cache

    def broken(self: Cache) -> None:
        if self is cache and row.phase is Phase.ENDED:
            raise ValueError("the cache cannot be had back")
        detach(self)

    monkeypatch.setattr(Cache, "detach", broken)
    while not row.ready:
        loop.turn()
    with pytest.raises(ValueError, match="had back" if how == "cancelled" else "failed before"):
        row.take()
    assert not loop.rows or [*loop.rows] == [other.key]
    assert read(loop, other) == (recomputed(MODEL, [*LONG, 5], 12), "length")


def test_one_waits_for_the_row_that_computes_its_beginning_and_for_no_other():
    """Whoever is first lends its place to that one."""
    loop = a_loop(most_rows=4, chunk=16)
    others = [loop.add(asked([at + 40 for at in range(50)], priority=1)), loop.add(asked(LONG))]
    loop.turn()
    row = loop.add(asked([*LONG, 5], priority=9))
    loop.turn()
    assert row.phase is Phase.WAITING and loop.scheduler._jobs[row.key].behind == others[1].key
    while row.phase is Phase.WAITING:
        loop.turn()
    assert others[0].prefill.done < 50


def test_an_answer_inside_of_another_does_not_wait_for_that(monkeypatch):
    """Both have one store; the loop of the inner one has nobody who computes what it would wait for."""
    monkeypatch.setattr(loops, "_PATIENCE", 1 << 60)
    store, inner = Store(MODEL, most_bytes=1 << 28), []
    options = {"sampling": Sampling(), "max_tokens": 5, "store": store}

    def on_progress(done: int, total: int) -> None:
        if not inner:
            inner.extend(part.token for part in stream_generate(MODEL, Endless(), [*LONG, 5], **options))

    outer = [part.token for part in stream_generate(MODEL, Endless(), LONG, on_progress=on_progress, **options)]
    assert inner == recomputed(MODEL, [*LONG, 5], 5) and outer == recomputed(MODEL, LONG, 5)


def test_nobody_waits_for_a_prefix_that_never_comes(monkeypatch):
    loop = a_loop()
    monkeypatch.setattr(Store, "_is_coming", lambda self, asked, held: True)
    rows = [loop.add(asked(PROMPT)), loop.add(asked([*PROMPT, 5]))]
    expected = [recomputed(MODEL, PROMPT, 12), recomputed(MODEL, [*PROMPT, 5], 12)]
    assert [read(loop, row, turns=400) for row in rows] == [(tokens, "length") for tokens in expected]


def test_a_prompt_that_the_scheduler_takes_for_done_is_computed(monkeypatch):
    loop = a_loop()
    monkeypatch.setattr(Scheduler, "covered", lambda self, key, tokens: setattr(self._jobs[key], "computed", 1 << 20))
    row = loop.add(asked(PROMPT))
    assert read(loop, row, turns=400) == (recomputed(MODEL, PROMPT, 12), "length")


class Noting(Scheduler):
    """Keeps who was put back."""

    def turn(self, now: float):
        turn = super().turn(now)
        self.back = getattr(self, "back", ()) + turn.put_back
        return turn


def a_tight_loop(tokens: int, features: FeatureStore | None = None) -> Loop:
    """Of two rows, with bytes for so many tokens beside what rows take whatever they hold."""
    per_token, per_row = bytes_of_rows(MODEL)
    most = 2 * per_row + tokens * per_token
    sizes = {"bytes_per_token": per_token, "bytes_per_row": per_row, "cache_bytes": most}
    scheduler = Noting(most_rows=2, chunk=64, **sizes)
    return Loop(MODEL, store=Store(MODEL, most_bytes=most), features=features, scheduler=scheduler)


def test_room_for_a_prompt_that_is_being_computed_counts_once():
    """It is reserved, and held from the first piece on: nobody else is put back for it."""
    loop = a_tight_loop(1500 + 3 * 256)
    prompt = [number * 11 % 90 for number in range(1500)]
    first, second = loop.add(asked(PROMPT, max_tokens=120)), loop.add(asked(prompt, max_tokens=4))
    ended = set()
    while len(ended) < 2:
        loop.turn()
        for row in (first, second):
            while row.ready:
                if row.take().finish_reason:
                    ended.add(row)
    assert loop.scheduler.back == ()


def test_what_nobody_uses_stays_while_there_is_room():
    """A row's cache, for which bytes are reserved, is in the store, too: it counts once."""
    loop = a_tight_loop(2 * 400 + 2 * 256)
    before = loop.add(asked(LONG))
    read(loop, before)
    loop.leave(before)
    kept = loop._store.nbytes
    row = loop.add(asked([number * 11 % 90 for number in range(400)]))
    while not row.ready:
        loop.turn()
    assert loop._store.nbytes - loop._store.pinned_bytes >= kept > 0


def test_pictures_are_in_the_bytes_for_caches_and_make_room():
    per_token, per_row = bytes_of_rows(MODEL)
    features = FeatureStore(most_bytes=1 << 30)
    for name in "abcd":
        features[name] = mx.zeros((per_row // 64, 16))
    each = features.nbytes // 4
    loop = a_tight_loop(600, features)
    assert read(loop, loop.add(asked(PROMPT)))[1] == "length"
    assert loop.held_bytes == loop._store.nbytes + features.nbytes
    assert features.nbytes + per_row <= loop.scheduler.cache_bytes
    answer = read(loop, loop.add(asked([number * 11 % 90 for number in range(900)])))
    assert answer[1] == "length" and features.nbytes < 4 * each
    assert loop._store.nbytes + features.nbytes <= loop.scheduler.cache_bytes
