"""The engine: answers to many threads and coroutines are those that each has alone, and every one of them ends."""

import asyncio
import gc
import subprocess
import sys
import threading
import time
import weakref

import pytest

from mlx_qwen35 import Engine
from mlx_qwen35.engine.answer import Channel
from mlx_qwen35.engine.group import Group
from mlx_qwen35.engine.room import bytes_of_rows
from mlx_qwen35.engine.row import Row
from mlx_qwen35.errors import ArgumentError, BudgetError, BusyError, EngineClosedError, PromptError
from mlx_qwen35.sampling import Sampling
from mlx_qwen35.session import Session
from tests.talkers import PROMPT, Endless, Typist, greedy, random_model, recomputed

MODEL = random_model("dense")
GREEDY = {"sampling": Sampling(), "max_tokens": 12}


@pytest.fixture
def engine():
    with Engine(MODEL, Endless(), most_rows=3) as engine:
        yield engine


def prompts(count: int) -> list[list[int]]:
    return [[*PROMPT[: 2 + number % 5], 5 + number, 17] for number in range(count)]


def test_each_answer_is_the_one_that_it_is_alone(engine):
    asked = prompts(7)
    answers = [engine.submit(prompt, **GREEDY) for prompt in asked]
    for prompt, answer in zip(asked, answers, strict=True):
        done = answer.result(timeout=60)
        assert list(done.tokens) == recomputed(MODEL, prompt, 12)
        assert done.finish_reason == "length" and done.prompt_tokens == len(prompt)


def test_parts_come_as_they_are_made(engine):
    parts = list(engine.submit(PROMPT, **GREEDY))
    alone = list(greedy(MODEL))
    assert [part.token for part in parts] == [part.token for part in alone]
    assert [part.text for part in parts] == [part.text for part in alone]
    assert [part.finish_reason for part in parts] == [None] * 11 + ["length"]
    assert all(part.logprobs is None for part in parts)


def test_threads_and_coroutines_read_side_by_side(engine):
    asked, found = prompts(6), {}

    def read(number: int) -> None:
        found[number] = [part.token for part in engine.submit(asked[number], **GREEDY)]

    async def read_here(number: int) -> None:
        found[number] = [part.token async for part in engine.submit(asked[number], **GREEDY)]

    async def read_all() -> None:
        await asyncio.gather(*(read_here(number) for number in (3, 4, 5)))

    threads = [threading.Thread(target=read, args=(number,)) for number in (0, 1, 2)]
    for thread in threads:
        thread.start()
    asyncio.run(read_all())
    for thread in threads:
        thread.join(60)
    assert found == {number: recomputed(MODEL, prompt, 12) for number, prompt in enumerate(asked)}


def test_a_cancelled_answer_ends_with_what_it_has(engine):
    answer, other = engine.submit(PROMPT, sampling=Sampling()), engine.submit(PROMPT, **GREEDY)
    parts = []
    for part in answer:
        parts.append(part)
        if len(parts) == 3:
            answer.cancel()
    assert parts[-1].finish_reason == "cancelled" and parts[-1].token is None
    tokens = [part.token for part in parts[:-1]]
    assert len(tokens) >= 3 and tokens == recomputed(MODEL, PROMPT, len(tokens))
    assert list(other.result(60).tokens) == recomputed(MODEL, PROMPT, 12)


def test_an_answer_that_nobody_holds_is_cancelled(engine):
    engine.submit(PROMPT, sampling=Sampling())
    gc.collect()
    until = time.monotonic() + 60
    while engine.running and time.monotonic() < until:
        time.sleep(0.01)
    assert not engine.running


def test_a_deadline_ends_what_waits_and_what_runs(engine):
    answers = [engine.submit(PROMPT, sampling=Sampling(), deadline=0.2) for _ in range(5)]
    for answer in answers:
        done = answer.result(60)
        assert done.finish_reason == "deadline"
        assert list(done.tokens) == recomputed(MODEL, PROMPT, len(done.tokens)) or not done.tokens


def test_an_error_ends_its_own_row_alone(engine):
    def fails(done: int, total: int) -> None:
        raise ZeroDivisionError("not ours")

    bad, good = engine.submit(PROMPT, on_progress=fails, **GREEDY), engine.submit(PROMPT, **GREEDY)
    with pytest.raises(ZeroDivisionError, match="not ours"):
        list(bad)
    with pytest.raises(ZeroDivisionError):
        bad.result(60)
    assert list(good.result(60).tokens) == recomputed(MODEL, PROMPT, 12)


@pytest.mark.parametrize("kind", [StopIteration, KeyboardInterrupt, asyncio.CancelledError])
def test_whatever_on_progress_raises_ends_its_answer_alone(engine, kind):
    def fails(done: int, total: int) -> None:
        raise kind

    bad, good = engine.submit(PROMPT, on_progress=fails, **GREEDY), engine.submit(PROMPT, **GREEDY)
    with pytest.raises(RuntimeError, match=f"on_progress raised {kind.__name__}"):
        list(bad)
    assert good.result(60).finish_reason == "length"
    assert engine.submit(PROMPT, **GREEDY).result(60).finish_reason == "length"


