"""Copies of what was said before, rejected at every row, between plain steps, cancelled, branched: answers stay."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35.cache import Cache, KVCache, StretchedKVCache
from mlx_qwen35.cache.kv import KVFormat
from mlx_qwen35.engine import drafted
from mlx_qwen35.engine.drafted import Drafted
from mlx_qwen35.engine.engine import Engine
from mlx_qwen35.engine.group import Seat
from mlx_qwen35.generation import statistics, stream_generate
from mlx_qwen35.sampling import History, Sampler, Sampling
from mlx_qwen35.session import Session, load_session
from mlx_qwen35.speculative.copying import MOST, Copying
from mlx_qwen35.speculative.pace import Pace
from mlx_qwen35.speculative.rounds import copied, verify
from mlx_qwen35.speculative.rows import most_rows
from mlx_qwen35.speculative.text import Text
from tests.drafted import near, with_head
from tests.speculative.test_few_tokens import quantized
from tests.talkers import PROMPT, VOCAB, Endless, assert_covers, greedy, random_model

GREEDY = Sampling()
FEW = Sampling(logit_bias={token: 50.0 for token in (5, 17, 33)})  # words, so that much was there before


@pytest.fixture(scope="module")
def dense():
    return random_model("dense")


def copies(monkeypatch, count=MOST) -> None:
    """Every match is copied from, `count` tokens at a time, whatever that costs."""
    monkeypatch.setattr(Copying, "choose", lambda self, kind, most, otherwise=None: min(count, most))


def tokens_of(parts):
    return [part.token for part in parts]


def plain(model, prompt, count, **options):
    return tokens_of(greedy(model, prompt, max_tokens=count, lookup=False, **options))


@pytest.mark.parametrize("rows", [9, 16, 32])
@pytest.mark.parametrize("kind", ["dense", "moe", "4 bits"])
def test_a_state_that_is_computed_once_more_has_the_bits_of_one_that_was_kept(kind, rows):
    model = quantized(group_size=32, bits=4) if kind == "4 bits" else random_model(kind)
    said = np.random.RandomState(3).randint(0, VOCAB, 40).tolist()
    for past in (0, 5):
        cache = model.make_cache()
        if past:
            mx.eval(model.hidden(mx.array([said[:past]]), cache), cache.arrays())
        start, new = cache.snapshot(), mx.array([said[past : past + rows]])
        with cache.each_step() as after:
            logits = np.array(model(new, cache))
        kept = [[np.array(a) for pair in snapshot.delta if pair for a in pair] for snapshot in after]
        cache.restore(start)
        with cache.each_step(late=True) as late:
            assert np.array_equal(np.array(model(new, cache)), logits)
        assert [snapshot.offset for snapshot in late] == [past + n for n in range(1, rows + 1)]
        for count, snapshot in enumerate(late):
            made = [np.array(a) for pair in snapshot.delta if pair for a in pair]
            assert all(np.array_equal(one, other) for one, other in zip(made, kept[count], strict=True))
            assert snapshot.nbytes == after[count].nbytes
        layers = [layer for layer in cache.layers if hasattr(layer, "again")]
        assert layers and all(layer.again is None and not layer.late and layer.steps is None for layer in layers)


@pytest.mark.parametrize("limit", [False, True], ids=["32 rows", "row by row"])
def test_rejected_at_every_row(dense, monkeypatch, limit):
    """The first `right` tokens of a copy of 31 are what the model says, the next is not."""
    count = most_rows(dense) - 1 if limit else MOST
    assert count == (15 if limit else 31)
    said = plain(dense, PROMPT, count + 8)
    for right in range(count + 1):
        cache, history = dense.make_cache(), History(GREEDY, [PROMPT], VOCAB)
        seat = Seat(cache, Sampler(GREEDY), history)
        seat.draw_first(dense(mx.array([PROMPT]), cache)[:, -1])
        guess = said[1 : count + 1]
        if right < count:
            guess[right] = (guess[right] + 1) % VOCAB
        found, seat.drawn, seat.history, draft = verify(
            dense, cache, seat.drawn, seat.sampler, seat.history, lambda guess=guess, at=history: copied(guess, at)
        )
        assert [step.token for step in found] == said[: right + 1] and len(draft.guesses) == count
        assert [step.from_draft for step in found] == [False] + [True] * right and found[0].drafted == count
        assert cache.offset == len(PROMPT) + right + 1 and seat.drawn[0].item() == said[right + 1]
        made = Drafted(dense, seat)
        more = [step.token for _ in range(4) for step in made.steps(9)]
        assert more == said[right + 1 : right + 5]
        cache.restore(found[right // 2].after or found[right // 2].before)  # one that nobody had asked for
        assert_covers(dense, cache, [*PROMPT, *said[: cache.offset - len(PROMPT)]])


@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize("count", [1, *(pytest.param(count, marks=pytest.mark.soak) for count in (3, 7)), 15])
def test_the_same_tokens_and_logprobs_with_copies(kind, count, monkeypatch):
    copies(monkeypatch, count)
    model = random_model(kind)
    options = {"max_tokens": 60, "sampling": FEW}
    for prompt in (PROMPT, [*PROMPT, 5, 17, 33, 5, *PROMPT]):
        said, cache = list(greedy(model, prompt, **options, lookup=False)), model.make_cache()
        parts = list(greedy(model, prompt, **options, cache=cache))
        assert tokens_of(parts) == tokens_of(said)
        assert all(np.array_equal(*map(np.array, (a.logprobs, b.logprobs))) for a, b in zip(parts, said, strict=True))
        assert_covers(model, cache, [*prompt, *tokens_of(said)])
        made, right = parts[-1].drafts["copy"]
        assert (made, right) == (parts[-1].drafted_tokens, parts[-1].accepted_tokens) and right > 0
        assert parts[-1].verified == "exact" and f"copy {right} of {made}" in statistics(parts[-1])
        assert said[-1].drafts == {} and said[-1].verified == ""


@pytest.mark.parametrize("who", ["random head", "nearly itself"])
def test_with_a_drafter_beside(who, monkeypatch):
    """Rounds of both, of copies that a first guess agrees with, and plain steps between them."""
    copies(monkeypatch, 7)
    model, drafter = with_head("dense")[:2] if who == "random head" else (random_model("dense"), near("dense", 0.02))
    prompt, turn = [*PROMPT, *range(20), *PROMPT], iter(range(10_000))
    said = plain(model, prompt, 90)
    monkeypatch.setattr(Pace, "choose", lambda self: (3, 0, 1)[next(turn) % 3])
    monkeypatch.setattr(Pace, "plain_tokens", lambda self: 3)
    cache = model.make_cache()
    parts = list(greedy(model, prompt, max_tokens=90, cache=cache, draft_model=drafter))
    assert tokens_of(parts) == said
    assert set(parts[-1].drafts) == {"head", "copy"} and parts[-1].drafts["copy"][1] > 0
    assert cache.draft.covered == cache.offset
    assert_covers(model, cache, [*prompt, *said])


@pytest.mark.parametrize("who", ["random head", "nearly itself"])
def test_in_a_long_run_of_copies_little_waits_for_a_drafter(who, monkeypatch):
    """It is not asked for a guess, and yet takes in what was said."""
    copies(monkeypatch, 2)
    monkeypatch.setattr(drafted, "CATCH_UP", 3)
    model, drafter = with_head("dense")[:2] if who == "random head" else (random_model("dense"), near("dense", 0.02))
    cache, most = model.make_cache(), 0
    options = {"max_tokens": 150, "sampling": FEW, "cache": cache, "draft_model": drafter}
    parts = []
    for part in greedy(model, [*PROMPT, *[5, 17] * 20], **options):
        parts.append(part)
        most = max(most, 0 if cache.draft is None else cache.draft.waiting)
    assert parts[-1].drafts["copy"][1] > 30 and most <= 3 + 1
    assert cache.draft.covered == cache.offset


def repeating(model, count=120, **options):
    """An answer in which most is a copy: the prompt has what the model says to it."""
    said = plain(model, PROMPT, count)
    return [*PROMPT, *said, *PROMPT], options


def test_cancelled_in_the_middle_of_a_long_copy(dense, monkeypatch):
    copies(monkeypatch)
    monkeypatch.setattr("mlx_qwen35.engine.drafted.most_rows", lambda model: MOST + 1)
    prompt, _ = repeating(dense)
    said = plain(dense, prompt, 60)
    for stop in (1, 9, 20, 33, 47):
        cache, parts = dense.make_cache(), []
        stream = greedy(dense, prompt, max_tokens=60, cache=cache)
        for part in stream:
            parts.append(part)
            if len(parts) == stop:
                break
        stream.close()
        assert tokens_of(parts) == said[:stop]
        assert_covers(dense, cache, [*prompt, *said[:stop]])


def test_a_session_is_branched_and_saved_in_the_middle_of_copies(dense, monkeypatch, tmp_path):
    copies(monkeypatch)
    prompt, _ = repeating(dense)
    session = Session(dense)
    stream = greedy(dense, prompt, max_tokens=60, session=session)
    begun = [next(stream).token for _ in range(21)]
    stream.close()
    said = plain(dense, prompt, 60)
    assert begun == said[:21]
    session.save(tmp_path / "kept")
    loaded = load_session(tmp_path / "kept", dense)
    for each in (session.branch(), loaded, session):
        parts = list(greedy(dense, [*prompt, *begun], max_tokens=39, session=each))
        assert tokens_of(parts) == said[21:]
        assert parts[-1].cached_tokens > 100 and parts[-1].drafts["copy"][1] > 0


def test_periodic_text_that_stops_being_periodic(dense, monkeypatch):
    """Whatever is proposed: rounds in which all is right, nothing is, or a part."""
    copies(monkeypatch)
    for period in (1, 2, 3, 7):
        prompt = [*range(10, 10 + period)] * (40 // period)
        cache = dense.make_cache()
        parts = list(greedy(dense, prompt, max_tokens=40, cache=cache))
        assert tokens_of(parts) == plain(dense, prompt, 40)
        assert_covers(dense, cache, [*prompt, *tokens_of(parts)])


def test_penalties_and_budgets_know_what_is_copied(dense, monkeypatch):
    copies(monkeypatch, 7)
    prompt, _ = repeating(dense)
    for sampling in (Sampling(repetition_penalty=1.1), Sampling(presence_penalty=1.0, frequency_penalty=0.3)):
        parts = list(greedy(dense, prompt, max_tokens=40, sampling=sampling))
        assert tokens_of(parts) == plain(dense, prompt, 40, sampling=sampling) and parts[-1].drafted_tokens > 0


def test_what_is_drawn_with_a_seed_is_drawn_with_copies_too(dense, monkeypatch):
    """Each token has its own key, whatever was proposed in its place."""
    copies(monkeypatch, 7)
    for options in ({"temperature": 0.3}, {"temperature": 1.0, "top_p": 0.5}, {"temperature": 0.7, "top_k": 5}):
        sampling = Sampling(seed=4, logit_bias=FEW.logit_bias, **options)
        parts = list(greedy(dense, [*PROMPT, 1, 2] * 8, max_tokens=80, sampling=sampling))
        assert tokens_of(parts) == plain(dense, [*PROMPT, 1, 2] * 8, 80, sampling=sampling)
        assert parts[-1].drafted_tokens > 0


@pytest.mark.parametrize("bits", [4, 8])
def test_keys_in_few_bits(bits, monkeypatch):
    copies(monkeypatch)
    model = quantized(group_size=32, bits=4)

    def cache():
        form = KVFormat(bits, 32, start=15)
        return Cache([StretchedKVCache(form) if isinstance(layer, KVCache) else layer for layer in model.make_cache()])

    prompt = [*PROMPT] * 5
    options = {"max_tokens": 50, "sampling": FEW}
    said = list(greedy(model, prompt, **options, cache=cache(), lookup=False))
    parts = list(greedy(model, prompt, **options, cache=cache()))
    assert tokens_of(parts) == tokens_of(said) and parts[-1].drafts["copy"][1] > 0
    assert all(np.array_equal(*map(np.array, (a.logprobs, b.logprobs))) for a, b in zip(parts, said, strict=True))


def test_what_was_said_is_found_by_the_next_answer(dense, monkeypatch):
    copies(monkeypatch, 7)
    first = Text(dense, PROMPT)
    for token in (40, 41, 42, 43, 44):
        first.add(token)
    assert first.match == (0, -1)
    first.close()
    second = Text(dense, [*PROMPT, 40, 41, 42, 50, 51, 40])  # parts from it behind 42
    assert second.after(41).length == 2 and second.draft(second.after(41), 3, 41) == [42, 50, 51]
    assert second._lookup is not None and 43 in second._lookup.tokens
    other = Text(dense, [90, 91])
    assert other.after(91) == (1, 1) and 43 not in other._lookup.tokens
    second.close(), other.close()
    fresh = Text(dense, [*PROMPT, 40], fresh=True)
    assert fresh.after(41).length == 0
    again = Text(dense, [*PROMPT, 40, 41, 42, 50, 51, 40, 41])
    assert again.draft(again.match, 2) == [42, 50] and again.copying is second.copying


def test_placeholders_of_pictures_are_no_text(dense):
    text = Text(dense, [5, 6, 80, 80, 80, 7, 8, 5, 6, 80, 80, 80, 9, 7], gaps=[80])
    assert text.after(8) == (2, 4) and text.draft(text.after(8), 9, 8) == [5, 6]
    assert text.after(80).length == 0


def test_the_engine_copies_too_and_answers_alone_and_beside_others(dense, monkeypatch):
    copies(monkeypatch)
    prompts = [repeating(dense)[0], [*PROMPT] * 6, [1, 2, 3] * 9]
    said = [plain(dense, prompt, 40, sampling=FEW) for prompt in prompts]
    with Engine(dense, Endless(), cache_bytes=1 << 30) as engine:
        options = {"sampling": FEW, "max_tokens": 40}
        alone = [[*engine.submit(prompt, **options)] for prompt in prompts]
        beside = [engine.submit(prompt, **options) for prompt in prompts]
        assert [tokens_of(parts) for parts in alone] == said
        assert [list(answer.result().tokens) for answer in beside] == said
        assert alone[0][-1].drafts["copy"][1] > 0
        assert not any(part.drafted_tokens for part in engine.submit(prompts[0], **options, lookup=False))


def test_it_is_asked_for_by_a_flag(dense):
    with pytest.raises(ValueError, match="lookup is 3, of type int; give True or False"):
        stream_generate(dense, Endless(), PROMPT, lookup=3)


def test_the_pace_of_copies_turns_off_what_does_not_pay():
    pace = Copying()
    assert pace.choose(4, 31) == 31 and pace.choose(1, 31) == 1 and pace.choose(2, 2) == 2
    for _ in range(4):
        pace.decoded(1, 1.0)
        pace.copied(4, 31, 31, 4.0)
        pace.copied(1, 3, 0, 1.3)
    assert pace.choose(4, 31) == 31
    for _ in range(30):
        pace.copied(1, 3, 0, 1.3)
    assert [pace.choose(1, 31) > 0 for _ in range(40)].count(True) == 2  # passed over 8, 16 times, and so on
    assert pace.choose(4, 31) == 31, "the others are not concerned"
    for _ in range(40):
        pace.copied(4, 31, 1, 40.0)
    assert pace.choose(4, 31, otherwise=1.0) in (0, 1, 3)
    assert Copying(steady=True).choose(4, 31, otherwise=1e9) == 31


def test_experts_from_a_disk_ask_for_long_matches(dense, monkeypatch):
    copies(monkeypatch)
    seat = Seat(dense.make_cache(), Sampler(GREEDY), History(GREEDY, [PROMPT], VOCAB))
    seat.text, seat.drawn = Text(dense, [*range(90), *range(4, 18)]), (mx.array([18]), mx.zeros((1, VOCAB)))
    monkeypatch.setattr(type(dense), "expert_stats", property(lambda self: object()))
    assert Drafted(dense, seat)._copy(7) is None  # 15 tokens
    seat.text = Text(dense, [*range(90), *range(3, 18)])
    assert Drafted(dense, seat)._copy(7).kind == 4
    monkeypatch.undo()
