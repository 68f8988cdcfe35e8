"""A turn in which several things happen to one row at once."""

from dataclasses import replace

import pytest

from mlx_qwen35.engine import request as requests
from mlx_qwen35.engine.loop import Loop
from mlx_qwen35.engine.row import Row
from mlx_qwen35.engine.scheduler import Scheduler
from mlx_qwen35.sampling import Sampling
from mlx_qwen35.session.store import Store
from tests.talkers import PROMPT, Endless, random_model, recomputed

MODEL = random_model("dense")


class Pushy(Scheduler):
    """Puts back whom it is told to, among them such as others would not."""

    push: tuple[int, ...] = ()

    def turn(self, now: float):
        for key in self.push:
            self._rows.pop(key).put_back()
        turn, self.push = replace(super().turn(now), put_back=self.push), ()
        return turn


def a_loop() -> Loop:
    store = Store(MODEL, most_bytes=1 << 28)
    return Loop(MODEL, store=store, scheduler=Pushy(most_rows=2, cache_bytes=1 << 28))


def asked(prompt: list[int], cancelled=None) -> requests.Request:
    options = {"sampling": Sampling(), "max_tokens": 12, "cancel": cancelled}
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
    prompt = [number * 7 % 90 for number in range(300)]
    going, row = loop.add(asked(prompt)), loop.add(asked([*prompt, 5]))
    loop.turn()
    assert row.cache is None and loop.scheduler.admitted == (going.key, row.key)
    loop.scheduler.push = (row.key,)
    assert read(loop, going)[1] == "length"
    assert read(loop, row) == (recomputed(MODEL, [*prompt, 5], 12), "length")


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
