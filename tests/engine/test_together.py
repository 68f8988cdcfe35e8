"""Prompts of several rows in one call of the model: whose, and what becomes of them when one of them fails or ends."""

import pytest

from mlx_qwen35.cache.ragged import RaggedCache
from mlx_qwen35.engine import request as requests
from mlx_qwen35.engine.loop import Loop
from mlx_qwen35.engine.scheduler import Load, Scheduler
from mlx_qwen35.generation import generate_batch, stream_generate
from mlx_qwen35.sampling import Sampling
from mlx_qwen35.session.store import Store
from tests.talkers import Endless, random_model, recomputed

MODEL = random_model("dense")
PROMPTS = [[(seed * 31 + at * 7) % 90 for at in range(length)] for seed, length in enumerate((9, 23, 1, 40, 5, 17))]


@pytest.fixture
def calls(monkeypatch) -> list[list[int]]:
    """Lengths of the pieces of each call that computes some of several prompts."""
    found, hidden = [], MODEL.hidden

    def noted(tokens, cache=None, *arguments, **options):
        if isinstance(cache, RaggedCache):
            found.append(cache.lengths)
        return hidden(tokens, cache, *arguments, **options)

    monkeypatch.setattr(MODEL, "hidden", noted)
    return found


def a_loop(**options) -> Loop:
    options = {"most_rows": 8, "together_chunk": 512} | options
    return Loop(MODEL, store=Store(MODEL, most_bytes=1 << 28), scheduler=Scheduler(**options))


def asked(prompt: list[int], **options) -> requests.Request:
    return requests.read(MODEL, Endless(), prompt, {"sampling": Sampling(), "max_tokens": 6} | options)


def answers(loop: Loop, rows) -> list[tuple[list[int], str | type]]:
    """Tokens of each, and why it ended."""
    tokens, ends = {row: [] for row in rows}, {}
    for _ in range(200):
        loop.turn()
        for row in rows:
            while row.ready and row not in ends:
                try:
                    part = row.take()
                except Exception as error:
                    ends[row] = type(error)
                    loop.leave(row)
                    continue
                tokens[row] += [] if part.token is None else [part.token]
                if part.finish_reason:
                    ends[row] = part.finish_reason
        if len(ends) == len(rows):
            return [(tokens[row], ends[row]) for row in rows]
    raise AssertionError("they did not end")


def expected(prompt: list[int], count: int = 6) -> tuple[list[int], str]:
    return recomputed(MODEL, prompt, count), "length"


def test_a_burst_is_one_call(calls):
    loop = a_loop()
    rows = [loop.add(asked(prompt)) for prompt in PROMPTS]
    assert answers(loop, rows) == [expected(prompt) for prompt in PROMPTS]
    assert [sorted(lengths) for lengths in calls] == [sorted(map(len, PROMPTS))]


def test_generate_batch_reads_them_together_and_gives_what_each_has_alone(calls):
    found = generate_batch(MODEL, Endless(), PROMPTS, sampling=Sampling(), max_tokens=6, most_rows=4)
    assert [list(each.tokens) for each in found] == [expected(prompt)[0] for prompt in PROMPTS]
    assert len(calls[0]) == 4


def test_sampled_with_a_seed(calls):
    sampling = Sampling(temperature=1.0, seed=3)
    alone = [
        [part.token for part in stream_generate(MODEL, Endless(), prompt, sampling=sampling, max_tokens=6)]
        for prompt in PROMPTS
    ]
    loop = a_loop()
    rows = [loop.add(asked(prompt, sampling=sampling)) for prompt in PROMPTS]
    assert [tokens for tokens, _ in answers(loop, rows)] == alone and calls


def test_with_few_tokens_a_call(calls):
    loop = a_loop(chunk=16, together_chunk=16)
    rows = [loop.add(asked(prompt)) for prompt in PROMPTS]
    assert answers(loop, rows) == [expected(prompt) for prompt in PROMPTS]
    assert calls and all(sum(lengths) <= 16 for lengths in calls)


@pytest.mark.parametrize("done", [0, 40])
def test_what_fails_in_one_row_ends_that_one(calls, done):
    def told(at: int, total: int) -> None:
        if at == done:
            raise ValueError("no more")

    loop = a_loop()
    rows = [loop.add(asked(prompt, **({"on_progress": told} if len(prompt) == 40 else {}))) for prompt in PROMPTS]
    found = answers(loop, rows)
    assert found == [([], ValueError) if len(prompt) == 40 else expected(prompt) for prompt in PROMPTS]
    assert len(calls) == 1


def test_where_the_call_fails_each_is_tried_alone(calls, monkeypatch):
    """And the one that it fails for ends."""
    hidden = MODEL.hidden

    def fails(tokens, cache=None, *arguments, **options):
        if 77 in tokens[0].tolist():
            raise MemoryError("not with this one")
        return hidden(tokens, cache, *arguments, **options)

    prompts = [*PROMPTS[:3], [5, 77, 8], *PROMPTS[4:]]
    prompts = [[11 if token == 77 and prompt != [5, 77, 8] else token for token in prompt] for prompt in prompts]
    right = [expected(prompt) for prompt in prompts]
    assert not any(77 in tokens for tokens, _ in right)
    monkeypatch.setattr(MODEL, "hidden", fails)
    loop = a_loop()
    found = answers(loop, [loop.add(asked(prompt)) for prompt in prompts])
    right[3] = ([], MemoryError)
    assert found == right


