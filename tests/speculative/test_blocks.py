"""Block drafters: greedy answers are the same, sampled ones have the same distribution, and the context is what it was.

Knows drafters that are random, and some that are told the answer, and wrong now and then.
"""

import mlx.core as mx
import numpy as np
import pytest

import mlx_qwen35
from mlx_qwen35 import Engine
from mlx_qwen35.blocks.config import BlockConfig
from mlx_qwen35.blocks.drafter import BlockDraftModel
from mlx_qwen35.blocks.window import Window
from mlx_qwen35.cache.kv import KVFormat
from mlx_qwen35.engine import drafted
from mlx_qwen35.experts.chances import Chances
from mlx_qwen35.generation import generate_batch, stream_generate
from mlx_qwen35.layers.taps import Taps
from mlx_qwen35.processor import Prompt
from mlx_qwen35.sampling import History, Sampler, Sampling
from mlx_qwen35.session import Session, load_session
from mlx_qwen35.speculative import Drafting, drafting, rejection
from mlx_qwen35.speculative import blocks as blocks_of_speculative
from mlx_qwen35.speculative.blocks import BlockDrafter
from tests.blocks import filled, published, random_blocks, told
from tests.drafted import always
from tests.seeing_model import prompt_of, seeing_model, some_media
from tests.speculative import test_sampling as sampled
from tests.speculative.test_demo import streamed  # noqa: F401
from tests.speculative.test_few_tokens import quantized
from tests.talkers import PROMPT, Endless, assert_covers, greedy, random_model, recomputed

COUNT = 40
DEMO = {"hidden_size": 192, "vocab_size": 1024, "num_target_layers": 8,
        "section": {"target_layer_ids": [1, 4, 7], "mask_token_id": 900}}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return random_model("dense")


@pytest.fixture(scope="module")
def plain(model):
    return recomputed(model, PROMPT, COUNT)


def tokens_of(parts):
    return [part.token for part in parts]


# --- rounds


@pytest.mark.parametrize("of, kind, count", [("moe", "DFlash", 15), ("dense", "DFlash2", 7)])
def test_the_same_tokens_and_a_cache_that_covers_them(monkeypatch, of, kind, count):
    """More than 8 rows have their states computed once more."""
    always(monkeypatch, count)
    model = random_model(of)
    plain = tokens_of(greedy(model, max_tokens=COUNT, lookup=False))
    for wrong in (5, 12):
        drafter, cache = told([*PROMPT, *plain], wrong, kind), model.make_cache()
        options = {"draft_model": drafter, "num_draft_tokens": count, "lookup": False, "cache": cache}
        parts = list(greedy(model, max_tokens=COUNT, **options))
        assert tokens_of(parts) == plain
        assert parts[-1].drafts["head"][1] > COUNT / 3
        assert_covers(model, cache, PROMPT + plain)
        assert isinstance(cache.draft, BlockDrafter)
    parts = list(greedy(model, max_tokens=COUNT, draft_model=random_blocks(kind), num_draft_tokens=count))
    assert tokens_of(parts) == plain and parts[-1].drafted_tokens > count


def test_how_many_there_may_be(model):
    with pytest.raises(ValueError, match="num_draft_tokens is 16; it must be 1 to 15"):
        greedy(model, draft_model=random_blocks(), num_draft_tokens=16)
    with pytest.raises(ValueError, match="num_draft_tokens is 8; it must be 1 to 7"):
        greedy(model, draft_model=random_blocks("DFlash2"), num_draft_tokens=8)
    with pytest.raises(ValueError, match="does not draft for this model: it is for 97 tokens where it has 96"):
        greedy(model, draft_model=random_blocks(vocab_size=97))


def test_the_pace_turns_down_what_is_never_right(model, plain):
    """A random drafter costs and brings nothing: after its first rounds there are plain steps."""
    parts = list(greedy(model, max_tokens=COUNT, draft_model=random_blocks(), lookup=False))
    assert tokens_of(parts) == plain
    assert parts[-1].drafted_tokens < 7 * COUNT / 2