def test_on_progress_may_submit_but_not_wait(engine):
    inner = []

    def asks(done: int, total: int) -> None:
        inner.append(engine.submit(PROMPT[:3], **GREEDY))
        inner[0].result(60)

    answer = engine.submit(PROMPT, on_progress=asks, **GREEDY)
    with pytest.raises(RuntimeError, match="cannot wait for an answer that it has to make"):
        answer.result(60)
    assert list(inner[0].result(60).tokens) == recomputed(MODEL, PROMPT[:3], 12)


def test_how_long_a_result_is_waited_for(engine):
    answer = engine.submit(PROMPT, **GREEDY)
    with pytest.raises(ArgumentError, match="timeout is '5', of type str; give a number"):
        answer.result("5")
    with pytest.raises(ArgumentError, match="timeout is -1; give seconds, 0 or more, or None"):
        answer.result(-1)
    assert answer.result(1e300).finish_reason == "length"


def test_what_cannot_be_done_is_refused_at_once(engine):
    with pytest.raises(ArgumentError, match="submit has no option max_token; did you mean max_tokens"):
        engine.submit(PROMPT, max_token=3)
    with pytest.raises(ArgumentError, match="submit has no option cache"):
        engine.submit(PROMPT, cache=MODEL.make_cache())
    with pytest.raises(ArgumentError, match="deadline is 0"):
        engine.submit(PROMPT, deadline=0)
    with pytest.raises(PromptError, match="the prompt is empty"):
        engine.submit([])
    with pytest.raises(ArgumentError, match="cache_dir is 5, of type int; give a text or a Path"):
        Engine(MODEL, Endless(), cache_dir=5)
    with pytest.raises(PromptError, match="the context holds"):
        engine.submit([3] * 5000)


def test_too_many_that_wait_are_refused():
    with Engine(MODEL, Endless(), most_rows=1, most_waiting=1) as engine:
        held = [engine.submit(PROMPT, sampling=Sampling()) for _ in range(2)]
        with pytest.raises(BusyError, match="1 requests are running and 1 are waiting; at most 1 may wait"):
            engine.submit(PROMPT)
        for answer in held:
            answer.cancel()
            assert answer.result(60).finish_reason == "cancelled"
        assert engine.submit(PROMPT, **GREEDY).result(60).finish_reason == "length"
        assert len(engine.submit(PROMPT, n=2, **GREEDY).result(60)) == 2
        with pytest.raises(ArgumentError, match="n is 3, and no more than 2 answers may be here at once"):
            engine.submit(PROMPT, n=3)


def test_who_reads_of_an_end_may_submit_the_next(monkeypatch):
    put = Channel.put
    monkeypatch.setattr(Channel, "put", lambda channel, *part: put(channel, *part) or time.sleep(0.02))
    with Engine(MODEL, Endless(), most_rows=1, most_waiting=0) as engine:
        for _ in range(3):
            list(engine.submit(PROMPT, sampling=Sampling(), max_tokens=1))


def test_what_never_fits_is_refused_with_the_figures():
    with Engine(MODEL, Endless(), cache_bytes=1_000_000) as engine:
        assert engine.submit(PROMPT, **GREEDY).result(60).finish_reason == "length"
        with pytest.raises(BudgetError, match="the prompt has 3,900 tokens, whose cache takes .* 1,000,000 bytes"):
            engine.submit([3] * 3900)


def test_small_memory_puts_rows_back_and_all_end(monkeypatch):
    back, put_back = [], Row.put_back
    monkeypatch.setattr(Row, "put_back", lambda row: back.append(row) or put_back(row))
    prompt = [*PROMPT, *range(40)]
    options = {"sampling": Sampling(), "max_tokens": 400}
    wanted = [part.token for part in greedy(MODEL, prompt, **options)]
    with Engine(MODEL, Endless(), most_rows=4, cache_bytes=580_000) as engine:
        answers = [engine.submit(prompt, **options) for _ in range(4)]
        for answer in answers:
            assert list(answer.result(120).tokens) == wanted
    assert back, "there was room for all"


def test_memory_for_two_rows_lets_two_run(monkeypatch):
    per_token, per_row = bytes_of_rows(MODEL)
    together, step = [], Group.step
    monkeypatch.setattr(Group, "step", lambda self, **how: together.append(len(self.seats)) or step(self, **how))
    budget = 2 * (per_row + (len(PROMPT) + 100) * per_token)
    with Engine(MODEL, Endless(), most_rows=4, cache_bytes=budget) as engine:
        answers = [engine.submit([*PROMPT, number], sampling=Sampling(), max_tokens=99) for number in range(4)]
        for answer in answers:
            assert answer.result(60).finish_reason == "length"
    assert max(together) == 2 and together.count(2) > 120