def test_one_that_is_cancelled_beside_others(calls):
    loop, cancelled = a_loop(chunk=16, together_chunk=16), []
    rows = [loop.add(asked(prompt, cancel=lambda own=prompt: own in cancelled)) for prompt in PROMPTS]
    loop.turn()
    loop.turn()
    cancelled.append(PROMPTS[1])
    found = answers(loop, rows)
    assert found[1][1] == "cancelled"
    assert found[:1] + found[2:] == [expected(prompt) for prompt in PROMPTS[:1] + PROMPTS[2:]]


def test_prompts_that_meet_leave_a_snapshot_where_they_do(calls):
    """Of two beginnings, each computed once: the first of each in one call, and then who waited for them."""
    beginnings = [[(at * step) % 90 for at in range(100)] for step in (7, 11)]
    prompts = [beginning + [last, 3] for last in range(3) for beginning in beginnings]
    loop = a_loop()
    rows = [loop.add(asked(prompt)) for prompt in prompts]
    assert answers(loop, rows) == [expected(prompt) for prompt in prompts]
    assert loop.computed_tokens < 2 * 100 + 6 * 4
    assert [len(lengths) for lengths in calls][0] == 2 and max(len(lengths) for lengths in calls) > 2


def test_an_exact_model_reads_one_at_a_time(monkeypatch):
    assert MODEL.together_chunk == MODEL.prefill_chunk
    monkeypatch.setattr(MODEL, "exact", True)
    assert MODEL.together_chunk == 0


def together(loads: list[Load], **options):
    """What the second turn computes of prompts that are all here."""
    scheduler = Scheduler(**{"together_chunk": 2048} | options)
    for key, load in enumerate(loads):
        scheduler.submit(key, load, 0.0)
    scheduler.turn(0.0)
    return scheduler.turn(0.0).prefill


def test_who_goes_together():
    loads = [Load(12, 40), Load(9, 40), Load(20, 40)]
    assert sorted(together(loads)) == [(0, 12), (1, 9), (2, 20)]
    assert len(together(loads, together_chunk=0)) == 1
    assert sorted(together([*loads, Load(15, 40, apart=True)])) == [(0, 12), (1, 9), (2, 20)]
    assert together([Load(12, 40, apart=True, priority=1), *loads]) == ((0, 12),)
    assert sum(tokens for _, tokens in together(loads, chunk=30)) <= 30


def test_nobody_reads_what_another_computes_for_it():
    scheduler = Scheduler(together_chunk=2048)
    for key in range(3):
        scheduler.submit(key, Load(20, 40), 0.0)
    scheduler.turn(0.0)
    scheduler.waits_for_prefix(1, 0)
    scheduler.waits_for_disk(2, True)
    assert scheduler.turn(0.0).prefill == ((0, 20),)


def test_long_ones_wait_for_each_other_and_short_ones_do_not():
    """Where somebody reads along; a call with both would keep the first waiting for the tokens of all."""
    assert len(together([Load(1000, 1100), Load(900, 1000)])) == 1
    assert len(together([Load(1000, 1100), Load(900, 1000)], rows_first=True)) == 2
    assert sorted(together([Load(200, 300), Load(220, 320)])) == [(0, 200), (1, 220)]
    scheduler = Scheduler(together_chunk=2048)
    for tokens in (16, 16, 220, 220):
        scheduler.measured_prefill(tokens, 0.01 + 0.001 * tokens)
    for key in range(2):
        scheduler.submit(key, Load(220 - key, 400), 0.0)
    scheduler.turn(0.0)
    assert scheduler.turn(0.0).prefill == ((1, 219),)  # which takes nine times as long as a call with a few tokens


def test_where_many_wait_for_one_a_piece_is_longer():
    lengths = []
    for prompts in (2, 6):
        scheduler = Scheduler(together_chunk=2048)
        for key in range(prompts + 1):
            scheduler.submit(key, Load(600, 10**6), 0.0)
        scheduler.turn(0.0)
        scheduler.covered(0, 600)
        scheduler.turn(0.0)
        for _ in range(40):
            scheduler.measured_decode(1, 0.02)
            scheduler.measured_prefill(512, 0.3)
            scheduler.measured_prefill(16, 0.01)
        turn = scheduler.turn(0.0)
        while not turn.prefill:
            scheduler.measured_decode(1, 0.02)
            turn = scheduler.turn(0.0)
        lengths.append(sum(tokens for _, tokens in turn.prefill))
    assert 150 < lengths[0] < 400 < 2 * lengths[0] < lengths[1]


def test_what_is_submitted_meanwhile_goes_with_the_first(calls):
    """While one request is read, those before it wait, for a little; one that fails keeps nobody."""
    from mlx_qwen35.engine.engine import Engine

    with Engine(MODEL, Endless()) as engine:
        options = {"sampling": Sampling(), "max_tokens": 6}
        with engine.expecting():
            first = [engine.submit(prompt, **options) for prompt in PROMPTS[:3]]
            others = [engine.submit(prompt, **options) for prompt in PROMPTS[3:]]
        made = [list(answer.result(timeout=60).tokens) for answer in (*first, *others)]
        with pytest.raises(ValueError), engine.expecting():
            raise ValueError
        assert list(engine.submit(PROMPTS[0], **options).result(timeout=60).tokens) == made[0]
    assert made == [expected(prompt)[0] for prompt in PROMPTS]
    assert len(calls[0]) == len(PROMPTS)
