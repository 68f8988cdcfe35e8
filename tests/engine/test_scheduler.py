"""The scheduler, by replay: thousands of courses on made-up machines, and the rules of its docstring one by one."""

import random
from dataclasses import replace

import pytest

from mlx_qwen35.engine.scheduler import STRETCH, Load, Scheduler
from mlx_qwen35.errors import ArgumentError, BudgetError, BusyError
from tests.engine.replay import Ask, Machine, Replay
from tests.soak import examples


def drawn(seed: int) -> Replay:
    """A course of its own for each seed."""
    chance = random.Random(seed)
    asks, at = [], 0.0
    for key in range(chance.randint(1, 24)):
        at += chance.choice((0.0, 0.0, chance.expovariate(2.0)))
        prompt, answer = chance.choice((5, 60, 300, 300, 3000)), chance.choice((1, 4, 40, 900))
        load = Load(
            prompt_tokens=chance.randint(1, prompt),
            most_tokens=0,
            priority=chance.choice((0, 0, 0, 1, -1, 5)),
            deadline=at + chance.expovariate(0.3) if chance.random() < 0.15 else None,
            alone=chance.random() < 0.2,
            apart=chance.random() < 0.1,
        )
        answer = chance.randint(1, answer)
        most = load.prompt_tokens + answer + chance.choice((0, 0, 500))
        load = replace(load, most_tokens=most)
        cancel = at + chance.expovariate(0.5) if chance.random() < 0.15 else float("inf")
        known = chance.choice((0, 0, load.prompt_tokens // 2, load.prompt_tokens - 1))
        behind = chance.randrange(24) if chance.random() < 0.2 else None
        asks.append(Ask(key, at, load, answer, cancel, known, behind))
    scheduler = Scheduler(
        most_rows=chance.choice((1, 2, 3, 8)),
        most_waiting=chance.choice((None, None, 0, 6)),
        cache_bytes=chance.choice((None, 1200, 2000, 6000)),
        bytes_per_token=1,
        bytes_per_row=chance.choice((0, 100)),
        pause=chance.choice((0.0, 0.25, 0.5, 2.0)),
        chunk=chance.choice((7, 64, 512)),
        together_chunk=chance.choice((0, 5, 64, 512)),
        least=chance.choice((1, 16)),
        rows_first=chance.random() < 0.25,
    )
    machine = Machine(
        call=chance.choice((0.0, 0.02)),
        token=chance.choice((0.0001, 0.001)),
        row=chance.choice((0.001, 0.01)),
        noise=0.3,
        hiccup=chance.choice((0.0, 0.02)),
    )
    return Replay(scheduler, machine, asks, seed, burst=chance.choice((1, 4, 12)))


def test_courses() -> None:
    """Rows, bytes, deadlines, progress in every turn (replay.py), and every request ends, whatever the course."""
    ends, put_back, came_back = dict.fromkeys(("whole", "deadline", "cancelled", "busy", "too large"), 0), 0, 0
    courses = examples(600, 6)
    for seed in range(courses):
        replay = drawn(seed)
        asks = list(replay.coming)
        replay.run()
        for ask in asks:
            ends[ask.ended] += 1
            put_back += ask.put_back > 0
            came_back += ask.put_back > 0 and ask.ended == "whole"
            if ask.ended == "whole":
                assert ask.given == ask.answer
            if ask.ended == "too large":
                scheduler = replay.scheduler
                assert ask.load.prompt_tokens + scheduler.bytes_per_row > scheduler.cache_bytes
    assert min(ends.values()) > courses / 12 and ends["whole"] > 5 * courses, ends  # each of them was played
    assert came_back > courses / 12, (put_back, came_back)


def test_same_again() -> None:
    for seed in range(12):
        first, second = drawn(seed), drawn(seed)
        first.run()
        second.run()
        assert first.log == second.log


def test_put_back_is_not_for_nothing() -> None:
    """What was computed again stays small beside what was computed, though the bytes are far too few."""
    scheduler = Scheduler(cache_bytes=4000, bytes_per_token=1, most_rows=8)
    asks = [Ask(key, 0.0, Load(100, 1100), 1000) for key in range(16)]
    replay = Replay(scheduler, Machine(), asks)
    replay.run()
    assert 0 < sum(ask.put_back for ask in asks) <= 16
    assert replay.order[:8] == list(range(8))


@pytest.mark.parametrize("bytes_", [None, 700])
def test_first_come_first_served(bytes_: int | None) -> None:
    scheduler = Scheduler(most_rows=2, cache_bytes=bytes_, bytes_per_token=1)
    replay = Replay(scheduler, Machine(), [Ask(key, 0.001 * key, Load(40, 60), 20) for key in range(12)])
    replay.run()
    assert replay.order == list(range(12))


def test_higher_priority_first() -> None:
    asks = [Ask(key, 0.0, Load(40, 60, priority=key % 3), 20) for key in range(12)]
    replay = Replay(Scheduler(most_rows=2), Machine(), asks)
    replay.run()
    assert replay.order == sorted(range(12), key=lambda key: (-(key % 3), key))


def test_no_stream_of_higher_priority_starves() -> None:
    """30 seconds of waiting are worth a step of priority."""
    asks = [Ask(key, 0.5 * key, Load(100, 200, priority=2), 50) for key in range(400)]  # a second each, two a second
    asks.append(Ask(1000, 10.2, Load(100, 200), 50))
    replay = Replay(Scheduler(most_rows=1), Machine(), asks)
    replay.run()
    overtook = [key for key in replay.order[: replay.order.index(1000)]]
    came = [asks[key].at for key in overtook]
    assert 60.0 < max(came) <= 10.2 + 60.0 and min(asks[key].at for key in replay.order[len(came) + 1 :]) > 70.2


def test_no_stream_of_small_ones_starves_a_big_one() -> None:
    """Eight may go before it; then nobody does, until it fits."""
    scheduler = Scheduler(cache_bytes=3000, bytes_per_token=1)
    asks = [Ask(key, 0.05 * key, Load(100, 350), 250) for key in range(200)]
    asks.append(Ask(1000, 1.02, Load(2500, 2600), 100))
    replay = Replay(scheduler, Machine(), asks)
    replay.run()
    before = replay.order[: replay.order.index(1000)]
    assert sum(asks[key].at > 1.02 for key in before) <= 8 and len(before) < 40
    assert all(ask.ended == "whole" and not ask.put_back for ask in asks)


def test_small_ones_go_before_one_that_does_not_fit() -> None:
    scheduler = Scheduler(cache_bytes=950, bytes_per_token=1)
    for key, prompt in enumerate((500, 900, 40)):
        scheduler.submit(key, Load(prompt, prompt + 10), 0.0)
    assert scheduler.turn(0.0).admit == (0, 2)
    scheduler.ended(0)
    assert scheduler.turn(0.0).admit == ()
    scheduler.ended(2)
    assert scheduler.turn(0.0).admit == (1,)


def test_too_large_is_refused_with_the_numbers() -> None:
    scheduler = Scheduler(cache_bytes=10_000, bytes_per_token=10, bytes_per_row=500)
    scheduler.submit("fits", Load(950, 5000), 0.0)
    with pytest.raises(BudgetError, match=r"951 tokens.*10,010 bytes \(10 a token and 500\); 10,000 bytes"):
        scheduler.submit("does not", Load(951, 952), 0.0)
    assert scheduler.waiting == ("fits",)


def test_the_last_row_may_go_on() -> None:
    scheduler = Scheduler(cache_bytes=600, bytes_per_token=1)
    asks = [Ask(0, 0.0, Load(500, 5000), 3000), Ask(1, 0.0, Load(500, 5000), 3000)]
    Replay(scheduler, Machine(), asks, burst=8).run()
    assert [ask.ended for ask in asks] == ["whole", "whole"] and not asks[0].put_back


def test_who_is_put_back() -> None:
    """The newest of the lowest priority; it keeps its place, before those that came later."""
    scheduler = Scheduler(cache_bytes=4 * (10 + STRETCH), bytes_per_token=1)
    for key, priority in enumerate((0, 0, 1, 1)):
        scheduler.submit(key, Load(10, 5000, priority), 0.0)
    assert scheduler.turn(0.0).admit == (2, 3, 0, 1)
    scheduler.submit(9, Load(500, 5000), 1.0)
    for key in range(4):
        scheduler.covered(key, 10)
        scheduler.generated(key, 245 if key == 2 else 5)
    turn = scheduler.turn(1.0)
    assert turn.put_back == (1,) and turn.admit == () and scheduler.waiting == (1, 9)
    scheduler.generated(3, 245)
    assert scheduler.turn(1.0).put_back == (0,) and scheduler.waiting == (0, 1, 9)
    scheduler.ended(3)
    assert scheduler.turn(2.0).admit == (0,)
    scheduler.ended(2)
    turn = scheduler.turn(2.0)
    assert turn.admit == (1,) and turn.prefill == ((0, 15),)  # its prompt, and what it had of an answer
    scheduler.covered(0, 15)
    assert scheduler.turn(2.0).decode
    assert scheduler.turn(2.0).decode


def test_the_store_gives_up_first() -> None:
    scheduler = Scheduler(cache_bytes=1000, bytes_per_token=1)
    scheduler.held(100, 850)
    scheduler.submit("a", Load(300, 400), 0.0)
    turn = scheduler.turn(0.0)
    assert turn.admit == ("a",) and turn.free == 350 and turn.store_bytes == 600
    scheduler.held(100, 500)
    scheduler.submit("b", Load(600, 700), 0.0)  # 500 are left, if the store gives up all that it can
    assert scheduler.turn(0.0) == scheduler.turn(0.0) and scheduler.waiting == ("b",)
    scheduler.ended("a")
    turn = scheduler.turn(0.0)
    assert turn.admit == ("b",) and turn.free == 300 and turn.store_bytes == 300


def test_what_the_store_holds_unasked() -> None:
    """Where the store does not tell what it could give up, it is as if that were all the rest."""
    scheduler = Scheduler(cache_bytes=1000, bytes_per_token=1)
    scheduler.held(100)
    scheduler.submit("a", Load(300, 400), 0.0)
    assert scheduler.turn(0.0).free == 400 and scheduler.turn(0.0).free == 0


def test_waiting_is_bounded() -> None:
    """Those that find a row free do not count, and the order of calls within one turn does not matter."""
    scheduler = Scheduler(most_rows=2, most_waiting=1)
    for key in range(3):
        scheduler.submit(key, Load(5, 9), 0.0)
    with pytest.raises(BusyError, match=r"0 requests are running and 3 are waiting; at most 1 may"):
        scheduler.submit(3, Load(5, 9), 0.0)
    assert scheduler.turn(0.0).admit == (0, 1)
    with pytest.raises(BusyError, match="2 requests are running and 1 are waiting"):
        scheduler.submit(3, Load(5, 9), 0.0)
    scheduler.ended(1)
    scheduler.turn(0.0)
    scheduler.submit(3, Load(5, 9), 0.0)
    assert scheduler.waiting == (3,)


def test_deadlines_are_told_until_it_has_ended() -> None:
    scheduler = Scheduler(most_rows=1)
    scheduler.submit("runs", Load(5, 9, deadline=2.0), 0.0)
    scheduler.submit("waits", Load(5, 9, deadline=1.0), 0.0)
    assert scheduler.turn(0.5).expired == ()
    scheduler.covered("runs", 5)
    for _ in range(2):
        turn = scheduler.turn(1.0)
        assert turn.expired == ("waits",) and turn.decode
    assert scheduler.turn(2.0).expired == ("runs", "waits")
    scheduler.ended("waits")
    turn = scheduler.turn(2.0)
    assert turn.expired == ("runs",) and not turn.decode


MACHINES = {
    "weights are read once a call": Machine(call=0.03, token=0.0005, row=0.001),
    "nothing but tokens": Machine(call=0.0, token=0.001, row=0.03),
    "slow prompts": Machine(call=0.01, token=0.02, row=0.001),
    "hiccups": Machine(call=0.02, token=0.0005, row=0.002, hiccup=0.01),
}


@pytest.mark.parametrize("name", MACHINES)
@pytest.mark.parametrize("pause", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("first", [20, 1000])
def test_pause(name: str, pause: float, first: int) -> None:
    """While a long prompt comes in, those that decode wait `pause` of a step's time, on average over a few turns; and
    what they may be asked to wait is used. first: tokens of the prompts that came before, which were measured."""
    machine = MACHINES[name]
    asks = [Ask(key, 0.0, Load(first, 10**6), 10**6) for key in range(2)] + [Ask(9, 5.0, Load(10**6, 10**6), 1)]
    replay = Replay(Scheduler(pause=pause, chunk=512), machine, asks)
    while replay.coming:
        replay.turn()
    replay.pieces = replay.steps = 0.0
    while not replay.here[1].done or replay.steps < 1.0:  # until what it hangs on was measured
        replay.turn()
    spans, longest = [], machine.piece(16, random.Random(0)) * 2
    pieces = steps = 0.0
    replay.pieces = replay.steps = 0.0
    while replay.steps < 30.0:
        replay.turn()
        if replay.steps - steps > 2.0:
            spans.append((replay.pieces - pieces) / (replay.steps - steps))
            pieces, steps = replay.pieces, replay.steps
    mean = replay.pieces / replay.steps
    hiccups = 9 * machine.hiccup  # what they add is not paid back in full
    assert 0.85 * pause < mean < 1.05 * pause + hiccups, mean
    if not hiccups:
        assert max(spans) < 1.15 * pause + longest / 2.0, spans


def test_a_piece_is_no_longer_than_its_share() -> None:
    """Where a piece costs its tokens and no more, each turn has one, and no pause is longer than the step's share."""
    asks = [Ask(0, 0.0, Load(10, 10**6), 10**6, cancel=300), Ask(1, 50.0, Load(10**5, 10**6), 5, cancel=300)]
    replay = Replay(Scheduler(pause=0.5), Machine(call=0.0, token=0.001, row=0.1, noise=0.0), asks)
    replay.run()
    times = asks[0].times
    gaps = [after - before for before, after in zip(times, times[1:], strict=False)]
    late = [gap for time, gap in zip(times, gaps, strict=False) if time > 60]
    assert max(late) < 0.1501 and sum(gap > 0.14 for gap in late) > 0.9 * len(late)


def test_cautious_before_anything_is_measured() -> None:
    scheduler = Scheduler()
    scheduler.submit(0, Load(5, 1000), 0.0)
    scheduler.turn(0.0)
    scheduler.covered(0, 5)
    scheduler.submit(1, Load(5000, 6000), 0.0)
    assert not scheduler.turn(0.0).prefill
    turns = [scheduler.turn(0.0) for _ in range(8)]  # nobody tells times: it goes on all the same, in small pieces
    assert {turn.prefill for turn in turns} == {(), ((1, 16),)} and all(turn.decode for turn in turns)


def test_whole_chunks_where_nobody_decodes() -> None:
    scheduler = Scheduler(chunk=512)
    scheduler.submit(0, Load(1300, 1400), 0.0)
    scheduler.turn(0.0)
    found = []
    for _ in range(3):
        ((key, tokens),) = scheduler.turn(0.0).prefill
        scheduler.measured_prefill(tokens, 1.0)
        found.append(tokens)
        scheduler.covered(key, sum(found))
    assert found == [512, 512, 276] and scheduler.turn(0.0).decode


def test_rows_first() -> None:
    """Steps wait for whole prompts, but not for one that does not get on."""
    scheduler = Scheduler(most_rows=2, chunk=512, rows_first=True)
    for key, prompt in enumerate((10, 600, 20)):
        scheduler.submit(key, Load(prompt, 1000), 0.0)
    scheduler.turn(0.0)
    for key, tokens, covered in ((0, 10, 10), (1, 512, 512), (1, 88, 600)):
        turn = scheduler.turn(0.0)
        assert turn.prefill == ((key, tokens),) and not turn.decode
        scheduler.covered(key, covered)
        scheduler.measured_prefill(tokens, 1.0)
    assert scheduler.turn(0.0).decode
    scheduler.ended(0)
    assert scheduler.turn(0.0).admit == (2,)
    turns = [scheduler.turn(0.0) for _ in range(4)]  # its piece is not computed, whatever keeps it
    assert [turn.decode for turn in turns] == [False, True, False, True]
    assert all(turn.prefill == ((2, 20),) for turn in turns)


def pieces(loads: list[Load], *, chunk: int = 100, tokens_at: dict[int, int] | None = None) -> list:
    """Who gets pieces, in their order, of prompts that are all here; tokens_at: request to how many came before it."""
    scheduler, at, found, total = Scheduler(chunk=chunk), tokens_at or {}, [], 0
    computed = dict.fromkeys(range(len(loads)), 0)
    coming = sorted(range(len(loads)), key=lambda key: (at.get(key, 0), key))
    while coming or any(computed[key] < load.prompt_tokens for key, load in enumerate(loads)):
        while coming and at.get(coming[0], 0) <= total:
            key = coming.pop(0)
            scheduler.submit(key, loads[key], 0.0)
            if key in scheduler.turn(0.0).admit:
                scheduler.covered(key, 0)
        ((key, tokens),) = scheduler.turn(0.0).prefill
        total, computed[key] = total + tokens, computed[key] + tokens
        scheduler.covered(key, computed[key])
        found.append(key)
        if computed[key] == loads[key].prompt_tokens:
            scheduler.ended(key)
    return found


def test_prompts_one_after_the_other() -> None:
    loads = [Load(300, 300), Load(300, 300), Load(300, 300, priority=1)]
    assert pieces(loads) == [2] * 3 + [0] * 3 + [1] * 3


def test_short_prompts_go_before_a_long_one() -> None:
    assert pieces([Load(1000, 1000), Load(200, 200), Load(100, 100)], tokens_at={1: 300, 2: 300}) == (
        [0] * 3 + [2, 1, 1] + [0] * 7
    )
    assert pieces([Load(400, 400, priority=1), Load(100, 100)], tokens_at={1: 100}) == [0] * 4 + [1]


def test_no_stream_of_short_prompts_starves_a_long_one() -> None:
    """What goes before it is no more than it has left itself."""
    loads = [Load(1000, 1000)] + [Load(100, 100) for _ in range(60)]
    order = pieces(loads, tokens_at={key: 100 * key for key in range(1, 61)})
    last = max(at for at, key in enumerate(order) if key == 0)
    assert 10 < last + 1 <= 2 * 10


def test_one_that_waits_for_a_prefix() -> None:
    scheduler = Scheduler(most_rows=4, chunk=10)
    scheduler.submit("late", Load(30, 40, priority=-1), 0.0)
    scheduler.submit("first", Load(50, 60), 0.0)
    scheduler.submit("waits", Load(20, 40, priority=3), 0.0)
    scheduler.turn(0.0)
    assert scheduler.turn(0.0).prefill == (("waits", 10),)
    scheduler.waits_for_prefix("waits", "late")
    assert scheduler.turn(0.0).prefill == (("late", 10),)  # it has the place of the one that waits
    scheduler.waits_for_prefix("late", "waits")  # nonsense: but somebody goes on
    assert scheduler.turn(0.0).prefill == (("first", 10),)
    scheduler.ended("first")
    assert scheduler.turn(0.0).prefill == (("waits", 10),)
    scheduler.waits_for_prefix("late", None)
    scheduler.waits_for_prefix("waits", None)
    assert scheduler.turn(0.0).prefill == (("waits", 10),)
    scheduler.waits_for_prefix("waits", "late")
    scheduler.ended("late")  # it will not tell any more
    assert scheduler.turn(0.0).prefill == (("waits", 10),)


def test_those_who_decode_alone_take_turns() -> None:
    scheduler = Scheduler()
    for key, alone in enumerate((False, True, False, True)):
        scheduler.submit(key, Load(5, 100, alone=alone), 0.0)
    scheduler.turn(0.0)
    for key in range(4):
        scheduler.covered(key, 5)
    turns = [scheduler.turn(0.0) for _ in range(9)]
    assert [turn.solo if turn.solo is not None else "others" for turn in turns] == ["others", 1, 3] * 3
    assert [turn.decode for turn in turns] == [True, False, False] * 3
    scheduler.ended(0)
    scheduler.ended(2)
    assert [scheduler.turn(0.0).solo for _ in range(4)] == [1, 3, 1, 3]


def test_no_stream_of_those_alone_starves_the_others() -> None:
    asks = [Ask(0, 0.0, Load(5, 500), 200)]
    asks += [Ask(key, 0.05 * key, Load(5, 10, alone=True), 2) for key in range(1, 200)]
    replay = Replay(Scheduler(), Machine(), asks)
    replay.run()
    gaps = [after - before for before, after in zip(asks[0].times, asks[0].times[1:], strict=False)]
    assert max(gaps) < 8 * 2 * 0.03 * 1.1


def test_arguments() -> None:
    for wrong in ({"most_rows": 0}, {"chunk": 0}, {"least": 0}, {"pause": -1.0}):
        with pytest.raises(ArgumentError, match=next(iter(wrong))):
            Scheduler(**wrong)
    scheduler = Scheduler()
    scheduler.submit("a", Load(5, 9), 0.0)
    with pytest.raises(ValueError, match="'a' is here already"):
        scheduler.submit("a", Load(5, 9), 0.0)
    scheduler.ended("never came")