def test_the_pace_knows_how_many_rows_there_are(model, plain, monkeypatch):
    """More drafts than a call may verify are not waited for."""
    for place in (drafted, drafting):
        monkeypatch.setattr(place, "most_rows", lambda model: 5)
    cache = model.make_cache()
    options = {"draft_model": random_blocks(), "num_draft_tokens": 15, "lookup": False, "cache": cache}
    parts = list(greedy(model, max_tokens=COUNT, **options))
    assert tokens_of(parts) == plain and cache.draft.pace.most == 4
    assert parts[-1].drafted_tokens < 4 * COUNT / 2


def context_of(model, drafter: BlockDraftModel, tokens: list[int], media=()) -> list[Window]:
    """What a drafter's windows hold of a text that is read at once."""
    taps, windows = Taps(drafter.config.taps), drafter.make_windows()
    model.hidden(mx.array([tokens]), media=media, taps=taps)
    drafter.remember(taps.of(drafter.config.taps), windows)
    return windows


def assert_knows(model, cache, tokens: list[int], media=()) -> None:
    """The drafter of a cache has in its windows what it would have had from the start."""
    follower = cache.draft
    assert follower.cache is cache and follower.covered == cache.offset == len(tokens)
    follower.catch_up()
    wanted = context_of(model, follower.blocks, tokens, media)
    for mine, other in zip(follower._windows, wanted, strict=True):
        assert mine.stop == other.stop == len(tokens)
        for a, b in zip(mine.read(), other.read(), strict=True):
            np.testing.assert_allclose(np.array(a), np.array(b), atol=2e-3)


@pytest.mark.parametrize("chunk_size", [1, 3, 100])
def test_the_context_is_what_it_would_be_from_the_start(model, plain, monkeypatch, chunk_size):
    always(monkeypatch, 7)
    drafter, cache = told([*PROMPT, *plain], 5), model.make_cache()
    options = {"draft_model": drafter, "cache": cache, "chunk_size": chunk_size, "max_tokens": COUNT}
    assert tokens_of(greedy(model, lookup=False, **options)) == plain
    assert_knows(model, cache, PROMPT + plain)


def test_going_back_takes_the_drafter_along(model, plain, monkeypatch):
    always(monkeypatch, 7)
    drafter, cache = told([*PROMPT, *plain], 5), model.make_cache()
    options = {"draft_model": drafter, "cache": cache, "lookup": False}
    first = tokens_of(greedy(model, max_tokens=9, **options))
    point = cache.snapshot()
    tokens_of(greedy(model, [5, 6, 7], max_tokens=3, **options))
    follower = cache.draft
    cache.restore(point)
    again = tokens_of(greedy(model, [8, 9], **options))
    assert cache.draft is follower and again == recomputed(model, [*PROMPT, *first, 8, 9], 12)
    assert_knows(model, cache, [*PROMPT, *first, 8, 9, *again])


def test_a_long_way_without_a_guess(model, plain, monkeypatch):
    """What waits for a guess is bounded, and is right when one comes."""
    monkeypatch.setattr(blocks_of_speculative, "_MOST_WAITING", 6)
    drafter, cache = random_blocks(), model.make_cache()
    options = {"draft_model": drafter, "cache": cache, "lookup": False}
    always(monkeypatch, 0)
    seen = []
    for _ in greedy(model, max_tokens=COUNT, **options):
        seen.append(sum(taken.tokens.shape[1] for taken in cache.draft._waiting))
    assert max(seen) <= 7
    always(monkeypatch, 3)
    assert tokens_of(greedy(model, [5], max_tokens=3, **options)) == recomputed(model, [*PROMPT, *plain, 5], 3)
    point = cache.snapshot()
    list(greedy(model, [6, 7], max_tokens=20, **options))
    cache.restore(point)
    assert_knows(model, cache, [*PROMPT, *plain, 5, *recomputed(model, [*PROMPT, *plain, 5], 3)])


