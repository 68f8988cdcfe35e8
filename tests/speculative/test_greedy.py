"""Greedy answers are the same with and without drafts: random models; bad, middling and perfect drafters."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35.generation import statistics
from mlx_qwen35.model.mtp import MTPHead
from mlx_qwen35.sampling import Sampling
from tests.drafted import always, near, with_head
from tests.talkers import PROMPT, assert_covers, greedy, random_model, recomputed

COUNT = 24


@pytest.fixture(scope="module", params=["dense", "moe"])
def models(request):
    """A model, and what drafts for it: (name, drafter)."""
    kind = request.param
    model, head, _ = with_head(kind)
    mine = random_model(kind)
    return {
        "random head": (model, head),
        "itself": (mine, random_model(kind)),
        "nearly itself": (mine, near(kind, 0.02)),
        "another": (mine, near(kind, 1.0)),
    }


def tokens_of(parts):
    return [part.token for part in parts]


@pytest.mark.parametrize(
    "who, count",
    [("random head", 1), ("random head", 4), ("itself", 1), ("itself", 4), ("nearly itself", 3), ("another", 2)],
)
def test_the_same_tokens_and_a_cache_that_covers_them(models, monkeypatch, who, count):
    model, drafter = models[who]
    always(monkeypatch, count)
    plain = list(greedy(model, max_tokens=COUNT))
    cache = model.make_cache()
    parts = list(greedy(model, max_tokens=COUNT, cache=cache, draft_model=drafter, num_draft_tokens=count))
    assert tokens_of(parts) == tokens_of(plain)
    for mine, other in zip(parts, plain, strict=True):
        assert np.array_equal(np.array(mine.logprobs), np.array(other.logprobs))
    assert [part.generation_tokens for part in parts] == list(range(1, COUNT + 1))
    assert not any(part.from_draft or part.drafted_tokens for part in plain)
    last = parts[-1]
    assert last.accepted_tokens == sum(part.from_draft for part in parts) <= last.drafted_tokens
    if who == "itself":  # every guess is right: rounds of count + 1 tokens, of which the first is the model's own
        assert [part.from_draft for part in parts] == [n % (count + 1) > 0 for n in range(COUNT)]
    if who == "nearly itself":
        assert 0 < last.accepted_tokens < last.drafted_tokens
    assert_covers(model, cache, PROMPT + tokens_of(parts))


def test_a_head_of_the_model_drafts_unless_it_is_told_not_to():
    model, head, _ = with_head("dense")
    with pytest.raises(ValueError, match="load it with mtp=True"):
        greedy(model, mtp=True)
    with pytest.raises(ValueError, match="num_draft_tokens is 5"):
        greedy(model, num_draft_tokens=5)
    assert "_mtp" not in model.children() and model.mtp is None
    model.take_mtp(head)
    assert model.mtp is head and len(model.parameters()) == len(with_head("dense")[0].parameters())
    plain = list(greedy(model, mtp=False))
    assert plain[-1].drafted_tokens == 0 and "Drafts" not in statistics(plain[-1])
    for drafted in (list(greedy(model)), list(greedy(model, mtp=True))):
        assert drafted[-1].drafted_tokens > 0 and tokens_of(drafted) == tokens_of(plain)
        assert f"Drafts: {drafted[-1].accepted_tokens} of {drafted[-1].drafted_tokens}" in statistics(drafted[-1])
    for count in (0, 5):
        with pytest.raises(ValueError, match="must be 1 to 4"):
            greedy(model, num_draft_tokens=count)


def test_a_draft_model_of_another_vocabulary_is_refused():
    model, other = random_model("dense"), with_head("dense", vocab_size=97)[0]
    with pytest.raises(ValueError, match="97 tokens and the model 96"):
        greedy(model, draft_model=other)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(repetition_penalty=3.0),
        Sampling(repetition_penalty=2.0, repetition_context_size=5),
        Sampling(presence_penalty=4.0, logit_bias={7: -9.0, 8: 4.0}),
        Sampling(frequency_penalty=1.5),
    ],
    ids=str,
)
def test_penalties_know_what_was_drafted_before(monkeypatch, sampling):
    model, drafter = random_model("dense"), near("dense", 0.02)
    always(monkeypatch, 3)
    plain = tokens_of(greedy(model, sampling=sampling, max_tokens=COUNT))
    parts = list(greedy(model, sampling=sampling, max_tokens=COUNT, draft_model=drafter))
    assert tokens_of(parts) == plain != tokens_of(greedy(model, max_tokens=COUNT))
    assert parts[-1].accepted_tokens > 0


def test_a_conversation_goes_on_with_what_the_drafter_knows(monkeypatch):
    """Prompt, answer, prompt, answer; drafts off for one answer in between."""
    always(monkeypatch, 2)
    model, drafter = random_model("dense"), near("dense", 0.02)
    cache, said = model.make_cache(), []
    options = {"cache": cache, "chunk_size": 3, "num_draft_tokens": 2, "max_tokens": 7}
    for number, prompt in enumerate([PROMPT, [20, 21], [3], [9, 9, 4]]):
        drafting = {"draft_model": drafter} if number != 2 else {}
        said += prompt
        new = tokens_of(greedy(model, prompt, **options, **drafting))
        assert new == recomputed(model, said, 7)
        assert (cache.draft is None) == (number == 2)
        said += new
    assert_covers(model, cache, said)


def test_going_back_takes_the_drafter_along(monkeypatch):
    always(monkeypatch, 3)
    model, head, _ = with_head("dense")
    cache = model.make_cache()
    first = tokens_of(greedy(model, cache=cache, draft_model=head))
    point = cache.snapshot()
    tokens_of(greedy(model, [5, 6, 7], cache=cache, draft_model=head, max_tokens=30))
    cache.restore(point)
    drafter = cache.draft
    assert drafter.covered == cache.offset == len(PROMPT) + len(first)
    again = tokens_of(greedy(model, [8, 9], cache=cache, draft_model=head))
    assert cache.draft is drafter
    assert again == recomputed(model, [*PROMPT, *first, 8, 9], 12)


def test_the_head_has_taken_in_what_it_would_have_from_the_start(monkeypatch):
    """Primed with every position of the prompt, in chunks of any size, and with all that was accepted."""
    always(monkeypatch, 3)
    model, head, _ = with_head("dense")
    for chunk_size in (1, 3, 100):
        cache = model.make_cache()
        said = tokens_of(greedy(model, cache=cache, draft_model=head, chunk_size=chunk_size, max_tokens=20))
        drafter = cache.draft
        drafter._take_in()
        held = drafter._held
        tokens = mx.array([[*PROMPT, *said]])
        assert held == tokens.shape[1] - 1
        whole = head.make_caches()
        hidden = model.hidden(tokens)[:, :-1]
        head(model.embed_tokens(tokens[:, 1:]), hidden, mx.arange(held)[None], whole)
        for mine, other in zip(drafter._caches, whole, strict=True):
            for a, b in ((mine.keys, other.keys), (mine.values, other.values)):
                np.testing.assert_allclose(np.array(a)[:, :, :held], np.array(b)[:, :, :held], atol=1e-3)


def test_a_head_is_no_part_of_the_model():
    model, head, _ = with_head("moe")
    model.take_mtp(head)
    assert not any("mtp" in name for name, _ in model.named_modules())
    assert isinstance(model.mtp, MTPHead)
    model.unload()
    with pytest.raises(AttributeError, match="unloaded"):
        _ = model.mtp