def test_several_answers_share_their_prompt(engine):
    prompt = [number % 90 for number in range(200)]
    options = {"sampling": Sampling(temperature=1.0, seed=5), "max_tokens": 8}
    answer = engine.submit(prompt, n=3, **options)
    parts = list(answer)
    assert {part.index for part in parts} == {0, 1, 2}
    assert engine.computed_tokens < 2 * len(prompt)
    done = answer.result()
    for index, one in enumerate(done):
        assert [part.token for part in parts if part.index == index] == list(one.tokens)
        sampling = Sampling(temperature=1.0, seed=5 + index)
        alone = [part.token for part in greedy(MODEL, prompt, sampling=sampling, max_tokens=8)]
        assert list(one.tokens) == alone


def test_log_probabilities_are_told(engine):
    done = engine.submit(PROMPT, logprobs=True, top_logprobs=4, **GREEDY).result(60)
    assert len(done.logprobs) == len(done.top_logprobs) == 12
    for token, logprob, top in zip(done.tokens, done.logprobs, done.top_logprobs, strict=True):
        assert top[0] == (token, logprob) and len(top) == 4
        assert [value for _, value in top] == sorted((value for _, value in top), reverse=True)
    assert engine.submit(PROMPT, **GREEDY).result(60).logprobs == ()


def test_a_session_goes_on(engine):
    session = Session(MODEL)
    first = engine.submit(PROMPT, session=session, **GREEDY).result(60)
    more = [*PROMPT, *first.tokens, 8, 9]
    second = engine.submit(more, session=session, **GREEDY).result(60)
    assert second.cached_tokens == len(more) - 2
    assert list(second.tokens) == recomputed(MODEL, more, 12)


def test_a_closed_engine_ends_what_runs():
    engine = Engine(MODEL, Endless())
    running = engine.submit(PROMPT, sampling=Sampling())
    next(running)
    engine.close()
    assert running.result(60).finish_reason == "cancelled"
    with pytest.raises(EngineClosedError, match="make a new one"):
        engine.submit(PROMPT)
    engine.close()


def test_an_engine_that_waits_holds_nothing_of_what_was_asked(engine):
    def told(done: int, total: int) -> None:
        pass

    session = Session(MODEL)
    done = engine.submit(PROMPT, session=session, on_progress=told, **GREEDY).result(60)
    lost = weakref.ref(session), weakref.ref(told)
    del session, told
    until = time.monotonic() + 60
    while any(one() is not None for one in lost) and time.monotonic() < until:
        time.sleep(0.01)
        gc.collect()
    assert [one() for one in lost] == [None, None] and done.finish_reason == "length"


@pytest.mark.parametrize("read", [True, False])
def test_a_lost_engine_ends_with_its_last_answer(read):
    def running() -> int:
        return sum("mlx-qwen35 engine" in thread.name for thread in threading.enumerate())

    before = running()
    answer = Engine(MODEL, Endless()).submit(PROMPT, **GREEDY)
    gc.collect()
    if read:
        assert [part.token for part in answer] == recomputed(MODEL, PROMPT, 12)
    else:
        del answer
    gc.collect()
    until = time.monotonic() + 60
    while running() > before and time.monotonic() < until:
        time.sleep(0.01)
    assert running() == before


def test_a_process_may_end_while_an_engine_answers():
    script = (
        "from tests.engine.test_engine import *\n"
        "engine = Engine(MODEL, Endless())\n"
        "answers = [engine.submit([*PROMPT, number], sampling=Sampling()) for number in range(8)]\n"
        "print(next(answers[0]).token)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(recomputed(MODEL, [*PROMPT, 0], 1)[0])


def test_a_fork_has_no_engine():
    script = (
        "import os\n"
        "from tests.engine.test_engine import *\n"
        "engine = Engine(MODEL, Endless())\n"
        "answer = engine.submit(PROMPT, sampling=Sampling())\n"
        "next(answer)\n"
        "child = os.fork()\n"
        "if not child:\n"
        "    with pytest.raises(EngineClosedError, match='this one was forked from: make one here'):\n"
        "        engine.submit(PROMPT)\n"
        "    engine.close()\n"
        "    sys.exit(7)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), next(answer).finish_reason)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, "7 None"), done.stderr


def test_texts_and_stop_strings():
    with Engine(MODEL, Typist()) as engine:
        done = engine.submit("abc", sampling=Sampling(), max_tokens=12).result(60)
        text = done.text
        stop = text[3:5]
        cut = engine.submit("abc", sampling=Sampling(), max_tokens=12, stop=stop).result(60)
        assert cut.text == text.split(stop)[0] and cut.finish_reason == "stop"
        assert (cut.stop_string, done.stop_string) == (stop, None)