def test_far_back_it_knows_less_and_goes_on():
    window, other = Window(4), Window(None)
    for number in range(600):
        for each in (window, other):
            each.append(mx.full((1, 2, 1, 3), number), mx.full((1, 2, 1, 3), -number))
        held = np.array(window.read()[0])[0, 1, :, 2]
        assert held.tolist() == list(range(max(0, number - 3), number + 1))
    assert window.keys.shape[2] <= 4 + 64 + 256 < other.keys.shape[2]
    twin = window.copied()
    window.rewind(570)
    assert np.array(window.read()[0])[0, 0, :, 0].tolist() == [566, 567, 568, 569]
    window.append(mx.full((1, 2, 2, 3), 7.0), mx.full((1, 2, 2, 3), 7.0))
    assert np.array(window.read()[0])[0, 0, :, 0].tolist() == [568, 569, 7, 7]
    assert np.array(twin.read()[0])[0, 0, :, 0].tolist() == [596, 597, 598, 599]
    window.rewind(100)
    assert window.read() is None and window.stop == 100
    window.append(mx.full((1, 2, 3, 3), 8.0), mx.full((1, 2, 3, 3), 8.0), skipped=20)
    assert (window.start, window.stop) == (120, 123)
    other.rewind(2)
    other.shrink()
    assert other.keys.shape[2] < 10 and np.array(other.read()[1])[0, 1, :, 2].tolist() == [0, -1]


# --- with all else


def test_sessions_marks_and_branches(model, monkeypatch):
    always(monkeypatch, 7)
    text = recomputed(model, PROMPT, 30)
    drafter = told([*PROMPT, *text], 4)
    session = Session(model, snapshot_bytes=1 << 20)
    session.marks._step = 2

    def talk(of, prompt, count):
        """An answer that is left in the middle of a round."""
        stream = greedy(model, prompt, session=of, draft_model=drafter, chunk_size=4, max_tokens=30, lookup=False)
        said = [next(stream).token for _ in range(count)]
        stream.close()
        assert said == recomputed(model, prompt, count)
        assert_knows(model, of.cache, [*prompt, *said])
        return [*prompt, *said]

    said = talk(session, PROMPT, 12)
    branch = session.branch()
    assert branch.nbytes > 0
    for of, more in ((session, [4, 61]), (branch, [9]), (session, [7, 7]), (branch, [3, 1])):
        talk(of, [*said, *more], 5)
    earlier = [*said[: len(PROMPT) + 6], 50, 51]
    for of in (session, branch):
        talk(of, earlier, 3)


def test_after_pictures(monkeypatch):
    always(monkeypatch, 5)
    model, _ = seeing_model()
    tokens, media = prompt_of(3, some_media("image", 4, 6, seed=1), 2, some_media("video", 2, 4, 6, seed=3), 3)
    prompt = Prompt(tokens, None, False, tuple(media))
    options = {"sampling": Sampling(), "max_tokens": 12, "chunk_size": 5, "lookup": False}
    plain = tokens_of(stream_generate(model, Endless(), prompt, **options))
    cache = model.make_cache()
    options |= {"draft_model": told([*tokens, *plain], 4), "cache": cache}
    assert tokens_of(stream_generate(model, Endless(), prompt, **options)) == plain
    assert_knows(model, cache, [*tokens, *plain], media)


def test_a_saved_session_has_none_and_goes_on(model, plain, monkeypatch, tmp_path):
    always(monkeypatch, 3)
    session = Session(model)
    options = {"draft_model": told([*PROMPT, *plain], 5), "max_tokens": 8, "lookup": False}
    said = tokens_of(greedy(model, session=session, **options))
    session.save(tmp_path / "a")
    loaded = load_session(tmp_path / "a", model)
    assert loaded.cache.draft is None
    for of in (session, loaded):
        assert tokens_of(greedy(model, [*PROMPT, *said, 9], session=of, **options)) == recomputed(
            model, [*PROMPT, *said, 9], 8
        )


def test_weights_and_keys_in_few_bits(monkeypatch):
    always(monkeypatch, 6)
    model = quantized(group_size=32, bits=4)
    model.kv_form = KVFormat(8, 32, start=9)
    few = tokens_of(greedy(model, max_tokens=COUNT, lookup=False))
    parts = list(greedy(model, max_tokens=COUNT, lookup=False, draft_model=told([*PROMPT, *few], 6)))
    assert tokens_of(parts) == few and parts[-1].accepted_tokens > COUNT / 2


def test_beside_copies(model, monkeypatch):
    """A prompt that repeats: copies and blocks take turns."""
    always(monkeypatch, 7)
    prompt = [5, 17, 33, 60] * 5
    wanted = recomputed(model, prompt, COUNT)
    parts = list(greedy(model, prompt, max_tokens=COUNT, draft_model=told([*prompt, *wanted], 7)))
    assert tokens_of(parts) == wanted


