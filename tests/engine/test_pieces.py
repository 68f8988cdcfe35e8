"""How long a piece is, and when: what is careful, what is generous, and what a hiccup does."""

import pytest

from mlx_qwen35.engine.pieces import Pieces


def measured(call: float, token: float, step: float, *, pause: float = 0.5, count: int = 40) -> Pieces:
    """After a while on a machine of such times."""
    pieces = Pieces(pause, 2048, 16)
    for _ in range(count):
        pieces.stepped(step)
        if tokens := pieces.next():
            pieces.computed(tokens, call + tokens * token, beside=True)
    return pieces


def steps_until_next(pieces: Pieces, step: float) -> int:
    for count in range(1000):
        if pieces.next():
            return count
        pieces.stepped(step)
    raise AssertionError("no piece in a thousand steps")


def test_the_first_beside_others_is_short() -> None:
    """What whole chunks took says little of short pieces."""
    pieces = Pieces(0.5, 2048, 16)
    pieces.computed(2048, 1.0, beside=False)
    for _ in range(3):
        pieces.stepped(0.5)
    assert pieces.next() == 16
    pieces.computed(16, 0.03, beside=True)
    pieces.stepped(0.5)
    assert 400 < pieces.next() < 520


def test_its_share_exactly() -> None:
    pieces = measured(call=0.0, token=0.001, step=0.2)
    assert pieces.next() == 100 or steps_until_next(pieces, 0.2) == 1 and pieces.next() == 100


def test_where_short_ones_cost_more_a_piece_takes_a_tenth_of_a_second_and_its_share_on_average() -> None:
    """Pieces of a small model: 16 tokens take 28 ms, 160 a tenth of a second."""
    pieces = Pieces(0.5, 2048, 16)
    given, lengths = {}, {}
    for prompts in (1, 4):
        seconds = 0.0
        for _ in range(400):
            pieces.crowd(prompts, 4)
            pieces.stepped(0.02)
            if tokens := pieces.next():
                lengths[prompts] = tokens
                pieces.computed(tokens, 0.02 + tokens * 0.0005, beside=True)
                seconds += 0.02 + tokens * 0.0005
        given[prompts] = seconds
    assert all(120 <= length <= 160 for length in lengths.values())
    assert all(0.4 * 400 * 0.02 < seconds < 0.6 * 400 * 0.02 for seconds in given.values())


def test_a_longer_one_where_that_costs_next_to_nothing() -> None:
    """A piece that reads all weights takes as long with 16 tokens as with somewhat more."""
    pieces = measured(call=0.05, token=0.0001, step=0.05, count=120)
    steps_until_next(pieces, 0.05)
    assert 320 <= pieces.next() <= 520 and pieces.seconds(pieces.next()) < 0.101


@pytest.mark.parametrize("hiccup", [3.0, 60.0])
def test_a_hiccup(hiccup: float) -> None:
    """Neither what follows is put off for long, nor is a piece taken to be slow from then on."""
    pieces = measured(call=0.0, token=0.001, step=0.1)
    steps_until_next(pieces, 0.1)
    tokens, predicted = pieces.next(), pieces.seconds(pieces.next())
    pieces.computed(tokens, hiccup, beside=True)
    assert pieces.seconds(tokens) < 1.5 * predicted
    assert steps_until_next(pieces, 0.1) <= 10


def test_a_slow_step_is_not_all_paid_out() -> None:
    pieces = measured(call=0.0, token=0.001, step=0.1)
    pieces.stepped(30.0)
    assert pieces.next() <= 100


def test_the_first_time_may_be_slow() -> None:
    """A kernel that is compiled in the first piece does not hold up those after it."""
    pieces = Pieces(0.5, 2048, 16)
    pieces.computed(20, 5.0, beside=False)
    assert steps_until_next(pieces, 0.02) <= 12
    pieces.computed(16, 0.01, beside=True)
    pieces.stepped(0.02)
    assert pieces.seconds(16) < 0.02


def test_what_a_piece_takes_is_told_by_the_step_behind_it_too() -> None:
    """A step is queued before the piece, which so takes both; the next one is there at once, but has to be begun."""
    pieces, waited, steps = Pieces(0.5, 2048, 16), 0.0, 0
    for _ in range(600):
        pieces.stepped(0.02)
        steps += 1
        if tokens := pieces.next():
            took = 0.02 + 0.02 + tokens * 0.0005  # the queued step, a call, its tokens
            pieces.computed(tokens, took, beside=True)
            pieces.stepped(0.008)  # what the queued step gave is there, and nothing was queued behind it
            waited, steps = waited + took + 0.008 - 0.02, steps + 1
    assert 0.4 < waited / (0.02 * steps) < 0.55
    assert pieces.seconds(100) == pytest.approx(0.02 + 0.05 + 0.008, rel=0.15)


def test_no_pause_at_all() -> None:
    pieces = measured(call=0.0, token=0.001, step=0.1, pause=0.0)
    assert pieces.next() == 0


def test_where_more_wait_than_decode_prompts_get_more():
    pieces = Pieces(0.5, 256, 8)
    shares = []
    for prompts, decoding in [(1, 1), (1, 7), (7, 1), (6, 3), (1, 1)]:
        pieces.crowd(prompts, decoding)
        shares.append(pieces.pause)
    assert shares == [0.5, 0.5, 3.5, 1.0, 0.5]