@pytest.mark.parametrize("seed", [None, 3])
def test_alone_and_in_company(seed):
    model = random_model("dense")
    drafter = random_blocks("DFlash2")
    sampling = Sampling() if seed is None else Sampling(temperature=0.8, seed=seed)
    prompts = [[5 + number, 17, 40, 3][: 2 + number % 3] for number in range(3)]
    options = {"sampling": sampling, "max_tokens": 12, "draft_model": drafter}
    wanted = [tokens_of(greedy(model, prompt, **options)) for prompt in prompts]
    done = generate_batch(model, Endless(), prompts, most_rows=2, **options)
    assert [list(answer.tokens) for answer in done] == wanted
    with Engine(model, Endless(), most_rows=3) as engine:
        answers = [engine.submit(prompt, **options) for prompt in prompts]
        assert [list(answer.result(120).tokens) for answer in answers] == wanted


def test_a_row_that_went_on_with_others_knows_what_came(monkeypatch):
    """Steps of several rows hand out what layers said, each row its own."""
    model, prompts = random_model("dense"), [[5, 17, 40], [8, 2], [60, 61, 62, 63]]
    drafter = random_blocks()
    sessions = [Session(model) for _ in prompts]
    options = {"sampling": Sampling(), "max_tokens": 25, "draft_model": drafter, "lookup": False}
    with Engine(model, Endless(), most_rows=3) as engine:
        pairs = list(zip(prompts, sessions, strict=True))
        answers = [engine.submit(prompt, session=session, **options) for prompt, session in pairs]
        said = [list(answer.result(120).tokens) for answer in answers]
    for (prompt, session), tokens in zip(pairs, said, strict=True):
        assert tokens == recomputed(model, prompt, 25)
        assert_knows(model, session.cache, [*prompt, *tokens])


QUESTION = "What is 867 + 821?"


@pytest.fixture(scope="module")
def demo():
    return mlx_qwen35.load()


def answer(pair, **options):
    return list(stream_generate(*pair, QUESTION, sampling=Sampling(), max_tokens=30, **options))


def test_streamed_experts_and_a_form(demo, streamed, monkeypatch):  # noqa: F811
    """Outputs of layers through windows and one by one; a form that forbids what is guessed."""
    always(monkeypatch, 5)
    model, processor = demo
    wanted = tokens_of(answer(demo, lookup=False))
    drafter = told([*processor.prompt(QUESTION).tokens, *wanted], 3, **DEMO)
    parts = answer((streamed, processor), draft_model=drafter, lookup=False)
    assert tokens_of(parts) == wanted and parts[-1].accepted_tokens > len(parts) / 3
    form = {"response_format": {"type": "regex", "regex": "[a-z]{3,9}! ?[0-9]{2,5}"}}
    formed = tokens_of(answer(demo, lookup=False, **form))
    parts = answer(demo, draft_model=drafter, **form)
    assert tokens_of(parts) == formed != wanted


@pytest.mark.parametrize("length", [1, 5, 70])
def test_taps_are_what_came_out_of_layers(demo, streamed, monkeypatch, length):  # noqa: F811
    """In windows, in which a layer lacks an expert and is computed again, layer by layer, and in tiles."""
    monkeypatch.setattr(Chances, "length", lambda self, layers, stop=0.0: min(3, len(layers)))
    tokens = mx.array([np.random.RandomState(length).randint(0, 900, length).tolist()])
    found: list[np.ndarray] = []
    demo[0].hidden(tokens, between=lambda x: found.append(np.array(x)))
    for model in (demo[0], streamed):
        for _ in range(3):
            taps = Taps([1, 7, 4])
            model.hidden(tokens, model.make_cache(), taps=taps)
            given = np.split(np.array(taps.of([4, 1, 7])), 3, axis=-1)
            for number, own in zip((4, 1, 7), given, strict=True):
                np.testing.assert_allclose(own, found[number], atol=1e-4)


# --- what is drawn


class Seen(sampled.Table):
    """A table whose hidden state, that of its last layer too, is the row of logits."""

    def embed_tokens(self, tokens):
        return mx.eye(sampled.VOCAB)[tokens]

    def hidden(self, tokens, cache, media=(), *, taps=None, **how):
        made = super().hidden(tokens, cache, media, **how)
        if taps is not None:
            taps.met(0, made, None)
        return made


def guesser(kind: str) -> BlockDraftModel:
    """Random, for seven tokens: what it guesses hangs on the context, and of a DFlash2 on the guess before."""
    sizes = {"hidden_size": 7, "vocab_size": 7, "num_target_layers": 1, "num_hidden_layers": 1, "head_dim": 6}
    section = {"mask_token_id": 6, "target_layer_ids": [0]}
    if kind == "DFlash2":
        section |= {"conv_group_size": 7, "selector_rank": 3, "selector_top_k": 4}
    config = published(kind, section=section, layer_types=["sliding_attention"], **sizes)
    return filled(BlockDraftModel(BlockConfig.from_dict(config, "config.json")), config)


def drawn(sampling: Sampling, kind: str, count: int) -> tuple[list[int], int]:
    """Tokens of an answer that begins after token 0, and how many of them had been guessed."""
    model, drafter = Seen(1), guesser(kind)
    cache, history = model.make_cache(), History(sampling, [[0]], sampled.VOCAB)
    cache.draft = follower = Drafting(drafter, 3, steady=True).drafter(model, cache)
    logits = model.hidden(mx.array([[0]]), cache)[:, -1]
    follower.prime(mx.array([[0]]), logits[None])
    seat = sampled.Seat(cache, Sampler(sampling), history, follower)
    seat.draw_first(logits)
    made, tokens, right = sampled.Drafted(model, seat), [], 0
    while len(tokens) < count:
        steps = made.steps(count - len(tokens))
        tokens += [step.token for step in steps]
        right += len(steps) - 1
    return tokens, right


@pytest.mark.parametrize(
    "kind, name",
    [("DFlash", "temperature"), ("DFlash2", "top_k"), ("DFlash2", "min_p")],
)
def test_the_distribution_is_that_of_plain_decoding(kind, name):
    sampling = Sampling(seed=21, **sampled.OPTIONS[name])
    tokens, right = drawn(sampling, kind, 600)
    total, point = sampled.statistic(tokens, sampling)
    assert total < point and right > 100


def _too_kind(target, guesses, weights, coins, dice):
    kept, tokens = sampled.rejection_drawn(target, guesses, weights, coins, dice)
    return kept | (mx.random.uniform(shape=kept.shape, key=dice) < 0.3), tokens


def test_a_planted_bias_is_found(monkeypatch):
    monkeypatch.setattr(rejection, "_drawn", _too_kind)
    sampling = Sampling(seed=21, temperature=1.0)
    total, point = sampled.statistic(drawn(sampling, "DFlash", 600)[0], sampling)
    assert total > point


def test_weights_other_than_those_drawn_with_are_found(monkeypatch):
    """As if each candidate of a path were as likely as the others."""
    guess = Sampler.guess

    def flat(self, logits, history, words=None):
        token, weights = guess(self, logits, history, words)
        return token, mx.where(mx.isinf(weights), weights, 0.0)

    monkeypatch.setattr(Sampler, "guess", flat)
    sampling = Sampling(seed=21, temperature=1.0)
    total, point = sampled.statistic(drawn(sampling, "DFlash2", 600)[0], sampling)
    assert total > point


def check(count: int) -> None:
    """So many greedy tokens, of both kinds and of drafters that are more or less often right, are what they were."""
    models, tokens, number = [random_model("dense"), random_model("moe")], 0, 0
    while tokens < count:
        for model in models:
            prompt = [number % 90, *PROMPT]
            plain = tokens_of(greedy(model, prompt, max_tokens=60, lookup=False))
            for kind in ("DFlash", "DFlash2"):
                drafters = [told([*prompt, *plain], 2 + number % 9, kind), random_blocks(kind, seed=number)]
                for drafter in drafters:
                    parts = greedy(model, prompt, max_tokens=60, draft_model=drafter, lookup=number % 2 > 0)
                    assert tokens_of(parts) == plain, (kind, prompt)
                    tokens += len(plain)
        number += 1


@pytest.mark.soak
def test_twenty_thousand_tokens():
    check(20_000)
